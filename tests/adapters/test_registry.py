"""The registry: tiers, leases and eviction, on fakes that watch what is asked of them."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from server.adapters.registry import AdapterRegistry, HostAdapter, Lease
from server.errors import InvalidRequestError, NotFoundError, ServerError, UnavailableError
from server.leases import LeaseState

TIMEOUT_S = 10.0
NUM_SLOTS = 3


@dataclass(frozen=True)
class FakeAdapter:
    digest: str
    num_bytes: int = 10


@dataclass
class FakeSlots:
    """Remembers what is where, and refuses what a real bank refuses."""

    max_slots: int = NUM_SLOTS
    contents: dict[int, str] = field(default_factory=dict)
    loads: Counter[str] = field(default_factory=Counter)

    def load(self, slot: int, adapter: HostAdapter) -> None:
        assert slot not in self.contents, "loaded over an adapter"
        assert isinstance(adapter, FakeAdapter)
        self.contents[slot] = adapter.digest
        self.loads[adapter.digest] += 1

    def free(self, slot: int) -> None:
        del self.contents[slot]


@dataclass
class FakeStore:
    holds: Counter[str] = field(default_factory=Counter)
    gone: set[str] = field(default_factory=set)

    def hold(self, digest: str) -> None:
        if digest in self.gone:
            raise NotFoundError("gone")
        self.holds[digest] += 1

    def release(self, digest: str) -> None:
        self.holds[digest] -= 1
        assert self.holds[digest] >= 0


class World:
    """A registry over fakes. Digests that begin with "bad" cannot be read; `gate` can hold every read up."""

    def __init__(self, max_host_bytes: int = 1000) -> None:
        self.slots, self.store = FakeSlots(), FakeStore()
        self.reads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.changes = 0
        self.registry = AdapterRegistry(
            self.store, self._read, self.slots, max_host_bytes=max_host_bytes, on_change=self._on_change
        )

    def _read(self, digest: str) -> FakeAdapter:
        assert self.gate.wait(TIMEOUT_S)
        self.reads[digest] += 1
        if digest.startswith("bad"):
            raise UnavailableError("damaged", code="adapter_corrupt")
        if digest.startswith("crash"):
            raise RuntimeError("a bug")
        return FakeAdapter(digest)

    def _on_change(self) -> None:
        self.changes += 1

    def lease(self, *digests: str) -> Lease:
        return self.registry.open_lease(dict.fromkeys(digests, 1.0))

    def ready(self, *digests: str) -> Lease:
        lease = self.lease(*digests)
        until(lambda: lease.activate() is LeaseState.READY)
        return lease


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.0005)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.gate.set()
    world.registry.check_integrity(is_idle=True)
    world.registry.close()
    assert not +world.store.holds


def test_a_cold_adapter_loads_while_others_are_ready(world: World) -> None:
    warm = world.ready("a")
    world.gate.clear()
    cold = world.lease("b")
    assert cold.activate() is LeaseState.LOADING
    assert warm.activate() is LeaseState.READY
    world.gate.set()
    until(lambda: cold.activate() is LeaseState.READY)
    assert {world.slots.contents[slot] for slot in cold.slots} == {"b"}
    warm.release()
    cold.release()


def test_the_least_recently_used_idle_adapter_makes_room(world: World) -> None:
    for digest in "abc":
        world.ready(digest).release()
    world.ready("a").release()
    held = world.ready("c")
    other = world.ready("d")
    assert set(world.slots.contents.values()) == {"a", "c", "d"}
    held.release()
    other.release()


def test_an_adapter_in_use_is_never_evicted(world: World) -> None:
    held = [world.ready(digest) for digest in "abc"]
    waiting = world.lease("d")
    assert waiting.activate() is LeaseState.NO_SLOT
    assert set(world.slots.contents.values()) == {"a", "b", "c"}
    changes = world.changes
    held[1].release()
    assert world.changes > changes
    until(lambda: waiting.activate() is LeaseState.READY)
    assert set(world.slots.contents.values()) == {"a", "c", "d"}
    for lease in [*held, waiting]:
        lease.release()


def test_slots_for_a_mix_are_taken_together_or_not_at_all(world: World) -> None:
    held = world.ready("a", "b")
    mix = world.lease("c", "d")
    assert mix.activate() is LeaseState.NO_SLOT
    assert "c" not in world.slots.contents.values()
    single = world.ready("c")
    single.release()
    held.release()
    until(lambda: mix.activate() is LeaseState.READY)
    assert {world.slots.contents[slot] for slot in mix.slots} == {"c", "d"}
    mix.release()


def test_a_mix_of_more_adapters_than_slots_is_refused(world: World) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        world.lease("a", "b", "c", "d")
    assert caught.value.code == "too_many_adapters"


def test_a_lease_on_what_was_just_deleted_leaves_nothing_held(world: World) -> None:
    world.store.gone.add("b")
    with pytest.raises(NotFoundError):
        world.lease("a", "b")


def test_deactivating_gives_the_slot_to_others(world: World) -> None:
    first = world.ready("a", "b", "c")
    first.deactivate()
    second = world.ready("d")
    assert first.activate() is LeaseState.NO_SLOT
    second.release()
    until(lambda: first.activate() is LeaseState.READY)
    first.release()
    first.release()


@pytest.mark.parametrize(("digest", "code"), [("bad", "adapter_corrupt"), ("crash", "adapter_load_failed")])
def test_a_failed_load_fails_its_leases_and_is_tried_again_later(world: World, digest: str, code: str) -> None:
    codes: list[str] = []

    def fails() -> bool:
        try:
            lease.activate()
        except ServerError as error:
            codes.append(error.code)
        return bool(codes)

    for attempt in (1, 2):
        codes.clear()
        lease = world.lease(digest)
        until(fails)
        assert codes == [code]
        lease.release()
        assert world.reads[digest] == attempt
    assert world.registry.stats().num_failures == 2
    world.ready("a", "b", "c").release()


def test_host_memory_stays_within_its_budget_and_saves_reads() -> None:
    world = World(max_host_bytes=40)
    try:
        for digest in "abcdef":
            world.ready(digest).release()
        assert sum(world.registry.stats().host.values()) <= 40
        assert set(world.registry.stats().host) == set("cdef")
        world.ready("c").release()
        assert world.reads["c"] == 1
        world.ready("a").release()
        assert world.reads["a"] == 2
        world.registry.check_integrity(is_idle=True)
    finally:
        world.registry.close()


def test_a_forgotten_adapter_leaves_memory_with_its_last_lease(world: World) -> None:
    lease = world.ready("a")
    world.registry.forget("a")
    assert lease.activate() is LeaseState.READY
    assert "a" in world.slots.contents.values()
    lease.release()
    until(lambda: "a" not in world.slots.contents.values())
    assert "a" not in world.registry.stats().host
    world.ready("a").release()
    assert world.reads["a"] == 2


def test_forgetting_while_it_loads(world: World) -> None:
    world.gate.clear()
    lease = world.lease("a")
    assert lease.activate() is LeaseState.LOADING
    world.registry.forget("a")
    lease.release()
    world.gate.set()
    until(lambda: not world.registry.stats().host and not world.slots.contents)


def test_a_random_walk_keeps_the_books(world: World) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    digests = ["a", "b", "c", "d", "e", "bad"]
    leases: list[Lease] = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.3 and len(leases) < 8:
            leases.append(world.lease(*rng.sample(digests, rng.randint(1, NUM_SLOTS))))
        elif action < 0.75 and leases:
            lease = rng.choice(leases)
            try:
                lease.activate()
            except UnavailableError:
                lease.release()
                leases.remove(lease)
        elif action < 0.85 and leases:
            rng.choice(leases).deactivate()
        elif action < 0.95 and leases:
            leases.pop(rng.randrange(len(leases))).release()
        else:
            world.registry.forget(rng.choice(digests))
        for lease in leases:
            if lease.slots:
                assert {world.slots.contents[slot] for slot in lease.slots} == set(lease.weights)
        world.registry.check_integrity()
    for lease in leases:
        lease.release()
