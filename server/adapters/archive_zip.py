"""The members of a zip. The standard library reads it; what it believes too easily is checked here."""

import stat
import struct
import zipfile
from collections.abc import Iterator
from typing import IO, BinaryIO, cast

from server.adapters.archive_source import Budget, Member, Metered, broken, library_errors, unsafe
from server.errors import TooLargeError

__all__ = ["zip_members"]

MAX_DIRECTORY_BYTES = 256 << 10
END_MAGIC = b"PK\x05\x06"
END_BYTES = 22
COMMENT_LENGTH = slice(20, 22)
LOCAL_HEADER_BYTES = 30
DESCRIPTOR_BYTES = 24  # at most, behind a member whose sizes were not known in advance
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the library inflates the others without bounds
ENCRYPTED = 0x1
HAS_DESCRIPTOR = 0x8
REGULAR_TYPES = (0, stat.S_IFREG, stat.S_IFDIR)  # 0: no Unix mode was stored


def zip_members(file: BinaryIO, budget: Budget) -> Iterator[Member]:
    """Walk through a zip; members that nobody reads are not inflated.

    Raises:
        InvalidAdapterError: codes `archive_invalid` and `archive_unsafe`.
        TooLargeError: more bytes than the budget has, or a huge directory.
    """
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], _ShortReads(file)))
    except OSError as error:  # a seek to before the start
        raise broken("its directory is nowhere") from error
    with archive:
        _check_layout(file, archive)
        for info in archive.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in REGULAR_TYPES:
                raise unsafe("links or devices")
            if info.flag_bits & ENCRYPTED or info.compress_type not in METHODS:
                raise broken("a member is encrypted, or compressed by something other than deflate")
            if info.is_dir():
                yield Member(info.orig_filename, None)
                continue
            with archive.open(info) as data:
                yield Member(info.orig_filename, Metered(_Contents(data, info.file_size), budget))


class _ShortReads:
    """The file as the library may see it: it reads a directory of any length in one piece, and a zip64 record may say
    another length than the end record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1, /) -> bytes:
        is_short = 0 <= size <= MAX_DIRECTORY_BYTES
        data = self._file.read(size if is_short else MAX_DIRECTORY_BYTES + 1)
        if len(data) > MAX_DIRECTORY_BYTES:
            raise TooLargeError("the archive's directory is too large")
        return data


class _Contents:
    """A member's contents: all of them, or an error."""

    def __init__(self, data: IO[bytes], num_bytes: int) -> None:
        self._data = data
        self._left = num_bytes

    def read(self, size: int, /) -> bytes:
        with library_errors():
            piece = self._data.read(size)
        self._left -= len(piece)
        if not piece and self._left:
            raise broken("a member is shorter than it says")
        return piece


def _check_layout(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """The members tile the file from its first byte to the directory, and the end record is at its end.

    So no two members share bytes, and no second directory hides where another program would find it.
    """
    position = slack = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if not position <= info.header_offset <= position + slack:
            raise broken("members overlap or leave gaps")
        file.seek(info.header_offset)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(LOCAL_HEADER_BYTES)[26:])
        position = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes + info.compress_size
        slack = DESCRIPTOR_BYTES if info.flag_bits & HAS_DESCRIPTOR else 0
    if not position <= archive.start_dir <= position + slack:
        raise broken("members overlap or leave gaps")
    file.seek(max(file.seek(0, 2) - END_BYTES - len(archive.comment), 0))
    end = file.read(END_BYTES)
    if not end.startswith(END_MAGIC) or end[COMMENT_LENGTH] != len(archive.comment).to_bytes(2, "little"):
        raise broken("its end record is not at its end")
