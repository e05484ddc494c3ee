"""Whatever comes, every request gets on: a scheduler among random requests, adapters that come late, and tiny pools."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine import GenerationRequest, SamplingParams
from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler, Step, _order
from server.errors import GenerationError
from server.leases import LeaseState

STEP_S = 0.3
LEASE_FAILURE = GenerationError("the adapter cannot be loaded")


@dataclass
class FakeAdapters:
    """A registry with few slots: an adapter takes `load_steps` steps to come, stays until its slot is needed."""

    num_slots: int
    load_steps: int = 0
    now: int = 0
    ready_at: dict[str, int] = field(default_factory=dict)
    users: list["FakeLease"] = field(default_factory=list)

    def reserve(self, lease: "FakeLease") -> bool:
        used = {adapter for user in self.users for adapter in user.adapters}
        missing = [adapter for adapter in lease.adapters if adapter not in self.ready_at]
        idle = [a for a, at in self.ready_at.items() if a not in used and a not in lease.adapters and at <= self.now]
        while missing and len(self.ready_at) + len(missing) > self.num_slots:
            if not idle:
                return False
            del self.ready_at[idle.pop(0)]
        self.ready_at |= dict.fromkeys(missing, self.now + self.load_steps)
        self.users.append(lease)
        return True


@dataclass(eq=False)
class FakeLease:
    registry: FakeAdapters
    adapters: frozenset[str]
    is_broken: bool = False
    num_releases: int = 0

    @property
    def key(self) -> frozenset[str]:
        return self.adapters

    @property
    def slots(self) -> Mapping[str, float]:
        return dict.fromkeys(self.adapters, 1.0)

    @property
    def is_ready(self) -> bool:
        return self in self.registry.users and all(
            self.registry.ready_at[adapter] <= self.registry.now for adapter in self.adapters
        )

    def activate(self) -> LeaseState:
        assert not self.num_releases
        if self.is_broken:
            raise LEASE_FAILURE
        if self not in self.registry.users and not self.registry.reserve(self):
            return LeaseState.NO_SLOT
        return LeaseState.READY if self.is_ready else LeaseState.LOADING

    def deactivate(self) -> None:
        if self in self.registry.users:
            self.registry.users.remove(self)

    def release(self) -> None:
        self.deactivate()
        self.num_releases += 1


class World:
    """A scheduler, its adapters and its requests, one step at a time, every step checked."""

    def __init__(
        self,
        *,
        num_blocks: int = 9,
        block_size: int = 1,
        max_running: int = 2,
        max_step_tokens: int = 8,
        num_slots: int = 2,
        load_steps: int = 0,
        use_prefix_cache: bool = False,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            use_prefix_cache=use_prefix_cache,
        )
        self.adapters = FakeAdapters(num_slots, load_steps)
        self.contents: dict[int, dict[int, object]] = {}
        self.now_s = 0.0
        self.open: list[GenerationRequest] = []
        self.ended: list[GenerationRequest] = []

    @property
    def capacity(self) -> int:
        return self.pool.num_usable * self.pool.block_size

    def add(
        self,
        num_prompt: int,
        max_new: int,
        adapters: Iterable[str] = (),
        *,
        is_broken: bool = False,
        prompt: list[int] | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> GenerationRequest:
        wanted = frozenset(adapters)
        request = GenerationRequest(
            str(len(self.open) + len(self.ended)),
            prompt or [0] * num_prompt,
            SamplingParams(max_new_tokens=max_new),
            emit=lambda _: None,
            lease=FakeLease(self.adapters, wanted, is_broken) if wanted else None,
            priority=priority,
            cache_salt=salt,
        )
        assert num_prompt + max_new <= self.capacity
        self.scheduler.add(request, self.now_s)
        self.open.append(request)
        return request

    def remove(self, request: GenerationRequest) -> None:
        self.scheduler.remove(request)
        self.end(request)

    def end(self, request: GenerationRequest) -> None:
        self.open.remove(request)
        self.ended.append(request)
        assert request.lease is None or request.lease.num_releases == 1
        assert not request.block_ids

    def step(self, *, is_computed: bool = True) -> Step:
        """Plan a step, check it, compute it, and let requests end that have all of their tokens."""
        decoding = [r for r in self.scheduler.running if r.num_pending == 1]
        oldest = self.scheduler.running[:1]
        waiting = list(self.scheduler.waiting)
        step = self.scheduler.schedule(self.now_s)
        self.scheduler.check_integrity()
        self.check(step)
        self.check_contents(step)
        planned = [chunk.request for chunk in step.chunks]
        assert all(request in planned for request in oldest), "the oldest does not advance"
        assert all(r in planned or r in self.scheduler.waiting for r in decoding), "a prompt delays a stream"
        started = [request for request in waiting if request in self.scheduler.running]
        passed = [r for r in self.scheduler.waiting if r.lease is None and r in waiting]
        overtaken = [(old, new) for old in passed for new in started if _order(old) < _order(new)]
        assert not overtaken, "a base request is passed over"
        for request, error in step.failed:
            assert error is LEASE_FAILURE
            assert request not in self.scheduler.running + self.scheduler.waiting
            self.end(request)
        if is_computed:
            self.advance(step)
        else:
            for request in planned:
                self.remove(request)
        self.now_s += STEP_S
        self.adapters.now += 1
        return step

    def check(self, step: Step) -> None:
        assert sum(chunk.num_tokens for chunk in step.chunks) <= self.scheduler.max_step_tokens
        assert len({id(chunk.request) for chunk in step.chunks}) == len(step.chunks), "two chunks of one request"
        assert len(self.scheduler.running) <= self.scheduler.max_running
        held = [block for chunk in step.chunks for block in chunk.request.block_ids]
        assert len(set(step.new_blocks)) == len(step.new_blocks)
        assert set(step.new_blocks) <= set(held)
        for chunk in step.chunks:
            request = chunk.request
            assert request in self.scheduler.running
            assert chunk.num_tokens >= 1
            assert chunk.start == request.num_computed, "a gap between chunks"
            assert chunk.stop <= request.num_tokens
            assert len(request.block_ids) == self.pool.blocks_for(chunk.stop)
            assert request.lease is None or request.lease.is_ready
            fresh = request.block_ids[self.pool.blocks_for(chunk.start) :]
            assert set(fresh) <= set(step.new_blocks), "a block is not zeroed"

    def check_contents(self, step: Step) -> None:
        """Follow what each block holds: a request never sees a token in its blocks that is not its own."""
        for block in step.new_blocks:
            self.contents[block] = {}
        size = self.pool.block_size
        for chunk in step.chunks:
            request, owner = chunk.request, (chunk.request.route_key, chunk.request.cache_salt)
            for i, token in enumerate(request.token_ids(0, chunk.start)):
                assert self.contents[request.block_ids[i // size]][i % size] == (owner, i, token)
            for i, token in enumerate(request.token_ids(chunk.start, chunk.stop), chunk.start):
                self.contents[request.block_ids[i // size]][i % size] = (owner, i, token)

    def advance(self, step: Step) -> None:
        sampled = self.scheduler.commit(step)
        assert sampled == [chunk.request for chunk in step.chunks if chunk.is_last]
        for request in sampled:
            assert request.num_pending == 0
            request.output_ids.append(0)
            if len(request.output_ids) == request.sampling.max_new_tokens:
                self.remove(request)

    def run_until(self, has_come: Callable[[], object]) -> None:
        for _ in range(100):
            if has_come():
                return
            self.step()
        raise AssertionError("it never comes")

    def drain(self) -> int:
        """Run until all have ended; returns the number of steps."""
        slowest = self.adapters.load_steps + 2 + self.scheduler.max_slot_wait_s / STEP_S
        bound = 20 + sum(2 * len(r.prompt_ids) + 2 * r.sampling.max_new_tokens + 2 * slowest for r in self.open)
        for num_steps in range(int(bound)):
            if not self.open:
                return num_steps
            self.step()
        raise AssertionError(f"{len(self.open)} requests did not end in {int(bound)} steps")

    def check_that_all_is_free(self) -> None:
        assert self.pool.num_free == self.pool.num_usable
        assert not self.adapters.users
        assert all(r.lease is None or r.lease.num_releases == 1 for r in self.ended)


class Walk(RuleBasedStateMachine):
    """Requests arrive, advance, are cancelled and fail in any order; in the end, all that are left are drained."""

    world: World | None = None

    @initialize(
        num_blocks=st.integers(2, 14),
        block_size=st.integers(1, 3),
        max_running=st.integers(1, 4),
        spare=st.integers(0, 6),
        num_slots=st.integers(1, 3),
        load_steps=st.integers(0, 4),
        use_prefix_cache=st.booleans(),
    )
    def start(self, max_running: int, spare: int, **sizes: Any) -> None:
        self.world = World(max_running=max_running, max_step_tokens=max_running + spare, **sizes)

    @rule(data=st.data(), is_broken=st.sampled_from([False] * 9 + [True]))
    def add(self, data: st.DataObject, is_broken: bool) -> None:
        world = self.world
        assert world is not None
        total = data.draw(st.integers(2, max(2, world.capacity))) if world.capacity > 1 else 0
        if not total:
            return
        num_prompt = data.draw(st.integers(1, total - 1))
        adapters = data.draw(st.sets(st.sampled_from("abcde"), max_size=world.adapters.num_slots))
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=num_prompt, max_size=num_prompt))
        world.add(
            num_prompt,
            total - num_prompt,
            adapters,
            is_broken=is_broken,
            prompt=prompt,
            priority=data.draw(st.integers(0, 1)),
            salt=data.draw(st.sampled_from(["", "tenant"])),
        )

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @rule()
    def fail_a_step(self) -> None:
        self.world.step(is_computed=False)

    @precondition(lambda self: self.world and self.world.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.world.remove(data.draw(st.sampled_from(self.world.open)))

    @invariant()
    def books_agree(self) -> None:
        if self.world is not None:
            self.world.scheduler.check_integrity()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.drain()
            self.world.check_that_all_is_free()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("max_running", "max_step_tokens"), [(0, 4), (5, 4)])
def test_a_budget_below_the_number_of_streams_is_refused(max_running: int, max_step_tokens: int) -> None:
    with pytest.raises(ValueError, match="max_step_tokens"):
        Scheduler(BlockPool(4, 4), max_running=max_running, max_step_tokens=max_step_tokens)


def test_a_long_prompt_is_cut_to_what_the_streams_leave() -> None:
    world = World(num_blocks=60, max_running=4, max_step_tokens=8)
    streams = [world.add(1, 20) for _ in range(3)]
    world.step()
    prompt = world.add(18, 1)
    for size in (5, 5, 5, 3):
        chunks = {chunk.request: chunk.num_tokens for chunk in world.step().chunks}
        assert chunks == dict.fromkeys(streams, 1) | {prompt: size}
    assert prompt in world.ended


def test_a_long_prompt_that_is_older_than_the_streams_delays_none_of_them() -> None:
    world = World(num_blocks=60, max_running=4, max_step_tokens=8, load_steps=2)
    prompt = world.add(18, 1, "a")
    streams = [world.add(1, 20) for _ in range(3)]
    world.run_until(lambda: prompt.num_computed)
    chunks = {chunk.request: chunk.num_tokens for chunk in world.step().chunks}
    assert chunks == dict.fromkeys(streams, 1) | {prompt: 5}


def test_requests_start_in_order_of_arrival() -> None:
    world = World(num_blocks=40, max_running=3, max_step_tokens=4)
    requests = [world.add(3, 4) for _ in range(8)]
    world.drain()
    assert world.ended == requests


def test_out_of_blocks_the_youngest_waits_and_is_computed_again() -> None:
    world = World(num_blocks=1 + 10)
    old, young = world.add(4, 5), world.add(4, 5)
    world.run_until(lambda: young.num_preemptions)
    assert old.num_preemptions == 0
    assert young.num_computed == 0
    assert 0 < len(young.output_ids) < 5
    world.drain()
    assert world.ended == [old, young]
    assert len(young.output_ids) == 5


def test_a_request_waits_until_its_prompt_fits_beside_what_others_are_promised() -> None:
    world = World(num_blocks=1 + 10, max_step_tokens=2)
    first, second = world.add(8, 1), world.add(4, 1)
    world.step()
    world.run_until(lambda: second in world.scheduler.running or second in world.ended)
    assert first in world.ended
    world.drain()
    assert not world.scheduler.num_preemptions


def test_who_waits_for_an_adapter_lets_others_pass() -> None:
    world = World(load_steps=3, max_running=3, num_blocks=20)
    late, base = world.add(2, 1, "a"), world.add(2, 1)
    world.step()
    assert base in world.ended
    assert late in world.scheduler.waiting
    assert world.drain() == 3


def test_a_request_without_a_slot_is_not_starved_by_younger_ones() -> None:
    world = World(max_running=2, num_slots=1, num_blocks=40)
    world.add(1, 8, "a")
    world.step()
    starved = world.add(1, 2, "b")
    passed = [world.add(1, 8, "a")]
    world.step()
    assert passed[0] in world.scheduler.running, "before its time is up, it is passed over"
    for _ in range(40):  # a new request for the adapter in the slot, whenever there is place
        if len(world.open) < 4:
            passed.append(world.add(1, 8, "a"))
        world.step()
        if starved in world.ended:
            break
    assert starved in world.ended
    assert world.now_s - starved.arrived_s < 1 + 20 * STEP_S
    world.drain()


def test_a_starved_request_also_gets_slots_that_are_held_far_back_in_the_queue() -> None:
    world = World(max_running=2, num_slots=3, num_blocks=1 + 12)
    world.add(4, 8, "a")
    starved = world.add(1, 1, "xyz")
    preempted, behind = world.add(4, 8, "c"), world.add(1, 1, "d")
    world.run_until(lambda: preempted.num_preemptions)
    # The starved and the preempted request are all that may start, and behind them somebody holds a slot.
    assert world.scheduler.waiting == [starved, preempted, behind]
    assert behind.lease.is_ready
    world.drain()


def test_a_broken_adapter_fails_its_own_request_only() -> None:
    world = World(max_running=3, num_blocks=20)
    good, broken, base = world.add(2, 2, "a"), world.add(2, 2, "b", is_broken=True), world.add(2, 2)
    step = world.step()
    assert step.failed == [(broken, LEASE_FAILURE)]
    assert [chunk.request for chunk in step.chunks] == [good, base]
    world.drain()
    world.check_that_all_is_free()


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_a_removed_request_leaves_nothing_behind(when: str) -> None:
    world = World(num_blocks=20, max_running=2, max_step_tokens=4)
    is_there: dict[str, Callable[[], bool]] = {
        "waiting": lambda: True,
        "prefilling": lambda: 0 < request.num_computed < 6,
        "decoding": lambda: len(request.output_ids) == 2,
    }
    request, other = world.add(6, 8, "a"), world.add(1, 8, "b")
    world.run_until(is_there[when])
    world.remove(request)
    world.scheduler.check_integrity()
    assert len(other.block_ids) == world.pool.num_usable - world.pool.num_free
    world.drain()
    world.check_that_all_is_free()


def test_a_prompt_that_was_computed_before_is_found_for_the_same_adapters_and_salt_only() -> None:
    world = World(num_blocks=60, block_size=2, max_step_tokens=16, use_prefix_cache=True)
    prompt = [1, 2, 3, 4, 5, 6, 7]

    def num_found(length: int = 7, adapters: str = "", salt: str = "") -> int:
        request = world.add(length, 2, adapters, prompt=prompt[:length], salt=salt)
        world.drain()
        return request.num_cached_tokens

    assert num_found() == 0
    assert num_found() == 6
    assert num_found(6) == 4, "the last token is computed, for its logits"
    assert num_found(adapters="a") == 0
    assert num_found(adapters="a") == 6
    assert num_found(adapters="ab") == 0
    assert num_found(salt="tenant") == 0
    assert num_found(salt="tenant") == 6
    assert world.scheduler.num_prefix_hit_tokens == 6 + 4 + 6 + 6
    prompt[2] = 0
    assert num_found() == 2
    world.check_that_all_is_free()


def test_a_preempted_request_finds_again_what_nobody_has_overwritten() -> None:
    world = World(num_blocks=1 + 10, use_prefix_cache=True)
    old, young = world.add(4, 5, prompt=[1] * 4), world.add(4, 5, prompt=[2] * 4)
    world.run_until(lambda: young.num_preemptions)
    world.drain()
    assert world.ended == [old, young]
    assert young.num_cached_tokens > 0


def test_outputs_are_found_by_the_prompt_that_continues_them() -> None:
    world = World(num_blocks=40, block_size=2, max_step_tokens=16, use_prefix_cache=True)
    first = world.add(4, 5, prompt=[1, 2, 3, 4])
    world.drain()
    second = world.add(10, 1, prompt=[1, 2, 3, 4, *first.output_ids, 9])
    world.drain()
    assert second.num_cached_tokens == 8


def test_a_request_of_higher_priority_overtakes_those_that_wait_and_is_preempted_last() -> None:
    world = World(num_blocks=1 + 10, max_running=2)
    plain = [world.add(4, 5) for _ in range(2)]
    world.step()
    urgent = world.add(4, 2, priority=-1)
    world.run_until(lambda: urgent in world.ended)
    assert urgent.num_preemptions == 0
    world.drain()
    assert world.ended.index(urgent) < world.ended.index(plain[1])


def test_prompts_are_cut_to_the_time_that_a_step_should_take() -> None:
    pool = BlockPool(4_000, 4)
    scheduler = Scheduler(pool, max_running=4, max_step_tokens=512, target_step_s=0.1, use_prefix_cache=False)

    def add(num_prompt: int, max_new: int) -> GenerationRequest:
        sampling = SamplingParams(max_new_tokens=max_new)
        request = GenerationRequest("", [0] * num_prompt, sampling, emit=lambda _: None)
        scheduler.add(request, 0.0)
        return request

    def run() -> int:
        """One step at 20 ms and 1 ms per prompt token; returns its prompt tokens."""
        step = scheduler.schedule(0.0)
        num_prompt = sum(chunk.num_tokens for chunk in step.chunks if chunk.num_tokens > 1)
        for request in scheduler.commit(step):
            request.output_ids.append(0)
        scheduler.note_duration(step, 0.02 + 0.001 * num_prompt)
        return num_prompt

    add(512, 2_000)
    assert run() == 512, "nobody streams yet"
    run()
    add(2_000, 1)
    sizes = [run() for _ in range(12)]
    assert all(size <= 100 for size in sizes)
    assert 70 <= sizes[-1] <= 85
