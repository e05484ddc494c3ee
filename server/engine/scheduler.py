"""Who computes how many tokens in the next step. Plain Python: no tensors, no threads, no clock of its own.

There is no prefill phase and no decode phase: every running request catches its computed tokens up to its tokens. A
request in steady decoding has one pending token; a new one has its whole prompt, which is cut to the step's budget.

    pending = 1            first, so that no prompt delays a running stream
    pending > 1            the rest of the budget, oldest request first
    waiting                admitted in fair order while there is budget, a place and blocks for their prompt

Out of blocks, the youngest running request gives its blocks back and waits to be computed again from its tokens; the
oldest always advances. A request whose adapters are still on their way is passed over; one that finds every slot held
for longer than `max_slot_wait_s` stops those behind it from taking slots, so that its turn comes.
"""

from bisect import insort
from dataclasses import dataclass, field
from itertools import islice

from server.engine.blocks import BlockPool
from server.engine.fairness import Fairness
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


def _arrival(request: GenerationRequest) -> int:
    return request.arrival


class Scheduler:
    """Requests in order of arrival, each either waiting or running.

    Args:
        pool: the cache blocks, used by nobody else.
        max_running: requests that may run at once.
        max_step_tokens: token budget of a step, at least `max_running`.
        max_slot_wait_s: after this long without a slot a request stops those behind it from taking slots.
        fairness: the order in which waiting requests start.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_step_tokens: int,
        max_slot_wait_s: float = 1.0,
        fairness: Fairness | None = None,
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
        self._num_arrived = 0

    def add(self, request: GenerationRequest, now_s: float) -> None:
        """Queue a request whose tokens, all of them, fit into the pool."""
        request.arrival, request.arrived_s = self._num_arrived, now_s
        self._num_arrived += 1
        self.waiting.append(request)
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
        """Record a step as computed; returns the requests whose next token can be sampled, in chunk order."""
        for chunk in step.chunks:
            chunk.request.num_computed = chunk.stop
        return [chunk.request for chunk in step.chunks if chunk.is_last]

    def check_integrity(self) -> None:
        """Assert that blocks, queues and leases agree."""
        assert not set(map(id, self.running)) & set(map(id, self.waiting)), "a request runs and waits"
        self.pool.check_integrity([block for request in self.running for block in request.block_ids])
        assert all(not request.block_ids and not request.num_computed for request in self.waiting)
        assert self.running == sorted(self.running, key=_arrival)
        assert self.waiting == sorted(self.waiting, key=_arrival)

    def _continue_running(self, step: Step) -> int:
        """Give running requests their tokens and blocks; returns the budget that is left."""
        budget = self.max_step_tokens
        wanted: dict[int, int] = {}
        for request in sorted(self.running, key=lambda request: (request.num_pending > 1, request.arrival)):
            wanted[request.arrival] = min(request.num_pending, budget)
            budget -= wanted[request.arrival]
        for request in list(self.running):
            num_tokens = wanted[request.arrival]
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
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, request, key=_arrival)

    def _free_blocks(self, request: GenerationRequest) -> None:
        self.pool.free(request.block_ids)
        request.block_ids = []

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        """Start waiting requests, in fair order; those whose adapters are not there yet are passed over."""
        before_reservation: set[GenerationRequest] | None = None
        seen: set[GenerationRequest] = set()
        # Those further back cannot start in this step.
        for request in islice(self._fairness.order(self.waiting), self.max_running):
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
            # Blocks for all of its tokens, so that it is not started only to be preempted.
            fits = self.pool.blocks_for(request.num_tokens) <= self.pool.num_free - self._num_promised()
            if budget <= 0 or len(self.running) >= self.max_running or not fits:
                break
            self._start(request, min(request.num_pending, budget), step, now_s)
            budget -= step.chunks[-1].num_tokens
        if before_reservation is not None:
            for request in self.waiting:
                if request not in before_reservation and request.lease is not None:
                    request.lease.deactivate()  # it may hold slots from when its turn was earlier

    def _start(self, request: GenerationRequest, num_tokens: int, step: Step, now_s: float) -> None:
        self.waiting.remove(request)
        insort(self.running, request, key=_arrival)
        self._fairness.start()
        if request.admitted_s is None:
            request.admitted_s = now_s
        blocks = self.pool.allocate(self.pool.blocks_for(num_tokens))
        request.block_ids = blocks
        step.new_blocks += blocks
        self._add_chunk(step, request, num_tokens)

    def _add_chunk(self, step: Step, request: GenerationRequest, num_tokens: int) -> None:
        chunk = Chunk(request, request.num_computed, num_tokens)
        step.chunks.append(chunk)
        self._fairness.charge(request, chunk.start, chunk.stop)
