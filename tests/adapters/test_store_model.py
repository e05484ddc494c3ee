"""The store under any sequence of calls, and under many threads."""

import shutil
import tempfile
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
from server.errors import NotFoundError
from tests.adapters.stores import objects, opened, put


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return opened(tmp_path)


def test_threads_that_publish_delete_and_read_one_name(store: AdapterStore, tmp_path: Path) -> None:
    generations: list[int] = []

    def publish(worker: int) -> None:
        generations.extend(put(store, "a", f"{worker}-{i}", worker=worker, i=i).generation for i in range(8))

    def delete(worker: int) -> None:
        for _ in range(8):
            with suppress(NotFoundError):
                store.delete("a")

    def read(worker: int) -> None:
        for _ in range(60):
            with suppress(NotFoundError):
                record = store.get("a")
                store.hold(record.digest)
                assert store.read(record.digest)[1].decode() == "{worker}-{i}".format(**record.details)
                store.release(record.digest)

    jobs = [(publish, 0), (publish, 1), (publish, 2), (delete, 3), (read, 4), (read, 5)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for running in [pool.submit(*job) for job in jobs]:
            running.result(60)
    assert sorted(generations) == list(range(1, 25))
    store.check_integrity()
    assert opened(tmp_path).records() == store.records()


class StoreModel(RuleBasedStateMachine):
    """Any sequence of changes, holds and starts, against a dictionary."""

    names = st.sampled_from(["a", "b", "c"])
    contents = st.sampled_from(["one", "two", "three"])

    def __init__(self) -> None:
        super().__init__()
        self.no_fsync = mock.patch("os.fsync")  # slow, and of no consequence without a crash
        self.no_fsync.start()
        self.root = Path(tempfile.mkdtemp())
        self.store = opened(self.root)
        self.live: dict[str, str] = {}
        self.generations: Counter[str] = Counter()
        self.holds: Counter[str] = Counter()
        self.digests: dict[str, str] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)
        self.no_fsync.stop()

    @rule(name=names, contents=contents)
    def publish(self, name: str, contents: str) -> None:
        if self.live.get(name) != contents:
            self.generations[name] += 1
        self.live[name] = contents
        record = put(self.store, name, contents)
        self.digests[contents] = record.digest
        assert record.generation == self.generations[name]

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.live:
            assert self.store.delete(name).digest == self.digests[self.live.pop(name)]
        else:
            with pytest.raises(NotFoundError):
                self.store.delete(name)

    @rule(contents=contents)
    def hold(self, contents: str) -> None:
        digest = self.digests.get(contents, "none")
        if contents in self.live.values() or self.holds[contents]:
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
        self.store = opened(self.root)
        self.holds.clear()

    @invariant()
    def agrees(self) -> None:
        self.store.check_integrity()
        assert {r.name: self.store.read(r.digest)[1].decode() for r in self.store.records()} == self.live
        kept = set(self.live.values()) | set(self.holds.elements())
        assert objects(self.root) == {self.digests[contents] for contents in kept}


StoreModel.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestStoreModel = StoreModel.TestCase
