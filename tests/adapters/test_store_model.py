"""The store under any sequence of calls, and under many threads."""

import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.adapters.store import AdapterStore
from server.errors import ConflictError, NotFoundError
from tests.adapters.stores import objects, opened, publish, put, read


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return opened(tmp_path)


def test_threads_that_publish_delete_and_read_one_name(store: AdapterStore, tmp_path: Path) -> None:
    generations: list[int] = []
    seen: list[str] = []

    def publish(worker: int) -> None:
        generations.extend(put(store, "a", f"{worker}-{i}", worker=worker, i=i).generation for i in range(8))

    def delete(worker: int) -> None:
        for _ in range(8):
            with suppress(NotFoundError):
                store.delete("a")

    def look(_: int) -> None:
        end = time.monotonic() + 60
        while len(generations) < 24 and time.monotonic() < end:
            with suppress(NotFoundError):
                record = store.get("a")
                store.hold(record.digest)
                assert read(store, record.digest)[1].decode() == "{worker}-{i}".format(**record.details)
                store.release(record.digest)
                seen.append(record.digest)

    jobs = [(publish, 0), (publish, 1), (publish, 2), (delete, 3), (look, 4), (look, 5)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for running in [pool.submit(*job) for job in jobs]:
            running.result(60)
    assert sorted(generations) == list(range(1, 25))
    assert seen
    store.check_integrity()
    assert opened(tmp_path).records() == store.records()


class StoreModel(RuleBasedStateMachine):
    """Any sequence of changes, holds and starts, against dictionaries."""

    names = st.sampled_from(["a", "b", "c"])
    contents = st.sampled_from(["one", "two", "three", "four"])
    numbers = st.integers(0, 6)
    max_generations = 3

    def __init__(self) -> None:
        super().__init__()
        self.no_fsync = mock.patch("os.fsync")  # slow, and of no consequence without a crash
        self.no_fsync.start()
        self.root = Path(tempfile.mkdtemp())
        self.store = self.open()
        self.kept: dict[str, dict[int, str]] = {}
        self.current: Counter[str] = Counter()
        self.published: Counter[str] = Counter()
        self.holds: Counter[str] = Counter()
        self.digests: dict[str, str] = {}

    def open(self) -> AdapterStore:
        store = AdapterStore(self.root, max_generations=self.max_generations)
        store.open()
        return store

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)
        self.no_fsync.stop()

    @rule(name=names, contents=contents, promote=st.booleans(), expected=st.none() | numbers)
    def publish(self, name: str, contents: str, promote: bool, expected: int | None) -> None:
        if expected not in (None, self.current[name]):
            with pytest.raises(ConflictError):
                publish(self.store, name, contents, expected_generation=expected)
            return
        record = publish(self.store, name, contents, promote=promote, expected_generation=expected)
        kept = self.kept.setdefault(name, {})
        known = [number for number, old in kept.items() if old == contents]
        self.published[name] += not known
        number = known[0] if known else self.published[name]
        kept[number] = contents
        if promote:
            self.current[name] = number
        for old in sorted(set(kept) - {self.current[name]})[: max(len(kept) - self.max_generations, 0)]:
            del kept[old]
        self.digests[contents] = record.digest
        assert record.generation == number

    @rule(name=names, number=numbers)
    def promote(self, name: str, number: int) -> None:
        if number in self.kept.get(name, {}):
            self.store.promote(name, number)
            self.current[name] = number
        else:
            with pytest.raises(NotFoundError):
                self.store.promote(name, number)

    @rule(name=names)
    def rollback(self, name: str) -> None:
        older = [number for number in self.kept.get(name, {}) if number < self.current[name]]
        if older:
            self.current[name] = self.store.rollback(name).generation
            assert self.current[name] == max(older)
        else:
            with pytest.raises(ConflictError if self.current[name] else NotFoundError):
                self.store.rollback(name)

    @rule(name=names)
    def delete(self, name: str) -> None:
        if self.kept.get(name):
            self.store.delete(name)
            self.kept[name], self.current[name] = {}, 0
        else:
            with pytest.raises(NotFoundError):
                self.store.delete(name)

    @rule(contents=contents)
    def hold(self, contents: str) -> None:
        digest = self.digests.get(contents, "none")
        if self.is_pointed_to(contents) or self.holds[contents]:
            self.store.hold(digest)
            self.holds[contents] += 1
        else:
            with pytest.raises(NotFoundError):
                self.store.hold(digest)

    @precondition(lambda self: self.holds.total())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        contents = data.draw(st.sampled_from(sorted(self.holds.elements())))
        self.store.release(self.digests[contents])
        self.holds[contents] -= 1

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()
        self.holds.clear()

    def is_pointed_to(self, contents: str) -> bool:
        return any(contents in kept.values() for kept in self.kept.values())

    @invariant()
    def agrees(self) -> None:
        self.store.check_integrity()
        live = {name: kept[self.current[name]] for name, kept in self.kept.items() if self.current[name]}
        assert {r.name: read(self.store, r.digest)[1].decode() for r in self.store.records()} == live
        found = {h.name: {r.generation: r.digest for r in h.generations} for h in self.store.histories()}
        kept = {name: {n: self.digests[c] for n, c in kept.items()} for name, kept in self.kept.items() if kept}
        assert found == kept
        used = {digest for of in kept.values() for digest in of.values()}
        assert objects(self.root) == used | {self.digests[contents] for contents in self.holds.elements()}


StoreModel.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestStoreModel = StoreModel.TestCase
