"""From a prompt in a request to a stream of events: the one way into the engine."""

import asyncio
import copy
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from server.engine import EngineLoop, Event, Failed, Finished, GenerationRequest, SamplingParams, Token
from server.engine.ports import AdapterLease
from server.text import TextCodec

__all__ = ["AdapterDirectory", "Delivery", "Generation", "GenerationService"]


class NamedLease(AdapterLease, Protocol):
    """A lease that knows under which names and generations it was asked for."""

    @property
    def generations(self) -> Mapping[str, int]: ...


Charge = Callable[[int], None]
"""Takes the tokens of a request, prompt and output together, when it has ended; on the event loop."""


def _charge_nobody(num_tokens: int) -> None:
    """Where nobody's tokens are counted."""


class AdapterDirectory(Protocol):
    """Turns names into leases."""

    def open_lease(self, weights: Mapping[str, float]) -> NamedLease | None: ...


class Delivery:
    """Carries events from the engine's thread to the event loop, once a step however many there are.

    `emit` and `flush` are called on the engine's thread.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: list[tuple[Generation, Event]] = []

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver on this event loop."""
        self._loop = loop

    def emit(self, generation: "Generation", event: Event) -> None:
        self._pending.append((generation, event))

    def flush(self) -> None:
        if not self._pending or self._loop is None:
            return
        pending, self._pending = self._pending, []
        try:
            self._loop.call_soon_threadsafe(_deliver, pending)
        except RuntimeError:  # the event loop is closed: nobody is left to hear it
            return


def _deliver(events: Sequence[tuple["Generation", Event]]) -> None:
    for generation, event in events:
        generation.put(event)


@dataclass(slots=True)
class Timing:
    """Moments of a generation on the monotonic clock, in seconds; None until they have come."""

    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    finished_s: float | None = None


class Generation:
    """One accepted request, as its caller sees it: iterate for tokens, read the rest when the iteration is over.

    Attributes:
        adapter_generations: generation by adapter name, of the adapters that answer it.
        finished: the last event; None while it runs.
    """

    def __init__(
        self, engine: EngineLoop, timing: Timing, adapter_generations: Mapping[str, int], charge: Charge
    ) -> None:
        self._engine = engine
        self._charge = charge
        self.timing = timing
        self.adapter_generations = adapter_generations
        self.request: GenerationRequest | None = None
        self.finished: Finished | None = None
        self.num_generated = 0
        self._events: deque[Event] = deque()
        self._has_event = asyncio.Event()

    def put(self, event: Event) -> None:
        """On the event loop: take an event from the engine."""
        now = time.monotonic()
        if isinstance(event, Token):
            self.num_generated += 1
            if self.timing.first_token_s is None:
                self.timing.first_token_s = now
        else:
            self.timing.finished_s = now
            if self.request is not None:
                self._charge(len(self.request.prompt_ids) + self.num_generated)
        self._events.append(event)
        self._has_event.set()

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The tokens as they come.

        Raises:
            ServerError: the request failed; tokens may have come before.
        """
        while True:
            while not self._events:
                self._has_event.clear()
                await self._has_event.wait()
            event = self._events.popleft()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                self.finished = event
                return
            yield event

    @property
    def is_complete(self) -> bool:
        """All tokens that will come have been taken: the last token's step also brings the end."""
        return bool(self._events) and isinstance(self._events[0], Finished)

    def cancel(self) -> None:
        """Give up; harmless when it has ended."""
        if self.request is not None:
            self._engine.cancel(self.request)

    @property
    def queue_s(self) -> float:
        """Seconds from arrival to the first step that worked on it."""
        request = self.request
        return 0.0 if request is None or request.admitted_s is None else request.admitted_s - request.arrived_s


class GenerationService:
    """Starts generations.

    Args:
        default_max_new_tokens: for requests that name none; cut to what the context leaves.
    """

    def __init__(
        self,
        engine: EngineLoop,
        codec: TextCodec,
        adapters: AdapterDirectory,
        delivery: Delivery,
        *,
        default_max_new_tokens: int,
    ) -> None:
        self.engine = engine
        self.codec = codec
        self._adapters = adapters
        self._delivery = delivery
        self._default_max_new_tokens = default_max_new_tokens
        self._charge: Charge = _charge_nobody

    def for_caller(self, adapters: AdapterDirectory, *, charge: Charge) -> "GenerationService":
        """The same for one caller: it knows these adapters, and `charge` is told what each of its requests used."""
        service = copy.copy(self)
        service._adapters = adapters
        service._charge = charge
        return service

    async def start(
        self,
        prompt: str,
        sampling: SamplingParams,
        *,
        adapters: Mapping[str, float],
        stop: Sequence[str] = (),
    ) -> Generation:
        """Submit a request.

        Args:
            sampling: `max_new_tokens` 0 stands for the default.
            adapters: weight by name; empty for the base model.

        Raises:
            ServerError: unknown adapter, prompt too long, queue full, and so on; nothing was started then.
        """
        timing = Timing()
        lease = self._adapters.open_lease(adapters)
        try:
            prompt_ids = await asyncio.to_thread(self.codec.encode, prompt)
            if not sampling.max_new_tokens:
                sampling = self._with_default_length(sampling, len(prompt_ids))
            generation = Generation(self.engine, timing, {} if lease is None else lease.generations, self._charge)
            generation.request = GenerationRequest(
                request_id=uuid.uuid4().hex,
                prompt_ids=prompt_ids,
                sampling=sampling,
                emit=lambda event: self._delivery.emit(generation, event),
                lease=lease,
                text=self.codec.stream(prompt_ids, stop),
            )
            self.engine.submit(generation.request)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return generation

    def _with_default_length(self, sampling: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        room = self.engine.runner.max_model_len - num_prompt_tokens
        return replace(sampling, max_new_tokens=max(1, min(self._default_max_new_tokens, room)))
