"""`/generate` and `/generate_stream`: PEFT's answers, in the shape that TGI's clients read."""

import json
from typing import Any

import httpx
import pytest

from tests import peft_adapters
from tests.api.conftest import MODEL_ID, Live

PROMPT = "The quick brown fox"
NUM_TOKENS = 12


def _body(adapter: str | None = None, **parameters: Any) -> dict[str, Any]:
    fixed = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True, "adapter_id": adapter}
    return {"inputs": PROMPT, "parameters": fixed | parameters}


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


@pytest.mark.parametrize("adapter", [None, *peft_adapters.VARIANTS])
def test_the_text_is_pefts(live: Live, client: httpx.Client, adapter: str | None) -> None:
    response = client.post("/generate", json=_body(adapter, details=True))
    assert response.status_code == 200
    tokens, text = live.expected(adapter, PROMPT, NUM_TOKENS)
    answer = response.json()
    assert [token["id"] for token in answer["details"]["tokens"]] == tokens
    assert answer["generated_text"] == text
    assert response.headers["x-model-id"] == MODEL_ID
    assert response.headers.get("x-adapter-id") == adapter


def test_a_mix_is_the_weighted_sum_of_the_adapters_deltas(live: Live, client: httpx.Client) -> None:
    weights = {"rank4": 0.6, "dora": -0.4, "rank16": 0.5}
    tokens, _ = live.expected_of_mix(weights, PROMPT, NUM_TOKENS)
    ours = _body(details=True) | {"adapters": [{"name": name, "weight": w} for name, w in weights.items()]}
    lorax = _body(details=True, merged_adapters={"ids": list(weights), "weights": list(weights.values()), "density": 0})
    for body in (ours, lorax):
        response = client.post("/generate", json=body)
        assert [token["id"] for token in response.json()["details"]["tokens"]] == tokens
        assert response.headers["x-adapter-id"] == "rank4,dora,rank16"


def test_details_have_every_field_that_clients_read(client: httpx.Client) -> None:
    answer = client.post("/generate", json=_body("rank8", details=True)).json()
    details = answer["details"]
    num_prompt = details["prompt_tokens"]
    assert num_prompt > 0
    assert {key: details[key] for key in ("input_length", "generated_tokens", "skipped_tokens", "seed", "prefill")} == {
        "input_length": num_prompt,
        "generated_tokens": NUM_TOKENS,
        "skipped_tokens": 0,
        "seed": None,
        "prefill": [],
    }
    assert details["finish_reason"] == "length"
    for token in details["tokens"]:
        assert set(token) == {"id", "text", "logprob", "special", "skipped"}
        assert isinstance(token["logprob"], float)
        assert token["logprob"] <= 0
    assert "".join(token["text"] for token in details["tokens"] if not token["special"]) == answer["generated_text"]


def test_without_details_there_is_only_the_text(client: httpx.Client) -> None:
    assert set(client.post("/generate", json=_body()).json()) == {"generated_text"}


def test_full_text_begins_with_the_prompt(live: Live, client: httpx.Client) -> None:
    answer = client.post("/generate", json=_body(return_full_text=True)).json()
    assert answer["generated_text"] == PROMPT + live.expected(None, PROMPT, NUM_TOKENS)[1]


@pytest.mark.parametrize("adapter", [None, "dora"])
def test_a_stream_has_one_event_per_token_and_ends_with_the_text(
    live: Live, client: httpx.Client, adapter: str | None
) -> None:
    events = _events(client.post("/generate_stream", json=_body(adapter, details=True)))
    tokens, text = live.expected(adapter, PROMPT, NUM_TOKENS)
    assert [event["token"]["id"] for event in events] == tokens
    assert [event["index"] for event in events] == list(range(1, NUM_TOKENS + 1))
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == text
    assert events[-1]["details"]["finish_reason"] == "length"
    assert events[-1]["details"]["generated_tokens"] == NUM_TOKENS


def test_the_first_event_comes_before_the_last_token_is_computed(live: Live) -> None:
    body = _body(max_new_tokens=400)
    with httpx.stream("POST", f"{live.url}/generate_stream", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines)[6:])["index"] == 1
        before = live.server.engine.stats.num_generated_tokens
        count = 1 + sum(line.startswith("data:") for line in lines)
    assert count == 400
    assert live.server.engine.stats.num_generated_tokens > before


def test_a_stop_string_ends_the_text_and_is_part_of_it(live: Live, client: httpx.Client) -> None:
    _, text = live.expected("rank4", PROMPT, NUM_TOKENS)
    middle = len(text) // 2
    stop = text[middle : middle + 2]
    answer = client.post("/generate", json=_body("rank4", stop=["never this", stop], details=True)).json()
    assert answer["generated_text"] == text[: text.index(stop) + len(stop)]
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_stop_token_ids_and_the_end_of_sequence_token(live: Live, client: httpx.Client) -> None:
    tokens, _ = live.expected("rank4", PROMPT, NUM_TOKENS)
    answer = client.post("/generate", json=_body("rank4", stop_token_ids=[tokens[5]], details=True)).json()
    ids = [token["id"] for token in answer["details"]["tokens"]]
    assert ids == tokens[: tokens.index(tokens[5]) + 1]
    assert answer["details"]["finish_reason"] == "eos_token"


def test_sampling_is_repeatable_by_seed_and_differs_without(client: httpx.Client) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "details": True}
    first, second = (client.post("/generate", json=_body(seed=7, **sampled)).json() for _ in range(2))
    assert first == second
    assert first["details"]["seed"] == 7
    texts = {client.post("/generate", json=_body(**sampled)).json()["generated_text"] for _ in range(5)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("parameters", "is_greedy"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0, "do_sample": True}, True),
        ({"temperature": 1}, True),
        ({"top_p": 1.0}, True),
        ({"do_sample": True}, False),
        ({"temperature": 2.0}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
    ],
)
def test_when_a_request_samples(client: httpx.Client, parameters: dict[str, Any], is_greedy: bool) -> None:
    details = client.post("/generate", json=_body(details=True, **parameters)).json()["details"]
    assert (details["seed"] is None) == is_greedy


def test_nulls_are_absences_and_unknown_fields_are_ignored(live: Live, client: httpx.Client) -> None:
    names = ("adapter_source", "merged_adapters", "api_token", "temperature", "top_k", "top_p", "typical_p", "seed")
    more = ("repetition_penalty", "truncate", "best_of", "response_format", "return_k_alternatives", "grammar")
    parameters = dict.fromkeys(names + more) | {"watermark": False, "stop": [], "future_field": 1}
    body = _body("rank8", **parameters) | {"another": {"deep": True}, "adapters": None}
    assert client.post("/generate", json=body).json()["generated_text"] == live.expected("rank8", PROMPT, NUM_TOKENS)[1]


@pytest.mark.parametrize("name", [None, "", "__base_model__", MODEL_ID])
def test_names_of_the_base_model(live: Live, client: httpx.Client, name: str | None) -> None:
    assert (
        client.post("/generate", json=_body(name)).json()["generated_text"]
        == live.expected(None, PROMPT, NUM_TOKENS)[1]
    )


def test_the_default_length_is_capped_by_the_context(client: httpx.Client) -> None:
    body = {"inputs": "x" * 500, "parameters": {"ignore_eos_token": True, "details": True}}
    details = client.post("/generate", json=body).json()["details"]
    assert details["prompt_tokens"] + details["generated_tokens"] <= 512
    assert details["finish_reason"] == "length"


def test_a_request_id_is_echoed_or_made(client: httpx.Client) -> None:
    assert client.post("/generate", json=_body(), headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    assert len(client.post("/generate", json=_body()).headers["x-request-id"]) == 32
