"""Fetching an adapter's files from an S3-compatible object store.

Endpoint, region and credentials are those of the environment (`AWS_*`, as every client of AWS reads them), never of a
request. boto3 is optional: the extra `s3`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.adapters.objects import FILE_NAMES, INITIAL_NAME, PICKLE_NAME, WEIGHTS_NAME
from server.durable import copy_stream
from server.errors import InvalidRequestError, NotFoundError, UnavailableError

__all__ = ["fetch_from_s3"]

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
NOT_SHOWN = frozenset({"403", "404", "AccessDenied", "NoSuchBucket", "NoSuchKey"})
CONNECT_S, READ_S, MAX_ATTEMPTS = 10, 60, 3


def fetch_from_s3(url: str, folder: Path, max_bytes: Mapping[str, int]) -> dict[str, str]:
    """Copy the files of an adapter below `s3://bucket/prefix` into `folder`, and those of its `initial/`, if any.

    Args:
        max_bytes: of each file, by its name.

    Returns:
        The ETag of each object by its name below the prefix.

    Raises:
        NotFoundError: code `source_not_found`, there are none, or they are not shown.
        TooLargeError: a file has more bytes than it may.
        UnavailableError: code `source_unavailable`, the store does not answer, or wants other credentials.
        InvalidRequestError: code `not_supported`, boto3 is not installed.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    root = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
    etags: dict[str, str] = {}
    with _typed_errors():
        client = _client()
        names = [f"{part}{name}" for part in ("", f"{INITIAL_NAME}/") for name in FILE_NAMES]
        listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{root}adapter_").get("Contents", [])
        initial = client.list_objects_v2(Bucket=bucket, Prefix=f"{root}{INITIAL_NAME}/adapter_").get("Contents", [])
        found = {entry["Key"].removeprefix(root) for entry in [*listed, *initial]}
        for name in [name for name in names if name in found]:
            answer = client.get_object(Bucket=bucket, Key=root + name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with answer["Body"] as body:
                copy_stream(body, folder / name, max_bytes[Path(name).name])
            etags[name] = str(answer["ETag"]).strip('"')
    if WEIGHTS_NAME not in found and PICKLE_NAME in found:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PICKLE_NAME).touch()  # refused by its name, as it is in a folder
    elif not set(FILE_NAMES) <= found:
        raise NotFoundError("the object store has no adapter under this prefix", code="source_not_found")
    return etags


def _client() -> Any:
    try:
        import boto3  # noqa: PLC0415 - optional
        from botocore.config import Config  # noqa: PLC0415 - optional
    except ImportError as error:
        raise InvalidRequestError(
            "an object store needs boto3: pip install 'loramux[s3]'", code="not_supported", param="url"
        ) from error
    # Stores other than AWS's own seldom have a name for every bucket.
    style = "path" if any(os.environ.get(name) for name in ENDPOINTS) else "auto"
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"total_max_attempts": MAX_ATTEMPTS, "mode": "standard"},
        s3={"addressing_style": style},
    )
    return boto3.client("s3", config=config)


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # botocore's own classes are not at hand without it.
        if not type(error).__module__.startswith(("botocore.", "boto3.", "s3transfer.")):
            raise
        answer: Any = getattr(error, "response", None) or {}
        if answer.get("Error", {}).get("Code") in NOT_SHOWN:
            raise NotFoundError(
                "the object store has no such bucket or object, or does not show it", code="source_not_found"
            ) from error
        raise UnavailableError(
            "the object store does not answer, or wants other credentials", code="source_unavailable"
        ) from error
