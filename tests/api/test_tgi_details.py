"""What TGI's and LoRAX's clients may ask for beside the text."""

import json
from typing import Any

import httpx
import pytest
import torch

from tests.api.conftest import Live

PROMPT = "The quick brown fox"
NUM_TOKENS = 10


def _body(adapter: str | None = None, **parameters: Any) -> dict[str, Any]:
    fixed = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "adapter_id": adapter, "details": True}
    return {"inputs": PROMPT, "parameters": fixed | parameters}


def _logprobs(live: Live, name: str, ids: list[int]) -> torch.Tensor:
    """[T, V], by PEFT: row t of what comes after token t."""
    with torch.inference_mode():
        return live.references[name](torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def test_the_root_route_answers_a_list_or_a_stream(live: Live, client: httpx.Client) -> None:
    _, text = live.expected("rank8", PROMPT, NUM_TOKENS)
    answer = client.post("/", json=_body("rank8")).json()
    assert isinstance(answer, list)
    assert [one["generated_text"] for one in answer] == [text]
    for path in ("/", "/generate"):
        frames = client.post(path, json=_body("rank8") | {"stream": True}).text.strip().split("\n\n")
        assert json.loads(frames[-1][6:])["generated_text"] == text
        assert len(frames) == NUM_TOKENS


@pytest.mark.parametrize("adapter", [None, "dora"])
def test_prefill_has_the_prompts_logprobs(live: Live, client: httpx.Client, adapter: str | None) -> None:
    long = PROMPT * 12  # several steps of chunks
    body = _body(adapter, decoder_input_details=True) | {"inputs": long}
    prefill = client.post("/generate", json=body).json()["details"]["prefill"]
    ids = live.tokenizer(long).input_ids
    assert [token["id"] for token in prefill] == ids
    assert prefill[0]["logprob"] is None
    expected = _logprobs(live, adapter or "base", ids)
    for i, token in enumerate(prefill[1:]):
        assert token["logprob"] == pytest.approx(float(expected[i, token["id"]]), abs=2e-3)
    assert "".join(token["text"] for token in prefill) == long


@pytest.mark.parametrize("streams", [False, True])
def test_top_tokens_and_alternatives(live: Live, client: httpx.Client, streams: bool) -> None:
    body = _body("rank4", top_n_tokens=3, return_k_alternatives=2)
    if streams:
        frames = client.post("/generate_stream", json=body).text.strip().split("\n\n")
        events = [json.loads(frame[6:]) for frame in frames]
        tokens, top_tokens = [e["token"] for e in events], [e["top_tokens"] for e in events]
    else:
        details = client.post("/generate", json=body).json()["details"]
        tokens, top_tokens = details["tokens"], details["top_tokens"]
    assert len(tokens) == len(top_tokens) == NUM_TOKENS
    ids = live.tokenizer(PROMPT).input_ids
    expected = _logprobs(live, "rank4", ids + [token["id"] for token in tokens])[len(ids) - 1 :]
    for row, token, best in zip(expected, tokens, top_tokens, strict=False):
        assert token["logprob"] == pytest.approx(float(row[token["id"]]), abs=2e-3)
        values = row.topk(3).values.tolist()
        assert [one["logprob"] for one in best] == pytest.approx(values, abs=2e-3)
        assert best[0]["id"] == token["id"]
        assert set(best[0]) == {"id", "text", "logprob", "special"}
        assert [one["id"] for one in token["alternative_tokens"]] == [one["id"] for one in best[:2]]


def test_best_of_puts_the_likeliest_in_front(client: httpx.Client) -> None:
    details = client.post("/generate", json=_body("rank4", best_of=4, do_sample=True)).json()["details"]
    others = details["best_of_sequences"]
    assert len(others) == 3
    means = [sum(t["logprob"] for t in one["tokens"]) / len(one["tokens"]) for one in [details, *others]]
    assert means == sorted(means, reverse=True)
    assert len({one["seed"] for one in [details, *others]}) == 4
    assert all(one["finish_reason"] == "length" and one["generated_tokens"] == NUM_TOKENS for one in others)
    assert set(others[0]) == {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}


def test_truncate_keeps_the_end_of_the_prompt(live: Live, client: httpx.Client) -> None:
    details = client.post("/generate", json=_body("rank4", truncate=3, decoder_input_details=True)).json()["details"]
    ids = live.tokenizer(PROMPT).input_ids[-3:]
    assert [token["id"] for token in details["prefill"]] == ids
    assert details["prompt_tokens"] == 3


def test_bad_words_and_min_new_tokens(live: Live, client: httpx.Client) -> None:
    tokens, _ = live.expected("rank4", PROMPT, NUM_TOKENS)
    bad = live.tokenizer.decode([tokens[0]])
    answer = client.post("/generate", json=_body("rank4", bad_words=[bad])).json()
    banned = live.tokenizer(bad).input_ids
    ids = [token["id"] for token in answer["details"]["tokens"]]
    assert all(ids[i : i + len(banned)] != banned for i in range(len(ids)))
    stop = _body("rank4", stop_token_ids=[tokens[2]], min_new_tokens=8)
    assert client.post("/generate", json=stop).json()["details"]["generated_tokens"] >= 8


def test_a_repetition_penalty_is_transformers(live: Live, client: httpx.Client) -> None:
    ids = live.tokenizer(PROMPT).input_ids
    model = live.references["rank8"]
    config = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "eos_token_id": None}
    out = model.generate(input_ids=torch.tensor([ids]), repetition_penalty=1.8, **config)[0, len(ids) :].tolist()
    details = client.post("/generate", json=_body("rank8", repetition_penalty=1.8)).json()["details"]
    assert [token["id"] for token in details["tokens"]] == out


def test_headers_of_a_plain_answer(client: httpx.Client) -> None:
    headers = client.post("/generate", json=_body("rank4")).headers
    assert headers["x-adapter-id"] == "rank4"
    assert int(headers["x-total-tokens"]) == int(headers["x-prompt-tokens"]) + NUM_TOKENS
    for name in ("x-queue-time", "x-inference-time", "x-total-time", "x-time-to-first-token"):
        assert int(headers[name]) >= 0


def test_the_adapter_can_come_in_a_header(live: Live, client: httpx.Client) -> None:
    def text(body: dict[str, Any], **headers: str) -> str:
        return client.post("/generate", json=body, headers=headers).json()["generated_text"]

    assert text(_body(), **{"X-Adapter-Id": "dora"}) == live.expected("dora", PROMPT, NUM_TOKENS)[1]
    assert text(_body("rank4"), **{"X-Adapter-Id": "dora"}) == live.expected("rank4", PROMPT, NUM_TOKENS)[1]
    missing = client.post("/generate", json=_body(), headers={"X-Adapter-Id": "nobody"})
    assert (missing.status_code, missing.json()["code"]) == (404, "adapter_not_found")
