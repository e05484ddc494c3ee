"""Who starts next: shares by tenant and adapter, nothing saved up by a pause, no wait without bound."""

import random
from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import GenerationRequest, SamplingParams
from server.engine.blocks import BlockPool
from server.engine.fairness import Fairness
from server.engine.scheduler import Scheduler


class Queue:
    """Waiting requests that are served whole, one after the other."""

    def __init__(self, fairness: Fairness) -> None:
        self.fairness = fairness
        self.waiting: list[GenerationRequest] = []
        self.num_arrived = 0

    def add(self, tenant: str = "", flow: Hashable = None, num_prompt: int = 10, max_new: int = 1) -> GenerationRequest:
        request = GenerationRequest(
            "", [0] * num_prompt, SamplingParams(max_new_tokens=max_new), lambda _: None, tenant=tenant, flow=flow
        )
        request.arrival = self.num_arrived
        self.num_arrived += 1
        self.fairness.arrive(request)
        self.waiting.append(request)
        return request

    def serve(self) -> GenerationRequest:
        request = next(self.fairness.order(self.waiting))
        self.waiting.remove(request)
        self.fairness.start()
        self.fairness.charge(request, 0, len(request.prompt_ids) + request.sampling.max_new_tokens)
        self.fairness.leave(request)
        return request


def never_oldest(**weights: float) -> Fairness:
    return Fairness(lambda tenant: weights.get(tenant, 1.0), oldest_every=1 << 30)


def test_one_flow_is_served_in_order_of_arrival() -> None:
    queue = Queue(Fairness())
    added = [queue.add() for _ in range(30)]
    assert [queue.serve() for _ in range(30)] == added


def test_a_flood_does_not_delay_a_newcomer() -> None:
    for newcomer in ({"tenant": "small"}, {"tenant": "", "flow": "other adapter"}):
        queue = Queue(never_oldest())
        for _ in range(500):
            queue.add()
        for _ in range(100):
            queue.serve()
        small = queue.add(**newcomer)
        assert small in [queue.serve() for _ in range(2)]


def test_tenants_get_tokens_by_their_weights() -> None:
    queue = Queue(never_oldest(gold=3.0))
    rng = random.Random(0)
    got: Counter[str] = Counter()
    for _ in range(800):
        for tenant in ("gold", "plain"):
            queue.add(tenant, num_prompt=rng.randrange(1, 50))
    for _ in range(600):
        request = queue.serve()
        got[request.tenant] += len(request.prompt_ids) + 2
    assert got["gold"] / got["plain"] == pytest.approx(3.0, rel=0.05)


def test_adapters_of_a_tenant_share_equally_whatever_their_number_of_requests() -> None:
    queue = Queue(never_oldest())
    for i in range(900):
        queue.add("t", "busy")
        if i % 9 == 0:
            queue.add("t", "calm")
    served = Counter(queue.serve().flow for _ in range(200))
    assert served["calm"] == 100


def test_many_adapters_do_not_give_a_tenant_a_larger_share() -> None:
    queue = Queue(never_oldest())
    for i in range(400):
        queue.add("many", i)
        queue.add("one", 0)
    served = Counter(queue.serve().tenant for _ in range(400))
    assert served["many"] == served["one"]


def test_a_pause_saves_nothing_up() -> None:
    queue = Queue(never_oldest())
    for _ in range(300):
        queue.add("busy")
    for _ in range(200):
        queue.serve()
    for _ in range(100):
        queue.add("back again")
    served = [queue.serve().tenant for _ in range(100)]
    assert 49 <= served.count("back again") <= 51
    assert "busy" in served[:3]


def test_output_tokens_cost_twice_and_what_is_computed_again_is_free() -> None:
    queue = Queue(never_oldest())
    a, b = queue.add("a", num_prompt=10, max_new=10), queue.add("b", num_prompt=29)
    queue.fairness.charge(a, 0, 6)
    queue.fairness.charge(a, 0, 10)  # preempted, and computed from the start
    queue.fairness.charge(a, 10, 20)
    queue.fairness.charge(b, 0, 29)
    waiting = [queue.add("a"), queue.add("b")]
    assert [one.tenant for one in queue.fairness.order(waiting)] == ["b", "a"]  # 29 before 30


def test_every_so_manieth_start_is_the_oldest_request_s() -> None:
    """Newcomers whose counters are always lower cannot keep somebody waiting for ever."""
    queue = Queue(Fairness(oldest_every=8))
    for _ in range(20):
        queue.add("", "heavy", num_prompt=10_000)
    queue.serve()
    starved = queue.waiting[0]
    for i in range(200):
        queue.add("", f"new{i}")
        if queue.serve() is starved:
            break
    assert i < 8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds_hold_for_any_arrivals(data: st.DataObject) -> None:
    """No request waits for more than (older ones + 1) · oldest_every starts, and all of them are served."""
    oldest_every = data.draw(st.integers(1, 6))
    queue = Queue(Fairness(oldest_every=oldest_every))
    bounds: dict[GenerationRequest, int] = {}
    num_starts = 0
    steps = data.draw(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(0, 3)), max_size=80))
    for is_arrival, tenant, flow in [*steps, *[(False, "", 0)] * 80]:
        if is_arrival:
            bounds[queue.add(tenant, flow)] = num_starts + (len(queue.waiting) + 1) * oldest_every
        elif queue.waiting:
            order = list(queue.fairness.order(queue.waiting))
            assert sorted(order, key=id) == sorted(queue.waiting, key=id), "each once"
            assert num_starts <= bounds[queue.serve()]
            num_starts += 1
    assert not queue.waiting


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 40)), min_size=2, max_size=60))
def test_backlogged_tenants_never_differ_by_more_than_two_requests(arrivals: list[tuple[str, int]]) -> None:
    """The fairness bound of virtual token counters: while both wait, they differ by twice the largest request."""
    queue = Queue(never_oldest())
    for tenant, num_prompt in arrivals:
        queue.add(tenant, num_prompt=num_prompt)
    got = Counter({"a": 0, "b": 0})
    while {request.tenant for request in queue.waiting} == {"a", "b"}:
        request = queue.serve()
        got[request.tenant] += len(request.prompt_ids) + 2
        assert abs(got["a"] - got["b"]) <= 2 * 42


def test_idle_accounts_are_forgotten_in_the_end() -> None:
    queue = Queue(Fairness())
    for i in range(10_000):
        queue.add(f"tenant{i}", i)
        queue.serve()
    assert len(queue.fairness._tenants.by_key) <= 4097


def test_a_running_flood_gives_the_next_place_to_the_newcomer() -> None:
    pool = BlockPool(200, 4)
    scheduler = Scheduler(pool, max_running=4, max_step_tokens=16)
    requests: list[GenerationRequest] = []

    def add(tenant: str) -> GenerationRequest:
        request = GenerationRequest("", [0] * 4, SamplingParams(max_new_tokens=5), lambda _: None, tenant=tenant)
        scheduler.add(request, 0.0)
        requests.append(request)
        return request

    def step() -> None:
        for request in scheduler.commit(scheduler.schedule(0.0)):
            request.output_ids.append(0)
            if len(request.output_ids) == request.sampling.max_new_tokens:
                scheduler.remove(request)

    for _ in range(100):
        add("flood")
    for _ in range(3):
        step()
    small = add("small")
    running = set(scheduler.running)
    while small in scheduler.waiting:
        assert not set(scheduler.running) - running, "another one was started before"
        step()
    while scheduler.running or scheduler.waiting:
        step()
        scheduler.check_integrity()
    assert pool.num_free == pool.num_usable
