"""Keys on disk: hashed, durable, shared with other processes."""

import json
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.auth.key_file import REREAD_S, KeyFile
from server.auth.keys import KeyLimits, Scope, find_key, new_key
from server.errors import InvalidRequestError, NotFoundError


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_secret_is_found_by_its_bytes_and_never_kept(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    record, secret = new_key("app", [Scope.GENERATE], tenant="acme", limits=KeyLimits(max_concurrent=3))
    keys.add(record)
    assert keys.find(secret.encode()) == record
    for wrong in (b"", secret[:-1].encode(), secret.encode() + b" ", secret.upper().encode(), b"\xff\xfe", b"x" * 999):
        assert keys.find(wrong) is None
    text = keys.path.read_text()
    assert secret not in text
    assert secret.removeprefix("lmx_") not in text
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    again = KeyFile(keys.path)
    again.load()
    assert again.records() == [record]


def test_secrets_and_ids_are_not_given_twice() -> None:
    made = [new_key("x", [Scope.GENERATE]) for _ in range(100)]
    assert len({secret for _, secret in made}) == len({record.key_id for record, _ in made}) == 100
    assert min(len(secret) for _, secret in made) >= 40


def test_a_key_ends_when_it_is_removed_or_expires(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    now = datetime.now(UTC)
    expired, old = new_key("old", [Scope.GENERATE], expires_at=now - timedelta(seconds=1))
    valid, secret = new_key("new", [Scope.GENERATE], expires_at=now + timedelta(hours=1))
    keys.add(expired)
    keys.add(valid)
    assert keys.find(old.encode()) is None
    assert keys.find(secret.encode()) == valid
    keys.remove(valid.key_id)
    assert keys.find(secret.encode()) is None
    with pytest.raises(NotFoundError):
        keys.remove(valid.key_id)


def test_changes_of_others_are_noticed_and_kept(tmp_path: Path) -> None:
    clock = Clock()
    server = KeyFile(tmp_path / "keys.json", clock)
    first, first_secret = new_key("first", [Scope.ADMIN])
    server.add(first)
    server.load()
    other = KeyFile(server.path)
    second, secret = new_key("second", [Scope.GENERATE])
    assert server.find(secret.encode()) is None
    other.add(second)
    assert server.find(secret.encode()) is None  # looked a moment ago
    clock.now_s += REREAD_S
    assert server.find(secret.encode()) == second
    other.remove(first.key_id)
    third, _ = new_key("third", [Scope.GENERATE])
    server.add(third)  # does not bring the first one back
    assert {record.name for record in server.records()} == {"second", "third"}
    assert server.find(first_secret.encode()) is None


def test_a_file_that_becomes_unreadable_locks_nobody_out(tmp_path: Path) -> None:
    clock = Clock()
    keys = KeyFile(tmp_path / "keys.json", clock)
    record, secret = new_key("app", [Scope.GENERATE])
    keys.add(record)
    keys.path.write_text("{half")
    clock.now_s += REREAD_S
    assert keys.find(secret.encode()) == record
    with pytest.raises(InvalidRequestError):
        keys.add(new_key("other", [Scope.GENERATE])[0])
    assert keys.path.read_text() == "{half"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}x", '{"format": 9, "keys": []}', '{"keys": [{"name": "x"}]}', '{"keys": [], "more": 1}']
)
def test_a_bad_file_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(InvalidRequestError, match="loramux keys create"):
        KeyFile(path).load()
    path.write_text(text)
    with pytest.raises(InvalidRequestError) as refused:
        KeyFile(path).load()
    assert refused.value.code == "keys_invalid"


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def add(number: int) -> None:
        KeyFile(path).add(new_key(str(number), [Scope.GENERATE])[0])

    threads = [threading.Thread(target=add, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text())["keys"]) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


@pytest.mark.parametrize(
    "values",
    [
        {"scopes": []},
        {"tenant": "A"},
        {"tenant": "a~b"},
        {"tenant": "-a"},
        {"tenant": "a" * 33},
        {"tenant": ""},
        {"scopes": [Scope.ADMIN], "tenant": "a"},
        {"scopes": [Scope.ADMIN], "adapters": ["x"]},
        {"adapters": ["a b"]},
        {"expires_at": datetime(2030, 1, 1)},
        {"limits": {"max_concurrent": 0}},
        {"limits": {"weight": 0}},
        {"limits": {"weight": float("nan")}},
    ],
    ids=repr,
)
def test_keys_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        new_key("x", **{"scopes": [Scope.GENERATE]} | values)


def test_a_collision_of_records_is_no_way_in() -> None:
    record, secret = new_key("x", [Scope.GENERATE])
    assert find_key({record.sha256: record}, secret.encode()) is record
    other, _ = new_key("y", [Scope.GENERATE])
    assert find_key({record.sha256: other}, secret.encode()) is None


def test_a_tenant_has_the_highest_weight_of_its_keys(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    for name, tenant, weight in (
        ("x", "a", 2.0),
        ("y", "a", 5.0),
        ("z", "a", None),
        ("u", "b", None),
        ("v", None, 0.5),
    ):
        keys.add(new_key(name, [Scope.GENERATE], tenant=tenant, limits=KeyLimits(weight=weight))[0])
    assert [keys.weight_of(tenant) for tenant in ("a", "b", "", "unknown")] == [5.0, 1.0, 0.5, 1.0]
    heaviest = next(record for record in keys.records() if record.name == "y")
    keys.remove(heaviest.key_id)
    assert keys.weight_of("a") == 2.0
