"""Who computes how many tokens in the next step. Plain Python: no tensors, no threads, no clock of its own.

There is no prefill phase and no decode phase: every running request catches its computed tokens up to its tokens. A
request in steady decoding has one pending token; a new one has its whole prompt, which is cut to the step's budget.

    pending = 1            first, so that no prompt delays a running stream
    pending > 1            the rest of the budget, oldest request first
    waiting                admitted in turn while there is budget, a place and blocks for their prompt

The turn is by priority, then by fairness over tenants and adapters. What a request's tokens have in common with earlier
ones of the same adapters is found in the cache and not computed again. Out of blocks, the last running request gives
its blocks back and waits to be computed again from its tokens; the first always advances, so that no two take turns in
vain. A request whose adapters are still on their way is passed over; one that finds every slot held for longer than
`max_slot_wait_s` stops those behind it from taking slots, so that its turn comes.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice

from server.engine.blocks import BlockPool
from server.engine.fairness import Fairness
from server.engine.pacing import Pace
from server.engine.prefix import PrefixKeys
from server.engine.request import GenerationRequest
from server.errors import ServerError
from server.leases import LeaseState

__all__ = ["Chunk", "Scheduler", "Step"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of a request, to be computed in one step."""

    request: GenerationRequest
    start: int
    num_tokens: int

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """After it the request has seen all of its tokens, and its next one can be sampled."""
        return self.stop == self.request.num_tokens


@dataclass(slots=True)
class Step:
    """One step's work.

    Attributes:
        chunks: what to compute; at most one per request.
        new_blocks: blocks that were allocated for it and still hold somebody's old values.
        failed: requests that cannot run, with the reason; they are out of the scheduler already.
    """

    chunks: list[Chunk] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    failed: list[tuple[GenerationRequest, ServerError]] = field(default_factory=list)


def _order(request: GenerationRequest) -> tuple[int, int]:
    return request.priority, request.arrival


class Scheduler:
    """Requests in order of arrival, each either waiting or running.

    Args:
        pool: the cache blocks, used by nobody else.
        max_running: requests that may run at once.
        max_step_tokens: token budget of a step, at least `max_running`.
        max_slot_wait_s: after this long without a slot a request stops those behind it from taking slots.
        fairness: the order in which waiting requests of one priority start.
        target_step_s: prompts are cut so that a step with running streams takes about this long; None for no aim.
        use_prefix_cache: find and keep computed prompts.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_step_tokens: int,
        max_slot_wait_s: float = 1.0,
        fairness: Fairness | None = None,
        target_step_s: float | None = None,
        use_prefix_cache: bool = True,
    ) -> None:
        if not 1 <= max_running <= max_step_tokens:
            raise ValueError("max_step_tokens must be at least max_running, which must be at least 1")
        self.pool = pool
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.max_slot_wait_s = max_slot_wait_s
        self.waiting: list[GenerationRequest] = []
        self.running: list[GenerationRequest] = []
        self.num_preemptions = 0
        self._fairness = fairness or Fairness()
        self.num_prefix_tokens = 0
        self.num_prefix_hit_tokens = 0
        self.use_prefix_cache = use_prefix_cache
        self._pace = Pace(target_step_s)
        self._keys = PrefixKeys(pool.block_size)
        self._num_arrived = 0

    def add(self, request: GenerationRequest, now_s: float) -> None:
        """Queue a request whose tokens, all of them, fit into the pool."""
        request.arrival, request.arrived_s = self._num_arrived, now_s
        self._num_arrived += 1
        insort(self.waiting, request, key=_order)
        self._fairness.arrive(request)

    def remove(self, request: GenerationRequest) -> None:
        """Forget a request, wherever it is: its blocks and its lease are free at once."""
        (self.running if request in self.running else self.waiting).remove(request)
        self._free_blocks(request)
        self._fairness.leave(request)
        if request.lease is not None:
            request.lease.release()

    def schedule(self, now_s: float) -> Step:
        """Plan the next step. Blocks and slots are taken for it; nothing else changes until `commit`."""
        step = Step()
        num_preemptions = self.num_preemptions
        budget = self._continue_running(step)
        if self.num_preemptions == num_preemptions:
            self._admit(step, budget, now_s)
        return step

    def commit(self, step: Step) -> list[GenerationRequest]:
        """Record a step as computed; returns the requests whose next token can be sampled, in chunk order.

        Requests that have ended since it was planned are left alone.
        """
        chunks = [chunk for chunk in step.chunks if not chunk.request.is_finished]
        for chunk in chunks:
            chunk.request.num_computed = chunk.stop
            self._publish(chunk.request)
        return [chunk.request for chunk in chunks if chunk.is_last]

    def note_duration(self, step: Step, seconds: float) -> None:
        """Learn from the time that a step took."""
        num_streams = sum(chunk.num_tokens == 1 for chunk in step.chunks)
        self._pace.note(num_streams, sum(chunk.num_tokens for chunk in step.chunks) - num_streams, seconds)

    def check_integrity(self) -> None:
        """Assert that blocks, queues and leases agree."""
        assert not set(map(id, self.running)) & set(map(id, self.waiting)), "a request runs and waits"
        self.pool.check_integrity([block for request in self.running for block in request.block_ids])
        assert all(not request.block_ids and not request.num_computed for request in self.waiting)
        assert self.running == sorted(self.running, key=_order)
        assert self.waiting == sorted(self.waiting, key=_order)

    def _continue_running(self, step: Step) -> int:
        """Give running requests their tokens and blocks; returns the budget that is left."""
        num_streams = sum(request.num_pending == 1 for request in self.running)
        wanted = {request.arrival: 1 for request in self.running if request.num_pending == 1}
        budget = self._pace.max_prompt_tokens(num_streams, self.max_step_tokens - num_streams)
        for request in self.running:
            if request.num_pending > 1:
                wanted[request.arrival] = min(request.num_pending, budget)
                budget -= wanted[request.arrival]
        for request in list(self.running):
            num_tokens = wanted.get(request.arrival, 0)
            if num_tokens and request in self.running and self._grow(request, num_tokens, step):
                self._add_chunk(step, request, num_tokens)
        return budget

    def _grow(self, request: GenerationRequest, num_tokens: int, step: Step) -> bool:
        """Get the blocks for `num_tokens` more, from the youngest if need be; False if that is the request itself."""
        missing = self.pool.blocks_for(request.num_computed + num_tokens) - len(request.block_ids)
        while missing > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        blocks = self.pool.allocate(max(missing, 0))
        request.block_ids += blocks
        step.new_blocks += blocks
        return True

    def _num_promised(self) -> int:
        """Blocks that running requests still need for the tokens they have."""
        needed = sum(self.pool.blocks_for(request.num_tokens) for request in self.running)
        return needed - sum(len(request.block_ids) for request in self.running)

    def _preempt(self, request: GenerationRequest) -> None:
        self.running.remove(request)
        self._free_blocks(request)
        request.num_computed = request.num_published = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, request, key=_order)

    def _free_blocks(self, request: GenerationRequest) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        """Start waiting requests, in fair order; those whose adapters are not there yet are passed over."""
        before_reservation: set[GenerationRequest] | None = None
        seen: set[GenerationRequest] = set()
        # Those further back cannot start in this step.
        for request in islice(self._in_turn(), self.max_running):
            if before_reservation is not None and request.lease is not None:
                continue
            seen.add(request)
            try:
                state = LeaseState.READY if request.lease is None else request.lease.activate()
            except ServerError as error:
                self.remove(request)
                step.failed.append((request, error))
                continue
            if state is LeaseState.NO_SLOT and now_s - request.arrived_s > self.max_slot_wait_s:
                before_reservation = set(seen)
            if state is not LeaseState.READY:
                continue
            if budget <= 0 or len(self.running) >= self.max_running:
                break
            found = self._find(request)
            # Blocks for all of its tokens, so that it is not started only to be preempted.
            needed = self.pool.blocks_for(request.num_tokens) - len(found) + self.pool.count_free(found)
            if needed > self.pool.num_free - self._num_promised():
                break
            self._start(request, found, budget, step, now_s)
            budget -= step.chunks[-1].num_tokens
        if before_reservation is not None:
            for request in self.waiting:
                if request not in before_reservation and request.lease is not None:
                    request.lease.deactivate()  # it may hold slots from when its turn was earlier

    def _start(self, request: GenerationRequest, found: list[int], budget: int, step: Step, now_s: float) -> None:
        self.waiting.remove(request)
        insort(self.running, request, key=_order)
        self._fairness.start()
        if request.admitted_s is None:
            request.admitted_s = now_s
        self.pool.share(found)
        request.num_published = len(found)
        request.num_computed = request.num_cached_tokens = len(found) * self.pool.block_size
        num_tokens = min(request.num_pending, budget)
        blocks = self.pool.allocate(self.pool.blocks_for(request.num_computed + num_tokens) - len(found))
        request.block_ids = found + blocks
        step.new_blocks += blocks
        self._add_chunk(step, request, num_tokens)
        self.num_prefix_tokens += request.num_tokens
        self.num_prefix_hit_tokens += request.num_cached_tokens

    def _add_chunk(self, step: Step, request: GenerationRequest, num_tokens: int) -> None:
        chunk = Chunk(request, request.num_computed, num_tokens)
        step.chunks.append(chunk)
        self._fairness.charge(request, chunk.start, chunk.stop)

    def _in_turn(self) -> Iterator[GenerationRequest]:
        """Waiting requests, the next one first."""
        for _, group in groupby(list(self.waiting), key=lambda request: request.priority):
            yield from self._fairness.order(group)

    def _find(self, request: GenerationRequest) -> list[int]:
        """Cached blocks with the start of a request's tokens; at least the last token is left to be computed."""
        if not self.use_prefix_cache or request.sampling.prompt_logprobs:  # those come from computing
            return []
        num_blocks = (request.num_tokens - 1) // self.pool.block_size
        return self.pool.find(self._keys.extend(request, num_blocks))

    def _publish(self, request: GenerationRequest) -> None:
        """Let others find the blocks that have become full."""
        num_full = request.num_computed // self.pool.block_size
        if not self.use_prefix_cache or num_full <= request.num_published:
            return
        keys = self._keys.extend(request, num_full)
        for i in range(request.num_published, num_full):
            self.pool.publish(request.block_ids[i], keys[i])
        request.num_published = num_full
