"""What is done to logits before the draw is what transformers' processors do; rows without any of it are left alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine import GenerationRequest, SamplingParams
from server.engine.adjust import adjust_logits
from server.engine.sampling import sample
from tests.engine.test_sampling import VOCABULARY, assert_as_the_warpers, drawn_shares, spread_evenly, tokens

EOS = frozenset({2, 9})
NUM_DRAWS = 4_000


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed


def random_ids(count: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(count)]


def a_request(prompt: Sequence[int], output: Sequence[int], **params: Any) -> GenerationRequest:
    sampling = SamplingParams(max_new_tokens=100, **params)
    return GenerationRequest("x", list(prompt), sampling, lambda _: None, output_ids=list(output))


def adjusted(logits: Tensor, request: GenerationRequest) -> Tensor:
    """Of one row."""
    out = logits[None].clone()
    adjust_logits(out, [request], EOS)
    return out[0]


def test_the_repetition_penalty_is_transformers() -> None:
    prompt, output = random_ids(12), random_ids(6)
    logits = torch.randn(VOCABULARY) * 3
    ours = adjusted(logits, a_request(prompt, output, repetition_penalty=1.7))
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits[None])[0]
    assert torch.equal(ours, theirs)


def test_bad_words_are_transformers() -> None:
    prompt, output = random_ids(5), random_ids(4)
    tail = output[-2:]
    words = [[7], [*tail, 11], [tail[0], 12], [tail[1], 13], [*random_ids(20), 14]]
    logits = torch.randn(VOCABULARY)
    ours = adjusted(logits, a_request(prompt, output, bad_words=tuple(map(tuple, words))))
    theirs = NoBadWordsLogitsProcessor(words)(torch.tensor([prompt + output]), logits[None])[0]
    assert torch.equal(ours, theirs)
    assert ours[[7, 11, 13]].tolist() == [-torch.inf] * 3


def test_logit_bias_is_transformers() -> None:
    bias = {token: random.uniform(-100, 100) for token in random.sample(range(VOCABULARY), 10)}
    logits = torch.randn(VOCABULARY)
    ours = adjusted(logits, a_request([1], [], logit_bias=bias))
    theirs = SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])(torch.tensor([[1]]), logits[None])[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_output", [0, 2, 3, 4])
def test_min_tokens_is_transformers(num_output: int) -> None:
    prompt, output = random_ids(5), random_ids(num_output)
    logits = torch.randn(VOCABULARY)
    ours = adjusted(logits, a_request(prompt, output, min_tokens=3, stop_token_ids=frozenset({20})))
    processor = MinNewTokensLengthLogitsProcessor(5, 3, [*EOS, 20])
    assert torch.equal(ours, processor(torch.tensor([prompt + output]), logits[None])[0])


def test_frequency_and_presence_penalties_count_the_output_only() -> None:
    prompt, output = [5, 6, 7], [6, 8, 6, 6]
    logits = torch.randn(VOCABULARY)
    ours = adjusted(logits, a_request(prompt, output, frequency_penalty=0.5, presence_penalty=-0.25))
    expected = logits.clone()
    expected[6] -= 3 * 0.5 - 0.25
    expected[8] -= 0.5 - 0.25
    assert torch.allclose(ours, expected)
    assert torch.equal(ours[[5, 7]], logits[[5, 7]])


def test_penalties_follow_the_output_as_it_grows() -> None:
    request = a_request(random_ids(4), [], repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2)
    for _ in range(20):
        logits = torch.randn(VOCABULARY)
        fresh = a_request(request.prompt_ids, request.output_ids)
        fresh.sampling = request.sampling
        assert torch.equal(adjusted(logits, request), adjusted(logits, fresh))
        request.output_ids += random_ids(random.randrange(3))


CHAINS: dict[str, dict[str, Any]] = {
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "typical_p": {"typical_p": 0.6},
    "low typical_p": {"typical_p": 1e-3},
    "high typical_p": {"typical_p": 0.99},
    "all": {"temperature": 1.4, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
}


@pytest.mark.parametrize("name", CHAINS)
def test_min_p_and_typical_p_are_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"temperature": 1.0} | CHAINS[name]
    spread_evenly(monkeypatch, NUM_DRAWS)
    logits = torch.randn(VOCABULARY) * random.choice([0.5, 2])
    warpers = [
        TemperatureLogitsWarper(params["temperature"]),
        *([TopKLogitsWarper(params["top_k"])] if "top_k" in params else []),
        *([TopPLogitsWarper(params["top_p"])] if "top_p" in params else []),
        *([MinPLogitsWarper(params["min_p"])] if "min_p" in params else []),
        *([TypicalLogitsWarper(params["typical_p"])] if "typical_p" in params else []),
    ]
    scores = logits[None]
    for warper in warpers:
        scores = warper(None, scores)
    assert_as_the_warpers(drawn_shares(logits, NUM_DRAWS, **params), NUM_DRAWS, scores.softmax(dim=-1)[0])


@dataclass
class Forbids:
    """A constraint that forbids a fixed set."""

    ids: frozenset[int]

    def forbidden(self) -> bytearray:
        return bytearray(int(i in self.ids) for i in range(VOCABULARY))

    def accept(self, token_id: int) -> bool:
        assert token_id not in self.ids
        return False


def mixed_requests(count: int) -> list[GenerationRequest]:
    """Every second row plain; the others with one or several features."""
    features: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 1.0, "presence_penalty": -0.5},
        {"logit_bias": {3: 5.0, 4: -100.0}},
        {"bad_words": ((5,), (6, 7))},
        {"min_tokens": 40},
        {"min_p": 0.1},
        {"typical_p": 0.7},
    ]
    out = []
    for i in range(count):
        params: dict[str, Any] = {"temperature": random.choice([0.0, 1.0]), "seed": random.randrange(1 << 60)}
        for feature in random.sample(features, random.randrange(1, 4)) if i % 2 else []:
            params |= feature
        request = a_request(random_ids(8), random_ids(random.randrange(30)), **params, logprobs=True)
        if i % 7 == 3:
            request.constraint = Forbids(frozenset(random_ids(40)))
        out.append(request)
    return out


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    requests = mixed_requests(60)
    logits = torch.randn(60, VOCABULARY) * 2
    together = sample(logits, requests, eos_token_ids=EOS)
    alone = [sample(logits[i : i + 1], [request], eos_token_ids=EOS)[0] for i, request in enumerate(requests)]
    assert [s.token_id for s in together] == [s.token_id for s in alone]


def test_adjusting_leaves_the_given_logits_alone() -> None:
    requests = mixed_requests(20)
    logits = torch.randn(20, VOCABULARY)
    before = logits.clone()
    sample(logits, requests, eos_token_ids=EOS)
    assert torch.equal(logits, before)


def test_logprobs_are_the_models_also_where_logits_are_changed() -> None:
    requests = mixed_requests(40)
    for i, request in enumerate(requests):
        request.sampling = replace(request.sampling, num_top_logprobs=i % 4)
    logits = torch.randn(40, VOCABULARY) * 3
    expected = logits.log_softmax(dim=-1)
    for i, sampled in enumerate(sample(logits, requests, eos_token_ids=EOS)):
        assert sampled.logprob == pytest.approx(float(expected[i, sampled.token_id]), abs=1e-5)
        best = expected[i].topk(i % 4)
        assert [token for token, _ in sampled.top] == best.indices.tolist()
        assert [value for _, value in sampled.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_is_blocked_and_harms_nobody(temperature: float) -> None:
    requests = [a_request([1], [], temperature=temperature, seed=i) for i in range(3)]
    logits = torch.randn(3, VOCABULARY)
    expected = tokens(logits, requests)
    requests[1].constraint = Forbids(frozenset(range(VOCABULARY)))
    got = sample(logits, requests)
    assert [got[0].token_id, got[2].token_id] == [expected[0], expected[2]]
    assert (got[1].token_id, got[1].is_blocked) == (None, True)
