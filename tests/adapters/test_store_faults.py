"""The store on a bad disk: damaged files, failing steps, no space."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from server.adapters.objects import PIECE_BYTES
from server.adapters.record import decode_history
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore
from server.errors import InvalidAdapterError, StorageFullError, UnavailableError
from tests.adapters.stores import objects, opened, put, read, weights_of


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return opened(tmp_path)


def flip(path: Path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "config", "folder"])
def test_damaged_bytes_are_never_served(store: AdapterStore, tmp_path: Path, damage: str) -> None:
    record = put(store, "a", "one")
    put(store, "b", "other")
    folder = tmp_path / "objects" / record.digest
    {
        "flip": lambda: flip(folder / WEIGHTS_NAME, 0),
        "truncate": lambda: os.truncate(folder / WEIGHTS_NAME, 1),
        "remove": (folder / WEIGHTS_NAME).unlink,
        "config": lambda: flip(folder / CONFIG_NAME, 1),
        "folder": lambda: shutil.rmtree(folder),
    }[damage]()
    for again in (store, opened(tmp_path)):
        with pytest.raises(UnavailableError) as caught:
            read(again, record.digest)
        assert caught.value.code == "adapter_corrupt"
        assert weights_of(again, "b") == "other"
        assert put(again, "c", "third").generation
    assert put(store, "a", "one") == record  # the same upload heals it
    assert weights_of(store, "a") == "one"


def test_who_reads_fails_for_the_files_reason_before_his_own(store: AdapterStore, tmp_path: Path) -> None:
    digest = put(store, "a", "one").digest

    def fail(_: bytes, weights: memoryview) -> None:
        raise InvalidAdapterError(f"{bytes(weights).decode()} is no adapter")

    with pytest.raises(InvalidAdapterError, match="one is no adapter"):
        store.read(digest, fail)
    flip(tmp_path / "objects" / digest / WEIGHTS_NAME, 0)
    with pytest.raises(UnavailableError, match="damaged") as caught:
        store.read(digest, fail)
    assert isinstance(caught.value.__context__, InvalidAdapterError)


@pytest.mark.parametrize("size", [0, PIECE_BYTES - 1, 2 * PIECE_BYTES, 2 * PIECE_BYTES + 5])
def test_large_files_are_read_and_compared_in_pieces(size: int, store: AdapterStore, tmp_path: Path) -> None:
    contents = random.Random(size).randbytes(size).hex()[:size]
    digest = put(store, "a", contents).digest
    assert weights_of(store, "a") == contents
    if size:
        flip(tmp_path / "objects" / digest / WEIGHTS_NAME, size - 1)
        with pytest.raises(UnavailableError, match="damaged"):
            read(store, digest)


def test_a_flip_of_any_bit_of_a_record_is_seen(store: AdapterStore, tmp_path: Path) -> None:
    record = put(store, "a", "one", rank=8)
    history = store.history("a")
    path = tmp_path / "names" / "a.json"
    sound = path.read_bytes()
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        with suppress(ValueError):
            assert decode_history(damaged) == history  # a flip between blank characters changes nothing
    flip(path, sound.index(record.digest.encode()))
    assert not opened(tmp_path).records()
    path.write_bytes(sound)
    assert weights_of(opened(tmp_path), "a") == "one"


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"null", b"[]", b"[" * 100_000, b'{"format": 3}', b"\xff", b"9" * 5000, b'{"name": "b"}']
)
def test_a_damaged_record_stops_nothing_and_loses_nothing(tmp_path: Path, contents: bytes) -> None:
    store = opened(tmp_path)
    put(store, "a", "one")
    lost = put(store, "b", "two").digest
    (tmp_path / "names" / "b.json").write_bytes(contents)
    again = opened(tmp_path)
    assert [record.name for record in again.records()] == ["a"]
    assert lost in objects(tmp_path), "the damaged record may have pointed to it"
    again.check_integrity()
    assert put(again, "b", "new").generation == 1
    last = opened(tmp_path)
    assert lost not in objects(tmp_path)
    last.check_integrity()


def test_a_record_with_sound_checksum_and_odd_fields_is_left_alone(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "a", "one")
    path = tmp_path / "names" / "a.json"
    sound = json.loads(path.read_bytes())
    one = sound["generations"][0]
    changes = [
        {"digest": "../x"}, {"digest": 1}, {"generation": "1"}, {"generation": 0}, {"generation": 2}, {"details": []},
        {"created_at": "now"}, {"labels": None}, {"num_bytes": 1.5}, {"note": {}},
    ]  # fmt: skip
    damaged = [{"generations": [one | change]} for change in changes]
    damaged += [
        {"generations": [one, one]},
        {"generations": {}},
        {"generations": [1]},
        {"current": 2},
        {"current": None},
    ]
    damaged += [{"num_published": 0}, {"is_pinned": 1}, {"name": ["a"]}, {"name": "../a"}]
    for change in damaged:
        values = {key: value for key, value in (sound | change).items() if key != "checksum"}
        checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(values | {"checksum": checksum}))
        assert not opened(tmp_path).records()


def test_fields_of_later_versions_are_read_over(store: AdapterStore, tmp_path: Path) -> None:
    record = put(store, "a", "one")
    path = tmp_path / "names" / "a.json"
    values = json.loads(path.read_bytes()) | {"future": [1, 2]}
    values["generations"][0]["future"] = 1
    del values["checksum"]
    checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values | {"checksum": checksum}))
    assert opened(tmp_path).get("a") == record


def test_open_clears_what_a_crash_left(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "a", "one")
    (tmp_path / "staging" / "half").mkdir()
    (tmp_path / "staging" / "half" / WEIGHTS_NAME).write_bytes(b"x")
    (tmp_path / "staging" / "file").write_bytes(b"x")
    (tmp_path / "objects" / ("0" * 64)).mkdir()
    again = opened(tmp_path)
    again.check_integrity()
    assert weights_of(again, "a") == "one"


def broken_after(n: int, number: int = errno.EIO) -> Callable[[Callable], Callable]:
    """Wraps steps, which share one count: the n-th call fails, without having done anything, and all others work."""
    count = iter(range(1, 1000))

    def wrap(step: Callable) -> Callable:
        def run(*args: object) -> object:
            if next(count) == n:
                raise OSError(number, os.strerror(number))
            return step(*args)

        return run

    return wrap


CHANGES: dict[str, Callable[[AdapterStore], object]] = {
    "publish": lambda store: put(store, "new", "new"),
    "replace": lambda store: put(store, "a", "new"),
    "delete": lambda store: store.delete("a"),
    "share": lambda store: put(store, "new", "old"),
    "rollback": lambda store: store.rollback("a"),
    "promote": lambda store: store.promote("a", 1),
    "drop": lambda store: store.delete_generation("a", 1),
    "label": lambda store: store.annotate("a", None, {"a": "b"}, None),
}


def state(store: AdapterStore) -> dict[str, str]:
    return {record.name: weights_of(store, record.name) for record in store.records()}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("change", CHANGES)
def test_the_nth_step_fails(change: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step it is: the old state is served, the store goes on, and a crash brings back old or new, whole."""
    after = {"publish": {"a": "old", "new": "new"}, "replace": {"a": "new"}, "delete": {}}
    after |= {"share": {"a": "old", "new": "old"}, "rollback": {"a": "first"}, "promote": {"a": "first"}}
    after |= {"drop": {"a": "old"}, "label": {"a": "old"}}
    expected = StorageFullError if number == errno.ENOSPC else UnavailableError
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for n in range(1, 100):
        root = tmp_path / str(n)
        store = opened(root)
        put(store, "a", "first")
        put(store, "a", "old")
        with monkeypatch.context() as patch:
            wrap = broken_after(n, number)
            patch.setattr(os, "fsync", wrap(os.fsync))
            patch.setattr(os, "replace", wrap(os.replace))
            try:
                CHANGES[change](store)
                break
            except expected:
                pass
        assert state(store) == {"a": "old"}
        assert not list((root / "staging").iterdir())
        store.check_integrity()
        crashed = tmp_path / f"{n}-crashed"
        shutil.copytree(root, crashed)
        assert state(opened(crashed)) in ({"a": "old"}, after[change])
        opened(crashed).check_integrity()
        put(store, "a", "old")  # unchanged for the caller; the disk must agree from here on
        assert state(opened(root))["a"] == "old"
        CHANGES[change](store)
        assert state(store) == state(opened(root)) == after[change]
        store.check_integrity()
    assert n > (6 if change in ("publish", "replace", "share") else 2)


def test_a_generation_that_a_crash_may_show_is_not_given_again(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "a", "one")
    real_fsync = os.fsync

    def fail_for_names(fd: int) -> None:
        if os.fstat(fd).st_ino == (tmp_path / "names").stat().st_ino:
            raise OSError(errno.EIO, "broken")
        real_fsync(fd)

    with mock.patch("os.fsync", fail_for_names), pytest.raises(UnavailableError):
        put(store, "a", "two")
    assert opened(tmp_path).get("a").generation == 2
    assert put(store, "a", "three").generation == 3


def test_a_failed_write_of_the_files_is_a_full_disk(tmp_path: Path) -> None:
    """A real limit of the operating system, on the record's file: nothing is left behind."""
    store = opened(tmp_path)
    put(store, "a", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.staging_folder() as folder:
        (folder / CONFIG_NAME).write_bytes(b"{}")
        (folder / WEIGHTS_NAME).write_bytes(b"new")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            with pytest.raises(StorageFullError):
                store.publish("a", folder, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.check_integrity()
    assert state(store) == state(opened(tmp_path)) == {"a": "old"}
    assert put(store, "a", "new").generation == 2


def test_the_free_space_floor_is_checked_before_an_upload(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, min_free_bytes=1 << 62)
    store.open()
    with pytest.raises(StorageFullError), store.staging_folder():
        pass
    assert not list((tmp_path / "staging").iterdir())


def test_staging_is_emptied_when_an_upload_fails(store: AdapterStore, tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), store.staging_folder() as folder:
        (folder / "x").write_bytes(b"x")
        raise ZeroDivisionError
    assert not list((tmp_path / "staging").iterdir())


def test_a_store_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnavailableError) as caught:
        opened(tmp_path / "file" / "store")
    assert str(tmp_path) not in caught.value.message
