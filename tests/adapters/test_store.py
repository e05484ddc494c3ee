"""The store: files, names, generations and holds."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core import checkpoint
from lora_core import config as lora_config
from server.adapters.objects import digest_of
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore
from server.errors import InvalidRequestError, NotFoundError, UnavailableError
from tests.adapters.stores import objects, opened, put, read, weights_of


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


# Holds


def test_a_hold_outlives_delete_and_replace(store: AdapterStore, tmp_path: Path) -> None:
    digest = put(store, "a", "one").digest
    store.hold(digest)
    store.hold(digest)
    put(store, "a", "two")
    assert store.delete("a").digests > {digest}
    store.release(digest)
    assert read(store, digest)[1] == b"one"
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


@pytest.mark.parametrize("layout", ["1\n", "3\n", "", "\xff"])
def test_a_folder_of_another_layout_is_refused(tmp_path: Path, layout: str) -> None:
    put(opened(tmp_path), "a", "one")
    (tmp_path / "layout").write_text(layout, encoding="latin-1")
    with pytest.raises(UnavailableError) as caught:
        opened(tmp_path)
    assert caught.value.code == "store_layout_unknown"
    assert objects(tmp_path), "nothing was touched"


def test_a_folder_from_before_layouts_were_marked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names").mkdir()
    (tmp_path / "objects" / "x").mkdir(parents=True)
    with pytest.raises(UnavailableError, match="layout '1'"):
        opened(tmp_path)
    assert objects(tmp_path) == {"x"}
