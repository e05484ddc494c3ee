"""The store: files, names, generations and holds."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core import checkpoint
from lora_core import config as lora_config
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore, digest_of
from server.errors import InvalidRequestError, NotFoundError, UnavailableError
from tests.adapters.stores import objects, opened, put, weights_of


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return opened(tmp_path)


def test_the_file_names_are_those_of_peft() -> None:
    assert CONFIG_NAME == lora_config.CONFIG_NAME
    assert WEIGHTS_NAME == checkpoint.WEIGHTS_NAME


def test_the_store_needs_no_torch() -> None:
    code = "import sys, server.adapters.store, server.adapters.archive; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_object_is_a_plain_folder_under_its_digest(store: AdapterStore, tmp_path: Path) -> None:
    record = put(store, "a", "one")
    folder = tmp_path / "objects" / record.digest
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]
    halves = hashlib.sha256(b"{}").digest() + hashlib.sha256(b"one").digest()
    assert record.digest == digest_of(folder) == hashlib.sha256(halves).hexdigest()
    assert record.num_bytes == 5


def test_a_record_is_the_same_after_reopening(store: AdapterStore, tmp_path: Path) -> None:
    record = put(store, "a", "one", rank=8, modules=("q", "v"))
    assert record.details == {"rank": 8, "modules": ["q", "v"]}
    assert opened(tmp_path).get("a") == record == store.get("a")


def test_records_are_sorted_and_hide_deleted_names(store: AdapterStore) -> None:
    for name in ("b", "c", "a"):
        put(store, name, name)
    store.delete("b")
    assert [record.name for record in store.records()] == ["a", "c"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "a/b", "../a", "a" * 129, "a\n", "é", "a b", "a\0", "\ud800", "_a", "a\\b"]
)
def test_names_that_cannot_be(store: AdapterStore, name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        put(store, name, "one")
    assert (caught.value.code, caught.value.param) == ("adapter_name_invalid", "name")
    with pytest.raises(NotFoundError):
        store.get(name)
    store.check_integrity()


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "a" * 128, "a..b", "a.json", "CON"])
def test_names_that_can_be(store: AdapterStore, tmp_path: Path, name: str) -> None:
    put(store, name, "one")
    assert weights_of(opened(tmp_path), name) == "one"


def test_an_unknown_name_is_named(store: AdapterStore) -> None:
    with pytest.raises(NotFoundError, match="'lost'") as caught:
        store.get("lost")
    assert caught.value.code == "adapter_not_found"
    with pytest.raises(NotFoundError):
        store.delete("lost")


# Generations


def test_generations_count_up_across_deletes_and_starts(store: AdapterStore, tmp_path: Path) -> None:
    assert put(store, "a", "one").generation == 1
    assert put(store, "a", "two").generation == 2
    assert store.delete("a").generation == 2
    assert not store.records()
    assert store.has_history("a")
    store = opened(tmp_path)
    assert put(store, "a", "two").generation == 3
    store.check_integrity()


def test_identical_contents_are_the_same_generation(store: AdapterStore, tmp_path: Path) -> None:
    first = put(store, "a", "one", note="first")
    assert put(store, "a", "one", note="second") == first
    other = put(store, "b", "one")
    assert (other.digest, other.generation) == (first.digest, 1)
    store.delete("a")
    assert weights_of(store, "b") == "one"
    store.delete("b")
    assert not objects(tmp_path)


def test_a_replaced_object_goes(store: AdapterStore, tmp_path: Path) -> None:
    put(store, "a", "one")
    record = put(store, "a", "two")
    assert objects(tmp_path) == {record.digest}


# Holds


def test_a_hold_outlives_delete_and_replace(store: AdapterStore, tmp_path: Path) -> None:
    digest = put(store, "a", "one").digest
    store.hold(digest)
    store.hold(digest)
    put(store, "a", "two")
    store.delete("a")
    store.release(digest)
    assert store.read(digest)[1] == b"one"
    store.release(digest)
    assert not objects(tmp_path)
    with pytest.raises(NotFoundError):
        store.hold(digest)
    with pytest.raises(AssertionError):
        store.release(digest)
    store.check_integrity()


def test_held_bytes_can_be_named_again(store: AdapterStore) -> None:
    digest = put(store, "a", "one").digest
    store.hold(digest)
    store.delete("a")
    put(store, "b", "one")
    store.release(digest)
    assert weights_of(store, "b") == "one"
    store.check_integrity()


def test_two_processes_cannot_use_one_store(tmp_path: Path) -> None:
    first = opened(tmp_path)
    second = AdapterStore(tmp_path)
    with pytest.raises(UnavailableError) as caught:
        second.open()
    assert caught.value.code == "store_in_use"
    first.close()
    first.close()
    second.open()
    second.close()
