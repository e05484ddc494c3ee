"""The registry: tiers, leases and eviction, on fakes that watch what is asked of them."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from server.adapters.lease import Lease
from server.adapters.registry import AdapterRegistry
from server.adapters.tiers import HostAdapter, Usage
from server.errors import ConflictError, InvalidRequestError, NotFoundError, ServerError, UnavailableError
from server.leases import LeaseState

TIMEOUT_S = 10.0
NUM_SLOTS = 3


def size_of(digest: str) -> int:
    """10, or what stands behind the digest's colon."""
    return int(digest.partition(":")[2] or 10)


@dataclass(frozen=True)
class FakeAdapter:
    digest: str

    @property
    def num_bytes(self) -> int:
        return size_of(self.digest)


@dataclass
class FakeSlots:
    """Remembers what is where, and refuses what a real bank refuses."""

    max_slots: int = NUM_SLOTS
    max_bytes: int = 1 << 60
    contents: dict[int, str] = field(default_factory=dict)
    loads: Counter[str] = field(default_factory=Counter)

    @property
    def allocated_bytes(self) -> int:
        return sum(map(size_of, self.contents.values()))

    def load(self, slot: int, adapter: HostAdapter) -> None:
        assert slot not in self.contents, "loaded over an adapter"
        assert isinstance(adapter, FakeAdapter)
        self.contents[slot] = adapter.digest
        self.loads[adapter.digest] += 1
        assert self.allocated_bytes <= self.max_bytes, "more bytes than the budget"

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

    def folded_bytes(self, digest: str) -> int:
        return size_of(digest)


class World:
    """A registry over fakes. Digests that begin with "bad" cannot be read; `gate` can hold every read up."""

    def __init__(self, max_host_bytes: int = 1000, max_slot_bytes: int = 1000, num_slots: int = NUM_SLOTS) -> None:
        self.slots, self.store = FakeSlots(num_slots, max_slot_bytes), FakeStore()
        self.cost_s: Counter[str] = Counter()
        self.now_s = 0.0
        self.reads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.changes = 0
        self.registry = AdapterRegistry(
            self.store,
            self._read,
            self.slots,
            max_slot_bytes=max_slot_bytes,
            max_host_bytes=max_host_bytes,
            on_change=self._on_change,
            clock=lambda: self.now_s,
        )

    def _read(self, digest: str) -> FakeAdapter:
        assert self.gate.wait(TIMEOUT_S)
        self.reads[digest] += 1
        self.now_s += self.cost_s[digest]
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

    def use(self, *digests: str) -> None:
        for digest in digests:
            self.ready(digest).release()

    @property
    def in_slots(self) -> set[str]:
        return set(self.registry.stats().slots)

    @property
    def in_host(self) -> set[str]:
        return set(self.registry.stats().host)

    def close(self) -> None:
        self.gate.set()
        self.registry.check_integrity(is_idle=True)
        self.registry.close()
        assert not +self.store.holds


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.0005)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


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
    until(lambda: waiting.activate() is LeaseState.NO_SLOT)
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
    until(lambda: mix.activate() is LeaseState.NO_SLOT)
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


# Budgets of bytes


def test_slots_are_a_budget_of_bytes_and_small_adapters_take_little() -> None:
    world = World(max_slot_bytes=100, num_slots=10)
    held = [world.ready(f"{name}:10") for name in "abcdefgh"]
    large = world.lease("large:40")
    until(lambda: large.activate() is LeaseState.NO_SLOT)
    for lease in held[:2]:
        lease.release()
    until(lambda: large.activate() is LeaseState.READY)
    assert world.in_slots == {"large:40", *(f"{name}:10" for name in "cdefgh")}
    for lease in [*held[2:], large]:
        lease.release()
    world.close()


def test_what_can_never_fit_is_refused() -> None:
    world = World(max_slot_bytes=100)
    for digests in (["a:101"], ["a:60", "b:60"]):
        with pytest.raises(InvalidRequestError) as caught:
            world.lease(*digests)
        assert caught.value.code == "too_many_adapters"
    world.use("a:60", "b:60")
    world.close()


def test_reads_wait_for_room_in_host_memory() -> None:
    world = World(max_host_bytes=30, num_slots=1)
    running = world.ready("a")
    waiting = [world.lease(digest) for digest in "bcdefg"]
    for _ in range(50):
        for lease in waiting:
            assert lease.activate() in (LeaseState.LOADING, LeaseState.NO_SLOT)
        assert world.registry.stats().host_tier.num_bytes <= 30
        time.sleep(0.001)
    running.release()
    while waiting:
        assert world.registry.stats().host_tier.num_bytes <= 30
        for lease in waiting:
            if lease.activate() is LeaseState.READY:
                lease.release()
        waiting = [lease for lease in waiting if lease.is_open]
    world.close()


def test_what_is_needed_now_displaces_what_was_fetched_for_later() -> None:
    world = World(max_host_bytes=20)
    later = [world.lease("a"), world.lease("b")]
    until(lambda: world.in_host == {"a", "b"})
    now = world.ready("c")
    assert "c" in world.in_slots
    for lease in [*later, now]:
        lease.release()
    world.close()


def test_two_mixes_that_need_more_than_host_memory_both_get_there() -> None:
    world = World(max_host_bytes=25, num_slots=4)
    mixes = [world.lease("a", "b", "c"), world.lease("c", "d", "e")]
    deadline = time.monotonic() + TIMEOUT_S
    while mixes:
        assert time.monotonic() < deadline, "they wait for each other"
        for mix in mixes:
            if mix.activate() is LeaseState.READY:
                mix.release()
        mixes = [mix for mix in mixes if mix.is_open]
    world.close()


def test_queued_requests_are_fetched_for_before_they_can_start(world: World) -> None:
    lease = world.lease("a")
    until(lambda: world.in_host == {"a"})
    assert world.reads["a"] == 1
    lease.release()


# What goes when memory is short


def test_an_adapter_that_is_costly_to_bring_back_stays_longer() -> None:
    world = World(max_host_bytes=40, num_slots=1)
    world.cost_s["costly"] = 60.0
    for digest in "abcdef":
        world.cost_s[digest] = 0.1
    world.use("costly", *"abcde")
    assert world.in_host == {"costly", *"cde"}
    assert world.reads["costly"] == 1
    world.close()


def test_a_costly_adapter_that_nobody_uses_goes_in_the_end() -> None:
    world = World(max_host_bytes=40, num_slots=1)
    world.cost_s["costly"] = 2.0
    for i in range(200):
        world.cost_s[str(i)] = 0.1
    world.use("costly", *map(str, range(200)))
    assert "costly" not in world.in_host
    world.close()


def test_at_equal_costs_the_least_recently_used_goes() -> None:
    world = World(max_host_bytes=30, num_slots=1)
    world.use(*"abc", "a", "d")
    assert world.in_host == set("acd")
    world.close()


# Pins, warming, eviction


def test_a_pinned_adapter_stays(world: World) -> None:
    world.registry.set_pinned({"a"})
    world.registry.warm("a").result(TIMEOUT_S)
    world.use(*"bcdef", *"bcdef")
    assert "a" in world.in_slots
    with pytest.raises(InvalidRequestError):
        world.lease("b", "c", "d")
    world.registry.set_pinned(())
    world.use(*"bcd")
    assert "a" not in world.in_slots


def test_warming_waits_until_the_adapter_is_there(world: World) -> None:
    world.gate.clear()
    done = world.registry.warm("a")
    assert not done.done()
    world.gate.set()
    done.result(TIMEOUT_S)
    assert "a" in world.in_slots
    usage = world.registry.usage("a")
    assert (usage.num_requests, usage.num_loads) == (0, 1)
    with pytest.raises(UnavailableError):
        world.registry.warm("bad").result(TIMEOUT_S)


def test_warming_takes_no_slot_that_is_in_use(world: World) -> None:
    held = [world.ready(digest) for digest in "abc"]
    with pytest.raises(ConflictError) as caught:
        world.registry.warm("d").result(TIMEOUT_S)
    assert caught.value.code == "slots_in_use"
    for lease in held:
        lease.release()


def test_evicting_frees_memory_when_the_last_lease_ends(world: World) -> None:
    lease = world.ready("a")
    world.registry.evict("a")
    assert "a" in world.in_slots
    lease.release()
    until(lambda: not world.slots.contents)
    assert not world.in_host
    world.use("b")
    world.registry.evict("b")
    until(lambda: not world.slots.contents)


def test_usage_tells_where_requests_found_an_adapter(world: World) -> None:
    world.cost_s["a"] = 3.0
    world.use("a", "a", "b", "c", "d", "a")
    usage = world.registry.usage("a")
    assert (usage.num_requests, usage.num_slot_hits, usage.num_host_hits) == (3, 1, 1)
    assert (usage.num_reads, usage.read_s, usage.num_loads) == (1, 3.0, 2)
    assert usage.last_used_s is not None
    stats = world.registry.stats()
    assert (stats.slot_tier.num_hits, stats.slot_tier.num_misses, stats.slot_tier.num_evictions) == (1, 5, 2)
    assert (stats.host_tier.num_hits, stats.host_tier.num_misses, stats.host_tier.num_loads) == (1, 4, 4)
    assert (stats.slot_tier.num_bytes, stats.host_tier.num_bytes) == (30, 40)
    world.registry.forget("a")
    assert world.registry.usage("a").num_requests == 0


def test_a_random_walk_keeps_the_books() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    world = World(max_host_bytes=rng.choice([15, 45, 200]), max_slot_bytes=rng.choice([60, 80, 1000]))
    digests = ["a", "b", "c:20", "d", "e:5", "bad"]
    leases: list[Lease] = []
    warming = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.3 and len(leases) < 8:
            leases.append(world.lease(*rng.sample(digests, rng.randint(1, NUM_SLOTS))))
        elif action < 0.72 and leases:
            lease = rng.choice(leases)
            try:
                lease.activate()
            except UnavailableError:
                lease.release()
                leases.remove(lease)
        elif action < 0.8 and leases:
            rng.choice(leases).deactivate()
        elif action < 0.92 and leases:
            leases.pop(rng.randrange(len(leases))).release()
        elif action < 0.95:
            warming.append(world.registry.warm(rng.choice(digests)))
        else:
            rng.choice([world.registry.forget, world.registry.evict])(rng.choice(digests))
        for lease in leases:
            if lease.slots:
                assert {world.slots.contents[slot] for slot in lease.slots} == set(lease.weights)
        world.registry.check_integrity()
    for lease in leases:
        lease.release()
    until(lambda: all(done.done() for done in warming))
    until(lambda: not +world.store.holds)
    world.close()


def test_everything_that_is_asked_for_gets_its_turn() -> None:
    """Whatever the budgets, each of many leases that is activated again and again becomes ready."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for host, slot in [(10, 60), (35, 60), (1000, 60), (35, 1000)]:
        world = World(max_host_bytes=host, max_slot_bytes=slot)
        leases = [world.lease(*rng.sample("abcdefghij", rng.randint(1, NUM_SLOTS))) for _ in range(30)]
        deadline = time.monotonic() + TIMEOUT_S
        while leases:
            assert time.monotonic() < deadline, "somebody never got ready"
            for lease in leases[:5]:
                if lease.activate() is LeaseState.READY:
                    lease.release()
            leases = [lease for lease in leases if lease.is_open]
            if rng.random() < 0.01:
                for lease in leases:
                    lease.deactivate()
        world.close()


class CountingLock:
    """Counts what is done while it is held, by each time that it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: list[int] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self.counts.append(0)

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def count(self) -> None:
        if self._lock.locked():
            self.counts[-1] += 1


def test_figures_of_thousands_of_adapters_hold_nobody_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usages = {f"a{i}": Usage(num_requests=i) for i in range(2000)}
    monkeypatch.setattr(world.registry, "_usage", usages)
    lock = CountingLock()
    monkeypatch.setattr(world.registry, "_lock", lock)
    copy = Usage.copy
    monkeypatch.setattr(Usage, "copy", lambda usage: (lock.count(), copy(usage))[1])
    found = world.registry.stats().usage
    assert found == usages
    assert not any(found[digest] is usage for digest, usage in usages.items())
    assert sum(lock.counts) == len(usages)  # each is whole: nobody changes it meanwhile
    assert max(lock.counts) <= 64  # and nobody waits for more than so many
    lock.counts.clear()
    assert world.registry.stats(["a7", "unknown"]).usage == {"a7": usages["a7"]}
    assert sum(lock.counts) == 1
