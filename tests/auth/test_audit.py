"""The audit log: appended, on the disk, sound after a crash."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from server.auth.audit import AuditLog
from server.errors import StorageFullError, UnavailableError


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or real(descriptor))
    path = tmp_path / "logs" / "audit.jsonl"
    for number in range(3):
        log = AuditLog(path)
        log.open()
        num_synced = len(synced)
        log.write({"event": "begun", "number": number, "path": "x\ny\u2028"})
        assert len(synced) == num_synced + 1
        log.close()
        log.close()
    assert [line["number"] for line in lines(path)] == [0, 1, 2]
    assert lines(path)[0]["time"].endswith("+00:00")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UnavailableError):
        log.write({})


def test_a_line_that_a_crash_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"number": 0}\n{"numb')
    log = AuditLog(path)
    log.open()
    log.write({"number": 1})
    log.write({"number": 2})
    log.close()
    texts = path.read_text().splitlines()
    assert [json.loads(texts[i])["number"] for i in (0, 2, 3)] == [0, 1, 2]


def test_a_full_disk_is_told_and_spoils_no_other_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.open()
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:9]))
        with pytest.raises(StorageFullError):
            log.write({"number": 1})
    log.write({"number": 2})
    log.close()
    assert json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[-1])["number"] == 2
