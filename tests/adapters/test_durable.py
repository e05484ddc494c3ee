"""The steps on the disk: their order, and what their failures become."""

import errno
import io
import os
from pathlib import Path

import pytest

from server.durable import copy_stream, storage_errors, sync_file, sync_folder, write_file
from server.errors import StorageFullError, TooLargeError, UnavailableError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_apart(number: int) -> None:
    with pytest.raises(StorageFullError) as caught, storage_errors():
        raise OSError(number, os.strerror(number), "/secret/path")
    assert caught.value.retry_after_s is not None
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.EACCES, errno.ENOENT])
def test_other_failures_are_unavailable(number: int) -> None:
    with pytest.raises(UnavailableError) as caught, storage_errors():
        raise OSError(number, os.strerror(number), "/secret/path")
    assert caught.value.code == "storage_unavailable"
    assert "secret" not in caught.value.message


def test_an_error_without_a_number_is_unavailable() -> None:
    with pytest.raises(UnavailableError), storage_errors():
        raise OSError("odd")


def test_write_file_fsyncs_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced_bytes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced_bytes.append(os.fstat(fd).st_size))
    write_file(tmp_path / "a", b"contents")
    assert synced_bytes == [len(b"contents")]
    assert (tmp_path / "a").read_bytes() == b"contents"


def test_write_file_never_overwrites(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    with pytest.raises(UnavailableError):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_failed_fsync_leaves_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    (tmp_path / "a").write_bytes(b"x")
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "fsync", fail)
    for step in (lambda: sync_file(tmp_path / "a"), lambda: sync_folder(tmp_path)):
        with pytest.raises(UnavailableError):
            step()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_copy_stream_stops_at_its_limit(tmp_path: Path) -> None:
    assert copy_stream(io.BytesIO(b"x" * 10), tmp_path / "a", 10) == 10
    with pytest.raises(TooLargeError, match="10 bytes"):
        copy_stream(io.BytesIO(b"x" * 11), tmp_path / "b", 10)
