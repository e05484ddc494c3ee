"""The multipart form of an upload: the adapter's files, and how to publish them."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from server.adapters.objects import CONFIG_NAME, FILE_NAMES, INITIAL_NAME, PICKLE_REFUSAL, WEIGHTS_NAME
from server.adapters.record import AdapterRecord, Publication
from server.adapters.report import refused_file
from server.errors import InvalidRequestError
from server.tenancy import CallerAdapters

__all__ = ["OPENAPI_BODY", "UploadForm", "read_upload_form"]

MAX_FILES = 8
MAX_FIELDS = 8
MAX_GENERATION_DIGITS = 18
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}

FIELDS: dict[str, dict[str, Any]] = {
    "name": {"type": "string", "description": "letters, digits, dot, dash and underscore"},
    "expected_generation": {"type": "integer", "description": "refuse unless it is current; 0: no such adapter"},
    "promote": {"type": "boolean", "default": True, "description": "make it current; else it is `name@generation`"},
    "labels": {"type": "string", "description": "a JSON object of strings"},
    "note": {"type": "string"},
}
FILES = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "description": f"{CONFIG_NAME} and {WEIGHTS_NAME}, or one zip, tar or tar.gz of the folder",
}
INITIAL = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "description": "the same two files as they were before training, for adapters of a changed base (PiSSA, CorDA, …)",
}
OPENAPI_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": FIELDS | {"files": FILES, INITIAL_NAME: INITIAL},
                }
            }
        },
    }
}


@dataclass(frozen=True, slots=True)
class UploadForm:
    """What was sent: `files` by their names, those of the field `initial` with that as their folder."""

    name: str
    publication: Publication
    files: dict[str, BinaryIO]

    def publish(self, adapters: CallerAdapters) -> AdapterRecord:
        """On a worker thread: the two files by their names, or one archive.

        Raises:
            ServerError: it is refused or cannot be kept.
        """
        names = set(self.files)
        own, initial = set(FILE_NAMES), {f"{INITIAL_NAME}/{name}" for name in FILE_NAMES}
        if names in (own, own | initial):
            return adapters.upload_files(self.name, self.files, self.publication)
        pickle = next((name for name in sorted(names) if name.lower().endswith(PICKLE_SUFFIXES)), None)
        if pickle is not None:
            raise refused_file(pickle, PICKLE_REFUSAL, "adapter_pickle")
        if len(names) == 1 and not names & (own | initial):
            return adapters.upload_archive(self.name, next(iter(self.files.values())), self.publication)
        raise refused_file(
            min(own - names or names - own),
            f"send {CONFIG_NAME} and {WEIGHTS_NAME}, both of them again as `{INITIAL_NAME}` if need be, or one archive "
            "of the folder",
            "adapter_files_missing",
        )


@asynccontextmanager
async def read_upload_form(request: Request) -> AsyncIterator[UploadForm]:
    """The form of a request; its files are closed at the end of the block.

    Raises:
        InvalidRequestError: it is no such form.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequestError("send the adapter as multipart/form-data", code="not_multipart")
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=64 << 10)
    except HTTPException as error:
        message = f"the multipart body is malformed: {error.detail}"
        raise InvalidRequestError(message, code="multipart_invalid") from None
    try:
        texts: dict[str, str] = {}
        files: dict[str, BinaryIO] = {}
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                folder = f"{INITIAL_NAME}/" if key == INITIAL_NAME else ""
                _add_once(files, folder + (value.filename or ""), value.file)
            elif key not in FIELDS:
                raise InvalidRequestError(f"the form has no field {key[:80]!a}", code="multipart_invalid")
            else:
                _add_once(texts, key, value)
        if "name" not in texts:
            raise InvalidRequestError("the form needs a `name`", code="missing_field", param="name")
        yield UploadForm(texts["name"], _publication(texts), files)
    finally:
        await form.close()


def _add_once(into: dict[str, Any], key: str, value: Any) -> None:
    if key in into:
        raise InvalidRequestError(f"the form has {key[:80]!a} twice", code="multipart_invalid")
    into[key] = value


def _publication(texts: dict[str, str]) -> Publication:
    expected, promote = texts.get("expected_generation"), texts.get("promote", "true").lower()
    if expected is not None and not (
        expected.isascii() and expected.isdecimal() and len(expected) <= MAX_GENERATION_DIGITS
    ):
        raise InvalidRequestError("`expected_generation` is no number", param="expected_generation")
    if promote not in BOOLEANS:
        raise InvalidRequestError("`promote` is true or false", param="promote")
    return Publication(
        expected_generation=None if expected is None else int(expected),
        promote=BOOLEANS[promote],
        labels=_labels(texts.get("labels")),
        note=texts.get("note"),
        source={"kind": "upload"},
    )


def _labels(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        raise InvalidRequestError("`labels` is no JSON object of strings", code="label_invalid", param="labels")
    return labels
