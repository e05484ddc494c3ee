"""Steps launched before the one before was read: the same tokens and ends as one step at a time."""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.maths import Folded
from server.engine import (
    EngineConfig,
    EngineLoop,
    Failed,
    GenerationRequest,
    ModelRunner,
    SamplingParams,
    TokenLogprob,
    sampling,
)
from server.engine import loop as loop_module
from server.engine.batch import PromptLogprobs, PromptRows, with_tokens
from tests.engine.recorded_graph import SYNCS
from tests.engine.wishes import Wish, assert_equal, random_wish, run_wishes
from tests.engine_driver import Driver, FixedLease, Outcome
from tests.stand_in_device import AwayTensor, StandInDevice
from tests.tiny_models import VOCABULARY, tiny_model

BLOCK = 4
CONFIG = EngineConfig(
    max_running=5, max_step_tokens=16, max_slots=3, block_size=BLOCK, kv_bytes=1 << 22, max_model_len=96, run_ahead=True
)
LONG: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "stop_token_ids": frozenset()}


@pytest.fixture(scope="module")
def runners() -> tuple[ModelRunner, ModelRunner]:
    """One that reads each step before the next, and one that runs ahead; with the same adapters."""
    model = tiny_model("llama", random.randrange(1 << 30))
    both = tuple(ModelRunner(m, replace(CONFIG, run_ahead=m is not model)) for m in (model, copy.deepcopy(model)))
    for slot in range(2):
        parts = {
            name: Folded(torch.randn(3, layer.in_features) / 8, torch.randn(3, layer.out_features) / 8, None)
            for name, layer in both[0].layers.items()
            if name != "lm_head"
        }
        for runner in both:
            runner.bank.load(slot, parts)
    return both  # type: ignore[return-value]


def _run(runner: ModelRunner, wishes: list[Wish]) -> tuple[list[Outcome], EngineLoop]:
    engine = EngineLoop(runner)
    return run_wishes(engine, wishes), engine


@pytest.mark.parametrize("is_simple", [True, False])
def test_the_tokens_are_the_same(runners: tuple[ModelRunner, ModelRunner], is_simple: bool) -> None:
    wishes = [random_wish(is_simple=is_simple) for _ in range(24)]
    wishes += [random_wish(is_simple=True) for _ in range(8)]  # in the end no other has to be read first
    plain, engine = _run(runners[0], wishes)
    assert not engine.stats.num_steps_ahead
    ahead, engine = _run(runners[1], wishes)
    assert_equal(ahead, plain)
    assert engine.stats.num_steps_ahead > (engine.stats.num_steps // 2 if is_simple else 0)


def test_the_tokens_are_the_same_through_preemption(runners: tuple[ModelRunner, ModelRunner]) -> None:
    wishes = [random_wish(is_simple=True) for _ in range(8)]
    wishes += [
        Wish([random.randrange(3, VOCABULARY) for _ in range(9 + i)], replace(wish.sampling, **LONG), {i % 2: 1.0})
        for i, wish in enumerate(wishes[:5])
    ]
    outcomes = []
    for runner in runners:
        config, cache = runner.config, runner.cache
        per_block = cache.num_bytes // cache.num_blocks
        runner.config = replace(config, kv_bytes=per_block * (1 + 100 // BLOCK))
        runner.cache = runner._make_cache()
        try:
            found, engine = _run(runner, wishes)
        finally:
            runner.config, runner.cache = config, cache
        outcomes.append(found)
        assert engine.stats.num_preemptions
    assert_equal(outcomes[1], outcomes[0])


def test_what_the_step_before_needs_is_read_first(runners: tuple[ModelRunner, ModelRunner]) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    outcomes, engine = _run(runners[1], [Wish([5, 6], params, {}, has_grammar=True)])
    assert len(set(outcomes[0].tokens)) == 9
    assert not engine.stats.num_steps_ahead


def test_a_failed_step_fails_its_requests_once(
    runners: tuple[ModelRunner, ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Iterator[int] = iter(range(1_000))
    draw = loop_module.draw

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 5:
            raise RuntimeError("out of memory")
        return draw(*args, **kwargs)

    monkeypatch.setattr(loop_module, "draw", failing)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    outcomes, engine = _run(runners[1], [Wish([5, 6], params, {0: 1.0}), Wish([7], params, {})])
    assert all(isinstance(outcome.terminal, Failed) for outcome in outcomes)
    assert not engine._launched


def test_closing_while_a_step_is_under_way_fails_what_is_open(runners: tuple[ModelRunner, ModelRunner]) -> None:
    engine = EngineLoop(runners[1])
    driver = Driver(engine)
    lease = FixedLease({0: 1.0})
    request = driver.submit([5, 6, 7], SamplingParams(max_new_tokens=60, ignore_eos=True), lease)
    emit = request.emit

    def close(event: Any) -> None:
        emit(event)
        engine._is_closing = True

    request.emit = close
    engine.start()
    engine._thread.join(60)
    (outcome,) = driver.outcomes  # not `wait`: an engine that was closed tells of no free blocks
    assert isinstance(outcome.terminal, Failed)
    assert lease.num_releases == 1


class _NoQuestions(TorchDispatchMode):
    """Fails when anything asks a tensor for its value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in SYNCS
        return func(*args, **(kwargs or {}))


def test_drawing_asks_the_device_for_nothing_and_chooses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", 8)
    requests = [
        GenerationRequest(
            str(i), [1], replace(random_wish(is_simple=True).sampling, prompt_logprobs=False), lambda _: None
        )
        for i in range(40)
    ]
    logits = torch.randn(40, VOCABULARY).round(decimals=1)  # with equals
    wanted = sampling.draw(logits, requests).read()
    monkeypatch.setattr(sampling, "_may_ask", lambda device: False)
    with _NoQuestions():
        drawn = sampling.draw(logits, requests)
    assert drawn.read() == wanted
    assert drawn.tokens.tolist() == [each.token_id for each in wanted]


def test_log_probabilities_of_prompts_ask_the_device_for_nothing_either() -> None:
    requests, rows = [], []
    for number, length in enumerate((1 + 70, 1 + 4, 1 + 3)):
        ids = [random.randrange(VOCABULARY) for _ in range(length)]
        params = SamplingParams(max_new_tokens=1, num_top_logprobs=number)
        requests.append(GenerationRequest(str(number), ids, params, lambda _: None))
        start = rows[-1].stop if rows else 0
        rows.append(PromptRows(requests[-1], 0, start, start + length - 1))
    known = TokenLogprob(requests[1].prompt_ids[1], -7.0)  # from before a preemption
    requests[1].prompt_logprobs = [known]
    requests[2].is_finished = True
    logits = torch.randn(rows[-1].stop, VOCABULARY)
    device = StandInDevice()
    with device:
        PromptLogprobs(AwayTensor(logits), rows)
    assert device.num_in_the_way
    assert not device.to_host
    with _NoQuestions():
        prompts = PromptLogprobs(logits, rows)
    assert not requests[0].prompt_logprobs
    prompts.note()
    wanted = logits.log_softmax(-1)
    for request, own in zip(requests[:2], rows[:2], strict=True):
        assert [each.token_id for each in request.prompt_logprobs] == request.prompt_ids[1:]
        for row, found in enumerate(request.prompt_logprobs, own.start):
            if found is not known:
                best = wanted[row].topk(request.sampling.num_top_logprobs)
                assert found.logprob == pytest.approx(float(wanted[row, found.token_id]), abs=1e-5)
                assert [token for token, _ in found.top] == best.indices.tolist()
                assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert requests[1].prompt_logprobs[0] is known
    assert not requests[2].prompt_logprobs


def test_tokens_that_are_on_their_way_are_filled_in() -> None:
    ids = torch.tensor([7, -1, 8, -3])
    assert with_tokens(ids, torch.tensor([10, 20, 30])).tolist() == [7, 10, 8, 30]
    assert with_tokens(ids, None) is ids
    request = GenerationRequest("x", [1, 2], SamplingParams(max_new_tokens=2), lambda _: None, output_ids=[3])
    assert (request.token_ids(0, 3), request.token_ids(1, 2), request.token_ids(2, 3)) == ([1, 2, 3], [2], [3])
    request.in_flight, request.num_computed = 4, 3
    assert (request.token_ids(1, 4), request.token_ids(3, 4), request.token_ids(0, 2)) == ([2, 3, -5], [-5], [1, 2])
    assert (request.num_tokens, request.num_output, request.num_pending) == (4, 2, 0)
