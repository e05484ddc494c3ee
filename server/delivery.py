"""Events on their way from the engine's thread to the event loop, and the sequences that wait for them there."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from server.engine import EngineLoop, Event, Failed, Finished, GenerationRequest, Token, TokenLogprob

__all__ = ["Charge", "Delivery", "Generation", "GenerationGroup", "Timing", "charge_nobody"]

Charge = Callable[[int], None]
"""Takes numbers of tokens that a caller has used; on the event loop."""


def charge_nobody(num_tokens: int) -> None:
    """Where nobody's tokens are counted."""


class Delivery:
    """Carries events from the engine's thread to the event loop, once a step however many there are.

    What `emitter` returns, and `flush`, are called on the engine's thread.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: list[tuple[GenerationGroup, int, Event]] = []

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver on this event loop."""
        self._loop = loop

    def emitter(self, group: "GenerationGroup", index: int) -> Callable[[Event], None]:
        """What takes the events of a group's sequence."""
        return lambda event: self._pending.append((group, index, event))

    def flush(self) -> None:
        if not self._pending or self._loop is None:
            return
        pending, self._pending = self._pending, []
        try:
            self._loop.call_soon_threadsafe(_deliver, pending)
        except RuntimeError:  # the event loop is closed: nobody is left to hear it
            return


def _deliver(events: Sequence[tuple["GenerationGroup", int, Event]]) -> None:
    for group, index, event in events:
        group.put(index, event)


@dataclass(slots=True)
class Timing:
    """Moments of a call on the monotonic clock, in seconds; None until they have come."""

    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True)
class Generation:
    """One sequence of a group, as its caller sees it.

    Attributes:
        finished: its end; None while it runs.
        num_generated: tokens that have been taken.
        sum_logprob: of those tokens that came with a log-probability.
    """

    index: int
    request: GenerationRequest
    finished: Finished | None = None
    num_generated: int = 0
    sum_logprob: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def prompt_logprobs(self) -> list[TokenLogprob]:
        """Of the prompt's tokens from the second on, if they were asked for; complete when the first token is there."""
        return self.request.prompt_logprobs

    @property
    def mean_logprob(self) -> float:
        """What `best_of` ranks by."""
        return self.sum_logprob / max(self.num_generated, 1)


class GenerationGroup:
    """The sequences of one call. Iterate for their tokens, in the order in which they come.

    Attributes:
        generations: the sequences; those of one prompt stand side by side.
        adapter_generations: by name, of the adapters that answer.
    """

    def __init__(self, engine: EngineLoop, charge: Charge = charge_nobody) -> None:
        self._charge = charge
        self.timing = Timing()
        self.generations: list[Generation] = []
        self.adapter_generations: Mapping[str, int] = {}
        self._engine = engine
        self._events: deque[tuple[int, Event]] = deque()
        self._has_event = asyncio.Event()

    def add(self, request: GenerationRequest) -> None:
        """Take part in what becomes of a request; before it is submitted."""
        self.generations.append(Generation(len(self.generations), request))

    def put(self, index: int, event: Event) -> None:
        """On the event loop: take an event from the engine."""
        if not isinstance(event, Token):
            self._charge(len(self.generations[index].request.output_ids))
        if self.timing.first_token_s is None and isinstance(event, Token):
            self.timing.first_token_s = time.monotonic()
        elif isinstance(event, Finished):
            self.timing.finished_s = time.monotonic()
        self._events.append((index, event))
        self._has_event.set()

    async def __aiter__(self) -> AsyncIterator[tuple[Generation, Token]]:
        """Each token with its sequence, whose `finished` is set with the last one: both come in one step.

        Raises:
            ServerError: a sequence failed; tokens may have come before.
        """
        num_open = len(self.generations)
        while num_open:
            while not self._events:
                self._has_event.clear()
                await self._has_event.wait()
            index, event = self._events.popleft()
            generation = self.generations[index]
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):  # cancelled between two tokens
                generation.finished = event
                num_open -= 1
                continue
            generation.num_generated += 1
            generation.sum_logprob += event.logprob or 0.0
            if self._events:
                next_index, following = self._events[0]
                if next_index == index and isinstance(following, Finished):
                    self._events.popleft()
                    generation.finished = following
                    num_open -= 1
            yield generation, event

    def cancel(self) -> None:
        """Give up; harmless when all have ended."""
        for generation in self.generations:
            if generation.finished is None:
                self._engine.cancel(generation.request)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum({id(g.request.prompt_ids): g.num_prompt_tokens for g in self.generations}.values())

    @property
    def num_generated(self) -> int:
        return sum(generation.num_generated for generation in self.generations)

    @property
    def queue_s(self) -> float:
        """Seconds from arrival to the first step that worked on it."""
        request = self.generations[0].request
        return 0.0 if request.admitted_s is None else request.admitted_s - request.arrived_s
