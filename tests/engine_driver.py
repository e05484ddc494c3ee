"""Running an engine in a test: requests in, everything that came out of them back."""

import queue
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from server.engine import EngineLoop, Event, GenerationRequest, ModelRunner, SamplingParams, Token, TokenLogprob
from server.leases import LeaseState

TIMEOUT_S = 60.0


@dataclass(eq=False)
class FixedLease:
    """A lease on slots that are loaded already."""

    slots: Mapping[int, float]
    num_releases: int = 0
    num_activations: int = 0

    @property
    def key(self) -> tuple[tuple[int, float], ...]:
        return tuple(sorted(self.slots.items()))

    def activate(self) -> LeaseState:
        self.num_activations += 1
        return LeaseState.READY

    def deactivate(self) -> None: ...

    def release(self) -> None:
        self.num_releases += 1


@dataclass
class Outcome:
    """All events of one request, and the log-probabilities of its prompt when its first token came."""

    events: list[Event] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def logprobs(self) -> list[float | None]:
        return [event.logprob for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Token))

    @property
    def terminal(self) -> Event:
        ends = [event for event in self.events if not isinstance(event, Token)]
        assert len(ends) == 1, f"{len(ends)} terminal events"
        assert self.events[-1] is ends[0], "events after the end"
        return ends[0]


class Driver:
    """Submits requests to an engine and waits for their ends."""

    def __init__(self, engine: EngineLoop) -> None:
        self.engine = engine
        self._ended: queue.Queue[int] = queue.Queue()
        self._outcomes: list[Outcome] = []

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        lease: FixedLease | None = None,
        text: object = None,
    ) -> GenerationRequest:
        index = len(self._outcomes)
        outcome = Outcome()
        self._outcomes.append(outcome)

        def emit(event: Event) -> None:
            if not outcome.events:
                outcome.prompt_logprobs = list(request.prompt_logprobs)
            outcome.events.append(event)
            if not isinstance(event, Token):
                self._ended.put(index)

        request = GenerationRequest(str(index), list(prompt_ids), sampling, emit, lease, text)
        self.engine.submit(request)
        return request

    @property
    def outcomes(self) -> list[Outcome]:
        """What there is by now."""
        return self._outcomes

    def wait(self) -> list[Outcome]:
        """All outcomes, once every request has ended; then the engine's books are checked."""
        for _ in self._outcomes:
            self._ended.get(timeout=TIMEOUT_S)
        deadline = time.monotonic() + TIMEOUT_S
        while self.engine.stats.num_free_blocks != self.engine.stats.num_blocks and time.monotonic() < deadline:
            time.sleep(0.001)
        self.engine.check_integrity()
        return self._outcomes


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, logprobs=True)


def generate_rows(
    runner: ModelRunner, rows: Iterable[tuple[Sequence[int], Mapping[int, float]]], num_tokens: int
) -> list[Outcome]:
    """What one engine makes of prompts side by side, each with so much of the adapters in these slots."""
    driver = Driver(engine := EngineLoop(runner))
    for prompt, slots in rows:
        driver.submit(prompt, greedy(num_tokens), FixedLease(slots) if slots else None)
    engine.start()
    try:
        return driver.wait()
    finally:
        engine.close()


def logprob_errors(model: Any, prompt: Sequence[int], outcome: Outcome) -> Tensor:
    """How far the log-probabilities of an output's tokens are from those that a model gives them, [tokens]."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *outcome.tokens[:-1]]], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    wanted = logits.float().log_softmax(-1)[range(len(outcome.tokens)), outcome.tokens]
    return (torch.tensor(outcome.logprobs) - wanted.cpu()).abs()
