"""Generations of a name: immutable, counted, one of them current, each change on condition if wanted."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.adapters.record import split_reference
from server.adapters.store import AdapterStore
from server.errors import ConflictError, InvalidRequestError, NotFoundError
from tests.adapters.stores import objects, opened, publish, put, weights_of


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return opened(tmp_path)


@pytest.fixture
def three(store: AdapterStore) -> AdapterStore:
    """The name "a" with generations 1 to 3."""
    for contents in ("one", "two", "three"):
        put(store, "a", contents)
    return store


def numbers(store: AdapterStore, name: str) -> list[int]:
    return [record.generation for record in store.history(name).generations]


def test_generations_count_up_across_deletes_and_starts(store: AdapterStore, tmp_path: Path) -> None:
    assert put(store, "a", "one").generation == 1
    assert put(store, "a", "two").generation == 2
    assert store.delete("a").current == 2
    assert not store.records()
    assert not objects(tmp_path)
    assert store.has_history("a")
    store = opened(tmp_path)
    assert put(store, "a", "two").generation == 3
    store.check_integrity()


def test_a_name_means_the_current_generation_and_name_at_n_that_one(three: AdapterStore, tmp_path: Path) -> None:
    for store in (three, opened(tmp_path)):
        assert [weights_of(store, one) for one in ("a", "a@1", "a@2", "a@3")] == ["three", "one", "two", "three"]
    for missing in ("a@0", "a@4", "a@", "a@x", "a@-1", "a@1@1", "b@1", "a@" + "9" * 30, "a@²"):
        with pytest.raises(NotFoundError):
            three.get(missing)


@pytest.mark.parametrize(
    ("reference", "expected"), [("a", ("a", None)), ("a@12", ("a", 12)), ("a@x", ("a@x", None)), ("a@٣", ("a@٣", None))]
)
def test_references(reference: str, expected: tuple[str, int | None]) -> None:
    assert split_reference(reference) == expected


def test_identical_contents_are_the_same_generation(store: AdapterStore, tmp_path: Path) -> None:
    first = put(store, "a", "one", by="first")
    assert put(store, "a", "one", by="second") == first
    other = put(store, "b", "one")
    assert (other.digest, other.generation) == (first.digest, 1)
    put(store, "a", "two")
    assert put(store, "a", "one") == first, "an older generation is current again"
    assert (store.get("a").generation, numbers(store, "a")) == (1, [1, 2])
    store.delete("a")
    assert weights_of(store, "b") == "one"
    store.delete("b")
    assert not objects(tmp_path)


def test_promote_and_rollback_survive_a_start(three: AdapterStore, tmp_path: Path) -> None:
    assert three.rollback("a").generation == 2
    assert three.rollback("a").generation == 1
    with pytest.raises(ConflictError) as caught:
        three.rollback("a")
    assert (caught.value.code, caught.value.details) == ("generation_conflict", {"current_generation": 1})
    store = opened(tmp_path)
    assert weights_of(store, "a") == "one"
    assert store.promote("a", 3).generation == 3
    assert put(store, "a", "four").generation == 4
    assert numbers(store, "a") == [1, 2, 3, 4]
    with pytest.raises(NotFoundError):
        store.promote("a", 9)
    with pytest.raises(NotFoundError):
        store.rollback("unknown")
    store.check_integrity()


def test_a_generation_that_is_not_promoted_waits_for_it(store: AdapterStore) -> None:
    assert publish(store, "new", "one", promote=False).generation == 1
    with pytest.raises(NotFoundError):
        store.get("new")
    assert not store.records()
    assert weights_of(store, "new@1") == "one"
    assert store.promote("new", 1, expected_generation=0).generation == 1
    publish(store, "new", "two", promote=False)
    assert (weights_of(store, "new"), weights_of(store, "new@2")) == ("one", "two")


CHANGES: dict[str, Callable[[AdapterStore, int], object]] = {
    "publish": lambda store, expected: publish(store, "a", "other", expected_generation=expected),
    "same": lambda store, expected: publish(store, "a", "one", expected_generation=expected),
    "delete": lambda store, expected: store.delete("a", expected_generation=expected),
    "rollback": lambda store, expected: store.rollback("a", expected_generation=expected),
    "promote": lambda store, expected: store.promote("a", 1, expected_generation=expected),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_happens_only_if_the_expected_generation_is_current(
    three: AdapterStore, tmp_path: Path, change: str
) -> None:
    three.promote("a", 2)
    before, files = three.history("a"), objects(tmp_path)
    for expected in (0, 1, 3, 7):
        with pytest.raises(ConflictError) as caught:
            CHANGES[change](three, expected)
        assert (caught.value.code, caught.value.details) == ("generation_conflict", {"current_generation": 2})
    assert three.history("a") == opened(tmp_path).history("a") == before
    assert objects(tmp_path) == files
    CHANGES[change](opened(tmp_path), 2)


def test_expecting_no_adapter(store: AdapterStore) -> None:
    assert publish(store, "a", "one", expected_generation=0).generation == 1
    with pytest.raises(ConflictError):
        publish(store, "a", "two", expected_generation=0)
    store.delete("a")
    assert publish(store, "a", "two", expected_generation=0).generation == 2


def test_of_many_conditional_uploads_at_once_one_wins(store: AdapterStore) -> None:
    put(store, "a", "old")

    def upload(i: int) -> int:
        try:
            return publish(store, "a", f"new{i}", expected_generation=1).generation
        except ConflictError as error:
            return -int(error.details["current_generation"])

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(upload, range(8))) == [-2] * 7 + [2]
    store.check_integrity()


def test_the_oldest_generations_go_but_never_the_current_one(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, max_generations=3)
    store.open()
    for contents in ("one", "two"):
        put(store, "a", contents)
    store.promote("a", 1)
    for contents in ("three", "four", "five"):
        publish(store, "a", contents, promote=False)
    assert numbers(store, "a") == [1, 4, 5]
    assert len(objects(tmp_path)) == 3
    put(store, "a", "six")
    assert numbers(store, "a") == [4, 5, 6]
    store.check_integrity()
    store.close()


def test_dropping_a_generation(three: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(ConflictError):
        three.delete_generation("a", 3)
    digest = three.delete_generation("a", 1).digest
    assert digest not in objects(tmp_path)
    assert numbers(opened(tmp_path), "a") == [2, 3]
    with pytest.raises(NotFoundError):
        three.delete_generation("a", 1)


# Labels, notes, pins


def test_labels_and_notes_are_kept_with_a_generation(store: AdapterStore, tmp_path: Path) -> None:
    first = publish(store, "a", "one", labels={"team": "blue"}, note="é\n", source={"kind": "upload"})
    assert (first.labels, first.note, first.source) == ({"team": "blue"}, "é\n", {"kind": "upload"})
    publish(store, "a", "two")
    store.annotate("a", 1, {"team": "red"}, None)
    store.annotate("a", None, None, "second")
    store = opened(tmp_path)
    assert (store.get("a@1").labels, store.get("a@1").note) == ({"team": "red"}, "é\n")
    assert (store.get("a").labels, store.get("a").note) == ({}, "second")
    assert publish(store, "a", "one", labels={}).labels == {}
    assert publish(store, "a", "one").note == "é\n"
    with pytest.raises(NotFoundError):
        store.annotate("a", 9, {}, None)


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ({"": "x"}, ""),
        ({"a b": "x"}, ""),
        ({"a": "x" * 257}, ""),
        ({"a": "\ud800"}, ""),
        ({}, "\ud800"),
        ({}, "x" * 4097),
        ({str(i): "" for i in range(33)}, ""),
    ],
)
def test_labels_and_notes_that_cannot_be_kept(three: AdapterStore, labels: dict[str, str], note: str) -> None:
    for change in (
        lambda: publish(three, "a", "one", labels=labels, note=note),
        lambda: three.annotate("a", None, labels, note),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            change()
        assert caught.value.code == "label_invalid"
    three.check_integrity()


def test_a_pin_is_the_name_s_and_ends_with_it(three: AdapterStore, tmp_path: Path) -> None:
    three.set_pinned("a", True)
    put(three, "a", "four")
    store = opened(tmp_path)
    assert store.history("a").is_pinned
    store.delete("a")
    put(store, "a", "five")
    assert not store.history("a").is_pinned
    with pytest.raises(NotFoundError):
        store.set_pinned("unknown", True)
