"""What archives of every kind are read through: streams that end at the limits, and typed errors."""

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from server.durable import ByteSource
from server.errors import InvalidAdapterError, TooLargeError

__all__ = [
    "CHUNK_BYTES",
    "ArchiveLimits",
    "Budget",
    "Gunzip",
    "Member",
    "Metered",
    "broken",
    "library_errors",
    "unsafe",
]

CHUNK_BYTES = 64 << 10
RATIO_GRACE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an upload may contain; bytes are counted as they are read.

    Attributes:
        max_inflated_bytes: of everything that has to be inflated.
        max_ratio: inflated bytes to bytes of the archive, from 1 MiB inflated on.
    """

    max_members: int = 16
    max_config_bytes: int = 256 << 10
    max_weights_bytes: int = 512 << 20
    max_inflated_bytes: int = 1 << 30
    max_ratio: int = 100


class Member(NamedTuple):
    """One entry of an archive; `data` is None for a folder, and is to be read before the next member is asked for."""

    name: str
    data: ByteSource | None


class Budget:
    """The bytes that an archive may still inflate to, whatever sizes it declares."""

    def __init__(self, limits: ArchiveLimits, archive_bytes: int) -> None:
        by_ratio = max(archive_bytes * limits.max_ratio, RATIO_GRACE_BYTES)
        self._left = min(limits.max_inflated_bytes, by_ratio)

    def spend(self, num_bytes: int) -> None:
        """Raises TooLargeError when nothing is left."""
        self._left -= num_bytes
        if self._left < 0:
            raise TooLargeError("the archive inflates to more than is allowed")


class Metered:
    """A source that is read in small pieces, each of them paid for."""

    def __init__(self, source: ByteSource, budget: Budget) -> None:
        self._source = source
        self._budget = budget

    def read(self, size: int, /) -> bytes:
        data = self._source.read(min(size, CHUNK_BYTES))
        self._budget.spend(len(data))
        return data


class Gunzip:
    """The contents of a gzip file of one stream; its end is reached only if the checksum is right."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)

    def read(self, size: int, /) -> bytes:
        with library_errors():
            while not self._inflater.eof:
                data = self._inflater.unconsumed_tail or self._file.read(CHUNK_BYTES)
                piece = self._inflater.decompress(data, size)
                if piece:
                    return piece
                if not data:
                    raise broken("it is cut off")
        if self._inflater.unused_data or self._file.read(1):
            raise broken("something follows its end")
        return b""


@contextmanager
def library_errors() -> Iterator[None]:
    """Everything that the standard library's readers raise on hostile input becomes an `archive_invalid`."""
    try:
        yield
    except (
        zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
        ValueError, OverflowError, LookupError,
    ) as error:  # fmt: skip
        raise broken(type(error).__name__) from error


def broken(what: str) -> InvalidAdapterError:
    """An archive that is none, or not a whole one."""
    return InvalidAdapterError(f"the archive is broken: {what}", code="archive_invalid")


def unsafe(what: str) -> InvalidAdapterError:
    """An archive with something in it that no adapter has."""
    return InvalidAdapterError(f"the archive holds {what}", code="archive_unsafe")
