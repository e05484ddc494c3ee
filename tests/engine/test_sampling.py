"""Draws follow transformers' warpers, and depend on nothing but a row's own logits, parameters, seed and position."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from server.engine import GenerationRequest, SamplingParams, sampling
from server.engine.sampling import NUM_CANDIDATES, sample, uniform

VOCABULARY = 60
NUM_DRAWS = 4_000

PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"temperature": 0.8, "top_k": 7},
    "top_1": {"temperature": 3.0, "top_k": 1},
    "top_all": {"temperature": 1.0, "top_k": VOCABULARY},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "low_top_p": {"temperature": 1.0, "top_p": 1e-3},
    "high_top_p": {"temperature": 1.5, "top_p": 0.999},
    "both": {"temperature": 1.3, "top_k": 12, "top_p": 0.7},
}


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


def a_request(*, position: int = 0, **params: Any) -> GenerationRequest:
    """A request that has `position` tokens already."""
    params = {"max_new_tokens": position + 1, "seed": random.randrange(1 << 64)} | params
    return GenerationRequest("x", [1], SamplingParams(**params), lambda _: None, output_ids=[0] * position)


def tokens(logits: Tensor, requests: Sequence[GenerationRequest]) -> list[int | None]:
    return [sampled.token_id for sampled in sample(logits, requests)]


def expected_probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """By transformers' own warpers, in the order in which `generate` applies them."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(dim=-1)[0]


def spread_evenly(monkeypatch: pytest.MonkeyPatch, num_draws: int) -> None:
    """Let the draw of seed i be at (i + 1/2) / num_draws: each token then comes as often as its probability says."""
    monkeypatch.setattr(sampling, "uniform", lambda seed, _: (seed + 0.5) / num_draws)


def drawn_shares(logits: Tensor, num_draws: int, **params: Any) -> Tensor:
    """How often each token of one row of logits is drawn, under `spread_evenly`."""
    requests = [a_request(**params, seed=i) for i in range(num_draws)]
    drawn = torch.tensor(tokens(logits.expand(num_draws, -1), requests))
    return drawn.bincount(minlength=len(logits)) / num_draws


def assert_as_the_warpers(shares: Tensor, num_draws: int, expected: Tensor) -> None:
    assert float((shares - expected).abs().max()) <= 1.01 / num_draws
    assert not shares[expected == 0].any(), "a token was drawn that the warpers exclude"
    assert shares[expected > 1.01 / num_draws].all(), "a token was never drawn"


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_distribution_is_that_of_transformers_warpers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spread_evenly(monkeypatch, NUM_DRAWS)
    logits = torch.randn(VOCABULARY) * random.choice([0.5, 2, 5])
    shares = drawn_shares(logits, NUM_DRAWS, **PARAMETERS[name])
    assert_as_the_warpers(shares, NUM_DRAWS, expected_probabilities(logits, **PARAMETERS[name]))


@pytest.mark.parametrize("params", [{"top_p": 0.9}, {"top_k": 1_500}, {"top_k": 1_800, "top_p": 0.9}])
def test_a_flat_distribution_needs_more_than_the_usual_candidates(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"temperature": 1.0} | params
    logits = torch.randn(2 * NUM_CANDIDATES) * 0.1
    expected = expected_probabilities(logits, **params)
    assert int((expected > 0).sum()) > NUM_CANDIDATES
    spread_evenly(monkeypatch, 3 * NUM_CANDIDATES)
    shares = drawn_shares(logits, 3 * NUM_CANDIDATES, **params)
    assert_as_the_warpers(shares, 3 * NUM_CANDIDATES, expected)


def test_tokens_that_are_as_likely_as_the_last_one_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    spread_evenly(monkeypatch, 600)
    logits = torch.tensor([0.0, 1, 1, 1, -5, 1, 2])
    top_k = drawn_shares(logits, 600, temperature=1.0, top_k=2)
    assert_as_the_warpers(top_k, 600, expected_probabilities(logits, 1.0, top_k=2))
    assert (top_k > 0).tolist() == [False, True, True, True, False, True, True]
    top_p = drawn_shares(logits, 600, temperature=1.0, top_p=0.5)
    assert torch.equal(top_k, top_p)


def test_the_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    seed = random.randrange(1 << 64)
    for numbers in ([uniform(seed, i) for i in range(NUM_DRAWS)], [uniform(i, 3) for i in range(NUM_DRAWS)]):
        assert len(set(numbers)) == NUM_DRAWS
        assert min(numbers) >= 0
        assert max(numbers) < 1
        steps = torch.arange(1, NUM_DRAWS + 1, dtype=torch.float64) / NUM_DRAWS
        distance = (torch.tensor(numbers, dtype=torch.float64).sort().values - steps).abs().max()
        assert float(distance) * NUM_DRAWS**0.5 < 2.7  # Kolmogorov and Smirnov: passed but for one time in a million


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_most_likely_token(dtype: torch.dtype) -> None:
    logits = torch.randn(20, VOCABULARY).to(dtype)
    requests = [a_request(position=i) for i in range(20)]
    assert tokens(logits, requests) == logits.float().argmax(dim=-1).tolist()


def mixed_requests(count: int) -> list[GenerationRequest]:
    """Greedy rows, and rows of all parameters, at random positions."""
    choices = [*PARAMETERS.values(), {}, {}, {"temperature": 1.0, "top_k": 10**30}, {"temperature": 0.9, "top_p": 0.95}]
    return [a_request(position=random.randrange(50), **random.choice(choices)) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter with many equals
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 4 * NUM_CANDIDATES])
def test_a_row_is_drawn_the_same_alone_and_in_any_batch(dtype: torch.dtype, vocabulary: int) -> None:
    requests = mixed_requests(60)
    logits = (torch.randn(60, vocabulary) * 2).to(dtype)
    together = tokens(logits, requests)
    assert together == [tokens(row[None], [request])[0] for row, request in zip(logits, requests, strict=True)]
    order = random.sample(range(60), 60)
    assert tokens(logits[order], [requests[i] for i in order]) == [together[i] for i in order]


def test_a_seed_fixes_the_draws_and_another_gives_others() -> None:
    logits = torch.zeros(40, VOCABULARY)

    def draws(seed: int) -> list[int | None]:
        return tokens(logits, [a_request(position=i, temperature=1.0, seed=seed) for i in range(40)])

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert len(set(draws(5))) > 10, "positions differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_models_whatever_the_parameters(dtype: torch.dtype) -> None:
    requests = mixed_requests(40)
    for i, request in enumerate(requests):
        params = request.sampling
        request.sampling = SamplingParams(
            max_new_tokens=1,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed,
            logprobs=i % 3 > 0,
        )
    logits = (torch.randn(40, VOCABULARY) * 3).to(dtype)
    expected = logits.float().log_softmax(dim=-1)
    for i, sampled in enumerate(sample(logits, requests)):
        if i % 3:
            assert sampled.logprob == pytest.approx(float(expected[i, sampled.token_id]), abs=1e-5)
        else:
            assert sampled.logprob is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, "one nan", "one inf"])
def test_rows_that_are_not_finite_give_nothing_and_harm_nobody(bad: float | str) -> None:
    requests = mixed_requests(30)
    logits = torch.randn(30, VOCABULARY)
    expected = sample(logits, requests)
    spoiled = logits.clone()
    rows = random.sample(range(30), 10)
    if isinstance(bad, str):
        spoiled[rows, random.randrange(VOCABULARY)] = float(bad.removeprefix("one "))
    else:
        spoiled[rows] = bad
    for i, sampled in enumerate(sample(spoiled, requests)):
        assert sampled.token_id is None if i in rows else sampled == expected[i]


@pytest.mark.parametrize("params", list(PARAMETERS.values()))
def test_tokens_that_the_model_excludes_are_never_drawn(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spread_evenly(monkeypatch, 300)
    logits = torch.randn(VOCABULARY)
    logits[::2] = -torch.inf
    shares = drawn_shares(logits, 300, **params)
    assert not shares[::2].any()
    assert float(shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-40},
        {"temperature": 1e-300},
        {"temperature": 1.0, "top_p": 1e-30},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 100.0, "top_k": 1},
    ],
)
def test_parameters_near_zero_leave_the_most_likely_token(params: dict[str, Any]) -> None:
    logits = torch.randn(10, VOCABULARY)
    logits[:, 5] = -torch.inf
    assert tokens(logits, [a_request(**params) for _ in range(10)]) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
def test_a_huge_temperature_makes_all_tokens_equally_likely(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread_evenly(monkeypatch, 10 * VOCABULARY)
    shares = drawn_shares(torch.randn(VOCABULARY), 10 * VOCABULARY, temperature=temperature)
    assert shares.tolist() == pytest.approx([1 / VOCABULARY] * VOCABULARY, abs=0.2 / VOCABULARY)


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_distribution_are_tokens_that_may_be_drawn(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda *_: number)
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, 10:20] = torch.randn(10)
    for params in PARAMETERS.values():
        (token,) = tokens(logits, [a_request(**params)])
        assert token in range(10, 20)
