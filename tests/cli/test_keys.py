"""`loramux keys`, on a file and on a server."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.auth.key_file import KeyFile
from server.auth.keys import Scope
from server.cli import app


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result.stdout


def test_keys_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAMUX_KEYS", raising=False)
    path = tmp_path / "keys.json"
    secret = run("keys", "create", "root", "--scope", "admin", "--file", path).strip()
    keys = KeyFile(path)
    keys.load()
    record = keys.find(secret.encode())
    assert record is not None
    assert record.scopes == {Scope.ADMIN}
    flags = (
        "--scope",
        "generate",
        "--scope",
        "adapters:read",
        "--tenant",
        "acme",
        "--max-concurrent",
        3,
        "--weight",
        2.5,
    )
    made = json.loads(run("keys", "create", "app", *flags, "--expires", "2040-01-01", "--file", path, "--json"))
    assert (made["tenant"], made["limits"]["max_concurrent"]) == ("acme", 3)
    assert made["limits"]["weight"] == 2.5
    assert made["expires_at"].startswith(("2040-01-01", "2039-12-31"))
    listed = json.loads(run("keys", "ls", "--file", path, "--json"))
    assert [key["name"] for key in listed] == ["root", "app"]
    assert not any("sha256" in key or "secret" in key for key in listed)
    assert "adapters:read, generate" in run("keys", "ls", "--file", path)
    run("keys", "revoke", record.key_id, "--file", path)
    run("keys", "revoke", record.key_id, "--file", path, status=3)
    run("keys", "create", "bad", "--scope", "admin", "--tenant", "acme", "--file", path, status=2)
    run("keys", "create", "bad", "--scope", "everything", "--file", path, status=2)
    run("keys", "ls", "--file", tmp_path / "missing", status=1)
    keys.load()
    assert keys.find(secret.encode()) is None
