"""Archives for the tests of their reader, built with the libraries."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from server.adapters.archive import ArchiveLimits, read_adapter_archive
from server.errors import InvalidAdapterError, ServerError, TooLargeError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = {CONFIG: b'{"r": 8}', WEIGHTS: bytes(range(256)) * 40}

Entries = list[tuple[str, bytes]]
PLAIN: Entries = list(FILES.items())


def entries(folder: str = "", **extra: bytes) -> Entries:
    return [(folder + name, data) for name, data in PLAIN] + list(extra.items())


def zipped(members: Entries, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def tarred(members: Entries, format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def gzipped(members: Entries) -> bytes:
    return gzip.compress(tarred(members))


BUILDERS = {"zip": zipped, "tar": tarred, "tar.gz": gzipped}


def read(data: bytes, target: Path, limits: ArchiveLimits | None = None) -> dict[str, bytes]:
    target.mkdir()
    read_adapter_archive(io.BytesIO(data), target, limits or ArchiveLimits())
    return {path.name: path.read_bytes() for path in target.iterdir()}


def refused(data: bytes, target: Path, limits: ArchiveLimits | None = None) -> ServerError:
    with pytest.raises((InvalidAdapterError, TooLargeError)) as caught:
        read(data, target, limits)
    assert not os.listdir(target), "something was left behind"
    assert str(target) not in caught.value.message
    return caught.value
