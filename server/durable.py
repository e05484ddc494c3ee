"""The few steps that make a file survive a crash, each in one place.

The order that is safe against power loss: write the file, fsync it, rename it into place, fsync the folder it went to.
Only then may anybody be told that it is there. A step that fails is never tried again on the same file: after a failed
fsync the kernel may call pages clean that never reached the disk.
"""

import errno
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from server.errors import StorageFullError, TooLargeError, UnavailableError

__all__ = [
    "CHUNK_BYTES",
    "ByteSource",
    "copy_stream",
    "rename",
    "storage_errors",
    "sync_file",
    "sync_folder",
    "write_file",
]

P = ParamSpec("P")
R = TypeVar("R")

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
CHUNK_BYTES = 1 << 20


class ByteSource(Protocol):
    """Anything that bytes can be read from, up to `size` at a time; none at the end."""

    def read(self, size: int, /) -> bytes: ...


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn the operating system's refusals into typed errors, without paths in their messages.

    Raises:
        StorageFullError: there is no space left.
        UnavailableError: code `storage_unavailable`, anything else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFullError("there is no space left for adapters") from error
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise UnavailableError(f"the adapter store cannot be used: {reason}", code="storage_unavailable") from error


def _step(function: Callable[P, R]) -> Callable[P, R]:
    """One step on the disk, with typed errors. Whatever is to happen at every step belongs here."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with storage_errors():
            return function(*args, **kwargs)

    return run


@_step
def write_file(path: Path, data: bytes) -> None:
    """Write a new file whose contents are on the disk when this returns; its name is not yet."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@_step
def sync_file(path: Path) -> None:
    """Force a file's contents to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@_step
def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk: what was renamed or created in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@_step
def rename(source: Path, target: Path) -> None:
    """Move a file or folder within one file system in one step, replacing a file of that name."""
    os.replace(source, target)


@_step
def copy_stream(source: ByteSource, target: Path, max_bytes: int) -> int:
    """Copy a stream into a new file, which is not on the disk yet; returns its size.

    Raises:
        TooLargeError: there are more than `max_bytes`.
        StorageFullError, UnavailableError: the file cannot be written.
    """
    num_bytes = 0
    with target.open("xb") as file:
        while chunk := source.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise TooLargeError(f"{target.name} may have {max_bytes} bytes at most")
            file.write(chunk)
    return num_bytes
