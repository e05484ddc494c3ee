"""Tars whose headers were made by hand, because no library would."""

import gzip
import os
import random
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from server.errors import InvalidAdapterError, TooLargeError
from tests.adapters.archives import (
    CONFIG,
    FILES,
    PLAIN,
    entries,
    read,
    refused,
    tarred,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def block(name: bytes, data: bytes = b"", kind: bytes = b"0", size: bytes | None = None, link: bytes = b"") -> bytes:
    """One tar member, with anything in its fields."""
    header = bytearray(512)
    header[0 : len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = size if size is not None else b"%011o\0" % len(data)
    header[136:148] = b"00000000000\0"
    header[156:157] = kind
    header[157 : 157 + len(link)] = link
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def base256(number: int) -> bytes:
    return b"\xff" + (number + (1 << 88)).to_bytes(11, "big") if number < 0 else b"\x80" + number.to_bytes(11, "big")


def pax(**records: str) -> bytes:
    out = b""
    for key, value in records.items():
        tail = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(tail) + 1
        while len(str(length)) + len(tail) != length:
            length += 1
        out += str(length).encode() + tail
    return out


GOOD_BLOCKS = b"".join(block(name.encode(), data) for name, data in PLAIN)
END = bytes(1024)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats(format: int, target: Path) -> None:  # noqa: A002
    assert read(tarred(entries("f" * 98 + "/"), format), target) == FILES


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"7", b"S", b"D", b"M", b"V", b"N", b"K", b"X", b"Z"])
def test_tar_members_that_are_no_files(kind: bytes, target: Path) -> None:
    for number, name in enumerate((b"x", CONFIG.encode())):
        data = block(name, kind=kind, link=b"/etc/passwd") + GOOD_BLOCKS + END
        assert refused(data, target.with_name(str(number))).code == "archive_unsafe"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(block(b"x", size=base256(-512)) + GOOD_BLOCKS + END, "archive_invalid", id="negative size"),
        pytest.param(block(b"x", size=base256(-1)) + bytes(16 << 20), "archive_invalid", id="size -1"),
        pytest.param(GOOD_BLOCKS + block(b"x", size=base256(-1024)) + END, "archive_invalid", id="loop"),
        pytest.param(block(b"x", kind=b"L", size=base256(-512)) + END, "archive_invalid", id="negative long name"),
        pytest.param(block(b"x", kind=b"x", size=base256(-512)) + END, "archive_invalid", id="negative pax"),
        pytest.param(block(b"x", kind=b"5", size=base256(512)) + END, "archive_invalid", id="folder with a size"),
        pytest.param(block(b"x", size=base256(1 << 80)) + END, "archive_invalid", id="huge size"),
        pytest.param(block(b"x", size=b"zzzzzzzzzzz\0") + END, "archive_invalid", id="size no number"),
        pytest.param(block(b"L", kind=b"L", size=base256(1 << 40)) + END, "too_large", id="huge long name"),
        pytest.param(block(b"x", b"a" * 70_000, kind=b"x") + END, "too_large", id="huge pax"),
        pytest.param(block(b"x", pax(size="-512"), b"x") + GOOD_BLOCKS + END, "too_large", id="pax size"),
        pytest.param(block(b"x", pax(path="../x"), b"x") + GOOD_BLOCKS + END, "archive_unsafe", id="pax traversal"),
        pytest.param(block(b"x", pax(path="x\0y"), b"x") + GOOD_BLOCKS + END, "archive_unsafe", id="pax NUL"),
        pytest.param(block(b"x", pax(path="x"), b"g") + GOOD_BLOCKS + END, "archive_unsafe", id="global path"),
        pytest.param(
            block(b"x", pax(GNU__sparse__major="1"), b"x") + GOOD_BLOCKS + END, "archive_unsafe", id="pax sparse"
        ),
        pytest.param(block(b"x", b"9 path=x\n", b"x") + GOOD_BLOCKS + END, "adapter_files_missing", id="pax renames"),
        pytest.param(block(b"x", b"99 path=x\n", b"x") + GOOD_BLOCKS + END, "archive_invalid", id="pax length"),
        pytest.param(block(b"x", b"0 path=x\n", b"x") + GOOD_BLOCKS + END, "archive_invalid", id="pax length 0"),
        pytest.param(block(b"x", b"7 path=x\n", b"x") + GOOD_BLOCKS + END, "archive_invalid", id="pax short"),
        pytest.param(block(b"x", b"rubbish", b"x") + GOOD_BLOCKS + END, "archive_invalid", id="pax rubbish"),
        pytest.param(block(b"x", b"/etc/x\0", b"L") + GOOD_BLOCKS + END, "archive_unsafe", id="long name absolute"),
        pytest.param(block(b"x", b"a\0b\0", b"L") + GOOD_BLOCKS + END, "archive_unsafe", id="long name NUL"),
        pytest.param(block(b"a\0../b") + GOOD_BLOCKS + END, "archive_unsafe", id="NUL in a short name"),
        pytest.param(GOOD_BLOCKS, "archive_invalid", id="no end"),
        pytest.param(GOOD_BLOCKS + bytes(512) + GOOD_BLOCKS + END, "archive_invalid", id="two archives"),
        pytest.param(GOOD_BLOCKS + END + b"x", "archive_invalid", id="trailing byte"),
        pytest.param(GOOD_BLOCKS + b"x" * 512 + END, "archive_invalid", id="rubbish header"),
        pytest.param(GOOD_BLOCKS + block(b"x", b"y")[:-600] + END, "archive_invalid", id="bad checksum"),
        pytest.param(
            b"".join(block(b"x", pax(comment="y"), b"x") for _ in range(200)) + GOOD_BLOCKS + END,
            "too_large",
            id="endless extended headers",
        ),
        pytest.param(
            block(b"s", kind=b"S") + bytes(512) + block(b"L", kind=b"L", size=base256(-512)) + END,
            "archive_unsafe",
            id="sparse before the end",
        ),
    ],
)
def test_hostile_tar_headers(data: bytes, code: str, tmp_path: Path) -> None:
    started = time.monotonic()
    tracemalloc.start()
    try:
        assert refused(data, tmp_path / "tar").code == code
        assert refused(gzip.compress(data), tmp_path / "gzip").code == code
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 5


def test_mutated_tar_headers_with_right_checksums_never_escape(tmp_path: Path) -> None:
    rng = random.Random(3)
    for number in range(600):
        header = bytearray(block(*rng.choice(((b"x", b""), (b"L", b"name\0", b"L"), (b"p", pax(path="x"), b"x")))))
        field = rng.choice((slice(0, 100), slice(124, 136), slice(156, 157), slice(345, 500), slice(512, 540)))
        for at in range(*field.indices(len(header)))[: rng.randrange(1, 12)]:
            header[at] = rng.randrange(256)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        target = tmp_path / str(number)
        try:
            assert read(bytes(header) + GOOD_BLOCKS + END, target) == FILES
        except (InvalidAdapterError, TooLargeError):
            assert not os.listdir(target)
