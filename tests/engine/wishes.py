"""Random requests of every kind that a step launched ahead of time could get wrong, and their way through an engine."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.engine import EngineLoop, GenerationRequest, SamplingParams, Token, TokenLogprob
from tests.engine_driver import Driver, FixedLease, Outcome
from tests.tiny_models import VOCABULARY

__all__ = ["HeldLease", "NoRepeat", "StopText", "Wish", "assert_equal", "random_wish", "run_wishes"]

WEIGHTS: list[dict[int, float]] = [{}, {0: 1.0}, {1: 1.0}, {0: 0.5, 1: -0.7}]


@dataclass
class StopText:
    """Ends at the first token whose number leaves no rest."""

    divisor: int

    def push(self, token_id: int) -> tuple[str, bool]:
        return f"<{token_id}>", token_id % self.divisor == 0

    def finish(self) -> str:
        return "."


@dataclass
class NoRepeat:
    """A grammar: any token but those that were accepted."""

    seen: set[int] = field(default_factory=set)

    def forbidden(self) -> bytearray:
        return bytearray(token in self.seen for token in range(VOCABULARY))

    def accept(self, token_id: int) -> bool:
        assert token_id not in self.seen
        self.seen.add(token_id)
        return len(self.seen) == 9


@dataclass(frozen=True)
class Wish:
    """One request; `weights` are of slots, or of whatever `run_wishes` makes leases for."""

    prompt: list[int]
    sampling: SamplingParams
    weights: dict[int, float]
    divisor: int | None = None
    has_grammar: bool = False
    cancel_after: int | None = None


def random_wish(
    *,
    is_simple: bool,
    max_prompt: int = 40,
    max_new: int = 30,
    weights: Sequence[dict[int, float]] = WEIGHTS,
) -> Wish:
    """A simple one asks for nothing that has to be read before the next step."""
    kind = random.choice(["plain", "plain", "prompt"] if is_simple else ["plain", "grammar", "penalty", "prompt"])
    options: dict[str, Any] = {"seed": random.randrange(1 << 40)}
    if random.random() < 0.6:
        options |= {"temperature": random.uniform(0.5, 2), "top_p": random.choice([1, 0.9]), "min_p": 0.01}
        options |= {"top_k": random.choice([0, 20]), "typical_p": random.choice([1, 0.9])}
    if kind == "penalty":
        options |= {"repetition_penalty": 1.5, "min_tokens": 3, "logit_bias": {5: 4.0}}
    stops = frozenset(random.sample(range(VOCABULARY), VOCABULARY // 20)) if random.random() < 0.5 else frozenset()
    params = SamplingParams(
        max_new_tokens=random.randint(1, max_new), ignore_eos=random.random() < 0.5, stop_token_ids=stops,
        logprobs=True, num_top_logprobs=random.choice([0, 2]), prompt_logprobs=kind == "prompt", **options,
    )  # fmt: skip
    return Wish(
        [random.randrange(3, VOCABULARY) for _ in range(random.randint(1, max_prompt))],
        params,
        random.choice(weights),
        random.choice([None, None, 17]),
        kind == "grammar",
        random.choice([None, None, None, 4]),
    )


class HeldLease(FixedLease):
    """Sees that no step which reads its adapters is under way when it is released."""

    engine: EngineLoop
    request: GenerationRequest

    def release(self) -> None:
        super().release()
        for launched in self.engine._launched:
            assert all(self.request is not chunk.request for chunk in launched.step.chunks)


def run_wishes(
    engine: EngineLoop, wishes: Sequence[Wish], make_lease: Callable[[dict[int, float]], Any] = HeldLease
) -> list[Outcome]:
    """Start the engine, wait for all ends, and close it."""
    driver = Driver(engine)
    leases = []
    for wish in wishes:
        lease = make_lease(wish.weights)
        leases.append(lease)
        text = None if wish.divisor is None else StopText(wish.divisor)
        request = driver.submit(wish.prompt, wish.sampling, lease, text)
        lease.engine, lease.request = engine, request
        request.constraint = NoRepeat() if wish.has_grammar else None
        if wish.cancel_after is not None:
            request.emit = _cancelling(engine, request, wish.cancel_after)
    engine.start()
    outcomes = driver.wait()
    engine.close()
    assert all(lease.num_releases == 1 for lease in leases)
    for wish, outcome in zip(wishes, outcomes, strict=True):
        if wish.sampling.prompt_logprobs and outcome.tokens:
            assert [each.token_id for each in outcome.prompt_logprobs] == wish.prompt[1:]
    return outcomes


def _cancelling(engine: EngineLoop, request: GenerationRequest, after: int) -> Any:
    emit, seen = request.emit, Counter[str]()

    def cancel(event: Any) -> None:
        emit(event)
        seen["tokens"] += isinstance(event, Token)
        if isinstance(event, Token) and seen["tokens"] == after:
            engine.cancel(request)

    return cancel


def assert_equal(ahead: list[Outcome], plain: list[Outcome]) -> None:
    """The same tokens, texts, ends and log-probabilities."""
    for row, (own, theirs) in enumerate(zip(ahead, plain, strict=True)):
        assert own.tokens == theirs.tokens, row
        assert own.text == theirs.text, row
        assert own.terminal == theirs.terminal, row
        assert own.logprobs == pytest.approx(theirs.logprobs, abs=1e-3), row
        if own.tokens:  # else it may have been cancelled in the midst of its prompt
            assert_equal_prompts(own.prompt_logprobs, theirs.prompt_logprobs)


def assert_equal_prompts(found: Sequence[TokenLogprob], wanted: Sequence[TokenLogprob]) -> None:
    assert [each.token_id for each in found] == [each.token_id for each in wanted]
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in wanted], abs=1e-3)
    for each, other in zip(found, wanted, strict=True):
        assert [value for _, value in each.top] == pytest.approx([value for _, value in other.top], abs=1e-3)
