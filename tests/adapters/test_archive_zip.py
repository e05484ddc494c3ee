"""Zips that were changed by hand, because no library would write them so."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from server.adapters.archive import ArchiveLimits, read_adapter_archive
from server.errors import InvalidAdapterError
from tests.adapters.archives import CONFIG, FILES, PLAIN, WEIGHTS, entries, read, refused, zipped


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def test_a_zip_written_to_a_pipe(target: Path) -> None:
    """Such a zip has its sizes behind the members."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in PLAIN:
            archive.writestr(name, data)
    assert read(pipe.data, target) == FILES


@pytest.mark.parametrize("mode", [0o120777, 0o010644, 0o020644, 0o060644, 0o140644])
def test_zip_members_that_are_no_files(mode: int, target: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in PLAIN:
            archive.writestr(name, data)
        info = zipfile.ZipInfo("x")
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    assert refused(out.getvalue(), target).code == "archive_unsafe"


def test_modes_are_not_taken_over(target: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in PLAIN:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o106777 << 16
            archive.writestr(info, data)
    read(out.getvalue(), target)
    assert all(not path.stat().st_mode & 0o7111 for path in target.iterdir())


def zip_at(data: bytes, magic: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite a field of the last record that begins with `magic`."""
    at = data.rindex(magic) + offset
    return data[:at] + value + data[at + len(value) :]


LOCAL, DIRECTORY, END_RECORD = b"PK\3\4", b"PK\1\2", b"PK\5\6"
ZIP = zipped(entries(readme=b"x" * 100), zipfile.ZIP_STORED)


def overlapping_zip() -> bytes:
    """Two members over the same bytes."""
    one = zipped([(CONFIG, b"{}")])
    start = one.index(DIRECTORY)
    entry, end = one[start : one.index(END_RECORD)], one[one.index(END_RECORD) :]
    end = end[:8] + struct.pack("<HHL", 2, 2, 2 * len(entry)) + end[16:]
    return one[:start] + entry * 2 + end


def hidden_directory_zip(num_entries: int) -> bytes:
    """The end record says one entry, the zip64 record, which the library prefers, says very many."""
    entry = DIRECTORY + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * num_entries
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, num_entries, num_entries, len(directory), 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1)
    return LOCAL + directory[4:] + record + locator + struct.pack("<4s4H2LH", END_RECORD, 0, 0, 1, 1, 47, 0, 0)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(zip_at(ZIP, DIRECTORY, 8, b"\1\0"), "archive_invalid", id="encrypted"),
        pytest.param(zip_at(ZIP, DIRECTORY, 8, b"\x20\0"), "archive_invalid", id="patched data"),
        pytest.param(zip_at(ZIP, DIRECTORY, 10, b"\x63\0"), "archive_invalid", id="method 99"),
        pytest.param(zip_at(ZIP, DIRECTORY, 10, b"\1\0"), "archive_invalid", id="method shrink"),
        pytest.param(zipped(PLAIN, zipfile.ZIP_BZIP2), "archive_invalid", id="bzip2"),
        pytest.param(zipped(PLAIN, zipfile.ZIP_LZMA), "archive_invalid", id="lzma"),
        pytest.param(zip_at(ZIP, DIRECTORY, 6, b"\xff\0"), "archive_invalid", id="version"),
        pytest.param(zip_at(ZIP, DIRECTORY, 42, b"\xff\xff\xff\x7f"), "archive_invalid", id="offset past the end"),
        pytest.param(zip_at(ZIP, DIRECTORY, 42, bytes(4)), "archive_invalid", id="offset of another member"),
        pytest.param(zip_at(ZIP, DIRECTORY, 28, b"\3\0"), "archive_invalid", id="name length"),
        pytest.param(zip_at(ZIP, DIRECTORY, 46, b"xeadme"), "archive_invalid", id="two names"),
        pytest.param(zip_at(ZIP, END_RECORD, 16, b"\xff\xff\xff\x7f"), "archive_invalid", id="directory offset"),
        pytest.param(zip_at(ZIP, END_RECORD, 12, b"\xff\xff\xff\x7f"), "archive_invalid", id="directory size"),
        pytest.param(zip_at(ZIP, END_RECORD, 20, b"\xff\xff"), "archive_invalid", id="comment length"),
        pytest.param(zip_at(ZIP, LOCAL, 26, b"\xff\xff"), "archive_invalid", id="local name length"),
        pytest.param(zip_at(ZIP, LOCAL, 0, b"XXXX"), "archive_invalid", id="local magic"),
        pytest.param(ZIP.replace(FILES[CONFIG], b'{"r": 9}'), "archive_invalid", id="CRC of the config"),
        pytest.param(ZIP.replace(b"\x80\x81", b"\x80\x80", 1), "archive_invalid", id="CRC of the weights"),
        pytest.param(ZIP + b"x", "archive_invalid", id="trailing byte"),
        pytest.param(b"PK" + ZIP, "archive_invalid", id="leading bytes"),
        pytest.param(ZIP + ZIP, "archive_invalid", id="two archives"),
        pytest.param(ZIP[:-22] + zipped(PLAIN), "archive_invalid", id="two end records"),
        pytest.param(b"PK\3\4", "archive_invalid", id="only a magic"),
        pytest.param(overlapping_zip(), "archive_invalid", id="overlap"),
        pytest.param(hidden_directory_zip(100_000), "too_large", id="hidden directory"),
        pytest.param(zipped([*PLAIN, ("a#b", b"")]).replace(b"a#b", b"a\0b"), "archive_unsafe", id="NUL in a name"),
    ],
)
def test_hostile_zips(data: bytes, code: str, target: Path) -> None:
    tracemalloc.start()
    try:
        assert refused(data, target).code == code
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_hostile_zip_in_a_real_file(tmp_path: Path, target: Path) -> None:
    """Whose seeks fail otherwise than those of bytes in memory."""
    for number, data in enumerate((b"PK", zip_at(ZIP, END_RECORD, 16, b"\xff" * 4), hidden_directory_zip(1)[50:])):
        (tmp_path / "upload").write_bytes(data)
        target = tmp_path / str(number)
        target.mkdir()
        with (tmp_path / "upload").open("rb") as file, pytest.raises(InvalidAdapterError):
            read_adapter_archive(file, target, ArchiveLimits())


def test_declared_sizes_are_not_believed(tmp_path: Path) -> None:
    small = zipped([(CONFIG, b"{}"), (WEIGHTS, bytes(3 << 20))])
    lying = zip_at(small, DIRECTORY, 24, struct.pack("<L", 100))
    assert refused(lying, tmp_path / "less").code == "archive_invalid"
    lying = zip_at(zipped(PLAIN), DIRECTORY, 24, struct.pack("<L", 20_000))
    assert refused(lying, tmp_path / "more").code == "archive_invalid"
