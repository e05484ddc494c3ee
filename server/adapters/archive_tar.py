"""The members of a tar, read strictly forwards.

The standard library reads the headers. The walk from one to the next is here, because the library's own goes backwards
on negative sizes, takes a broken header for the end, and reads names of any length into memory.
"""

import re
import tarfile
from collections.abc import Iterator

from server.adapters.archive_source import CHUNK_BYTES, Member, broken, unsafe
from server.durable import ByteSource
from server.errors import TooLargeError

__all__ = ["tar_members"]

MAX_EXTENSION_BYTES = 64 << 10
MAX_HEADERS_PER_MEMBER = 4  # a member may be preceded by extended headers
SHORT_NAME_BYTES = 100
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE)
PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=]+)=")


def tar_members(source: ByteSource, max_members: int) -> Iterator[Member]:
    """Walk through a tar; what is left of a member is read over when the next one is asked for.

    Raises:
        InvalidAdapterError: codes `archive_invalid` and `archive_unsafe`.
        TooLargeError: more headers than so many members can have, or huge ones.
    """
    long_name = None
    for _ in range(MAX_HEADERS_PER_MEMBER * (max_members + 1)):
        block = _Part(source, tarfile.BLOCKSIZE).read_all()
        if not block.strip(b"\0"):
            _check_only_zeros(source)
            return
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size < 0 or (header.isdir() and header.size):
            raise broken("a member has a size that none can have")
        data = _Part(source, header.size)
        if header.type in PAX_TYPES or header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = _long_name(header, data) or long_name
        elif header.type in FILE_TYPES or header.isdir():
            # What follows the end of a short name is nobody's; another program might read on.
            if long_name is None and block[:SHORT_NAME_BYTES].partition(b"\0")[2].strip(b"\0"):
                raise unsafe("a member with two names")
            yield Member(long_name or header.name, None if header.isdir() else data)
            long_name = None
        else:
            raise unsafe("links, devices or sparse files")
        data.skip()
        _Part(source, -header.size % tarfile.BLOCKSIZE).skip()
    raise TooLargeError("the archive holds too many headers")


class _Part:
    """The next `num_bytes` of a source: all of them, or an error."""

    def __init__(self, source: ByteSource, num_bytes: int) -> None:
        self._source = source
        self._left = num_bytes

    def read(self, size: int, /) -> bytes:
        data = self._source.read(min(size, self._left)) if self._left else b""
        self._left -= len(data)
        if self._left and not data:
            raise broken("it is cut off")
        return data

    def read_all(self) -> bytes:
        return b"".join(iter(lambda: self.read(CHUNK_BYTES), b""))

    def skip(self) -> None:
        while self.read(CHUNK_BYTES):
            pass


def _check_only_zeros(source: ByteSource) -> None:
    while data := source.read(CHUNK_BYTES):
        if data.strip(b"\0"):
            raise broken("something follows its end")


def _long_name(header: tarfile.TarInfo, data: _Part) -> str | None:
    """The name that an extended header gives to the member after it, if it gives one."""
    if header.size > MAX_EXTENSION_BYTES:
        raise TooLargeError("the archive has too long a header")
    contents = data.read_all()
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return contents.removesuffix(b"\0").decode("utf-8", "surrogateescape")
    records = _pax_records(contents)
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise unsafe("sparse files")
    if header.type == tarfile.XGLTYPE and b"path" in records:
        raise unsafe("one name for many members")
    if b"size" in records:
        raise TooLargeError("the archive holds a member of more than 8 GiB")  # others have their size in the header
    path = records.get(b"path")
    return None if path is None else path.decode("utf-8", "surrogateescape")


def _pax_records(contents: bytes) -> dict[bytes, bytes]:
    """Parse records of the form `<length of the record> <key>=<value>\\n`."""
    records = {}
    position = 0
    while position < len(contents):
        found = PAX_RECORD.match(contents, position)
        end = position + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(contents) or contents[end - 1 : end] != b"\n":
            raise broken("an extended header is malformed")
        records[found[2]] = contents[found.end() : end - 1]
        position = end
    return records
