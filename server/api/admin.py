"""`/admin/adapters`: upload, list, show, delete."""

import asyncio
from typing import BinaryIO

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from server.adapters.service import AdapterService
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterRecord
from server.api.dependencies import Adapters
from server.errors import InvalidAdapterError, InvalidRequestError
from server.schemas.admin import AdapterInfo, AdapterList

__all__ = ["router"]

router = APIRouter(prefix="/admin", tags=["adapters"])

MAX_FILES = 8
MAX_FIELDS = 8
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "description": "letters, digits, dot, dash and underscore"},
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": f"{CONFIG_NAME} and {WEIGHTS_NAME}, or one zip, tar or tar.gz of the folder",
                        },
                    },
                }
            }
        },
    }
}


@router.post("/adapters", status_code=201, openapi_extra=UPLOAD_BODY)
async def upload(request: Request, adapters: Adapters) -> AdapterInfo:
    """Upload a PEFT adapter. 201 means that it is checked, complete and safe on disk."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequestError("send the adapter as multipart/form-data", code="not_multipart")
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=64 << 10)
    except HTTPException as error:
        message = f"the multipart body is malformed: {error.detail}"
        raise InvalidRequestError(message, code="multipart_invalid") from None
    try:
        name = form.get("name")
        if not isinstance(name, str):
            raise InvalidRequestError("the form needs a `name`", code="missing_field", param="name")
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        record = await asyncio.to_thread(_publish, adapters, name, files)
    finally:
        await form.close()
    return _info(adapters, record)


@router.get("/adapters")
async def list_adapters(adapters: Adapters) -> AdapterList:
    """All adapters, by name."""
    return AdapterList(adapters=[AdapterInfo.of(r, adapters.residency(r)) for r in adapters.records()])


@router.get("/adapters/{name}")
async def show(name: str, adapters: Adapters) -> AdapterInfo:
    """One adapter."""
    return _info(adapters, adapters.get(name))


@router.delete("/adapters/{name}")
async def delete(name: str, adapters: Adapters) -> AdapterInfo:
    """Delete an adapter: new requests for it get 404 at once, running ones finish."""
    record = await asyncio.to_thread(adapters.delete, name)
    return _info(adapters, record)


def _info(adapters: AdapterService, record: AdapterRecord) -> AdapterInfo:
    return AdapterInfo.of(record, adapters.residency(record))


def _publish(adapters: AdapterService, name: str, files: list[UploadFile]) -> AdapterRecord:
    """On a worker thread: the two files by their names, or one archive."""
    by_name: dict[str, BinaryIO] = {}
    for file in files:
        file_name = file.filename or ""
        if file_name in by_name:
            raise InvalidRequestError(f"two files are called {file_name[:80]!r}", code="multipart_invalid")
        by_name[file_name] = file.file
    if set(by_name) == {CONFIG_NAME, WEIGHTS_NAME}:
        return adapters.upload_files(name, by_name[CONFIG_NAME], by_name[WEIGHTS_NAME])
    pickled = next((n for n in by_name if n.lower().endswith(PICKLE_SUFFIXES)), None)
    if pickled is not None:
        raise InvalidAdapterError(
            "pickle files can run code and are not read; save the adapter with `safe_serialization=True`",
            code="adapter_pickle",
        )
    if len(by_name) == 1 and not set(by_name) & {CONFIG_NAME, WEIGHTS_NAME}:
        return adapters.upload_archive(name, next(iter(by_name.values())))
    raise InvalidAdapterError(
        f"send {CONFIG_NAME} and {WEIGHTS_NAME}, or one archive of the folder", code="adapter_files_missing"
    )
