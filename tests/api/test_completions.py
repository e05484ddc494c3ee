"""`/v1/completions` in OpenAI's shapes, with PEFT's tokens."""

import asyncio
import json
from typing import Any

import httpx
import pytest
import torch

from tests.api.conftest import MODEL_ID, Live

PATH = "/v1/completions"
PROMPT = "The quick brown fox"
NUM_TOKENS = 12


def _body(model: str | None = None, **fields: Any) -> dict[str, Any]:
    fixed = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return fixed | fields


def _chunks(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


@pytest.mark.parametrize("name", [None, "", MODEL_ID, "tgi", "dummy", "rank8", f"{MODEL_ID}:dora", "dora"])
def test_the_text_is_pefts_whatever_names_the_adapter(live: Live, client: httpx.Client, name: str | None) -> None:
    adapter = (name or "").removeprefix(f"{MODEL_ID}:")
    adapter = adapter if adapter in live.folders else None
    answer = client.post(PATH, json=_body(name)).json()
    _, text = live.expected(adapter, PROMPT, NUM_TOKENS)
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    num_prompt = len(live.tokenizer(PROMPT).input_ids)
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": NUM_TOKENS,
        "total_tokens": num_prompt + NUM_TOKENS,
    }
    assert answer["object"] == "text_completion"
    assert answer["model"] == (name or MODEL_ID)
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["id"].startswith("cmpl-")


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter_id": "rank4"},
        {"model": "rank4", "adapter_id": "rank4"},
        {"merged_adapters": {"ids": ["rank4"], "weights": [1.0], "density": 0.5}},
        {"adapters": [{"name": "rank4"}]},
    ],
)
def test_the_adapter_beside_the_model(live: Live, client: httpx.Client, fields: dict[str, Any]) -> None:
    answer = client.post(PATH, json=_body(MODEL_ID) | fields).json()
    assert answer["choices"][0]["text"] == live.expected("rank4", PROMPT, NUM_TOKENS)[1]


def test_two_adapters_are_a_conflict(client: httpx.Client) -> None:
    response = client.post(PATH, json=_body("rank4", adapter_id="dora"))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_choice_conflict")


def test_several_prompts_and_choices_are_in_order(live: Live, client: httpx.Client) -> None:
    prompts = [PROMPT, "Hello", "What is"]
    answer = client.post(PATH, json=_body("rank8", prompt=prompts, n=2)).json()
    expected = [live.expected("rank8", prompt, NUM_TOKENS)[1] for prompt in prompts for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == sum(len(live.tokenizer(prompt).input_ids) for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 6 * NUM_TOKENS


def test_prompts_of_token_ids(live: Live, client: httpx.Client) -> None:
    ids = [live.tokenizer(text).input_ids for text in (PROMPT, "Hello")]
    one = client.post(PATH, json=_body("rank8", prompt=ids[0], return_token_ids=True)).json()["choices"][0]
    assert one["token_ids"] == live.expected("rank8", PROMPT, NUM_TOKENS)[0]
    assert one["prompt_token_ids"] == ids[0]
    both = client.post(PATH, json=_body("rank8", prompt=ids)).json()["choices"]
    assert [choice["text"] for choice in both] == [live.expected("rank8", t, NUM_TOKENS)[1] for t in (PROMPT, "Hello")]


def test_choices_of_one_seed_differ_and_repeat(client: httpx.Client) -> None:
    body = _body("rank4", temperature=1.3, n=4, seed=-5)
    first, second = (client.post(PATH, json=body).json()["choices"] for _ in range(2))
    assert first == second
    assert len({choice["text"] for choice in first}) == 4
    alone = client.post(PATH, json=body | {"n": 1, "seed": -3}).json()["choices"]
    assert alone[0]["text"] == first[2]["text"]


def test_a_seed_gives_the_same_text_in_any_company(live: Live, client: httpx.Client) -> None:
    body = _body("dora", temperature=1.0, top_p=0.9, frequency_penalty=0.5, seed=77)
    alone = client.post(PATH, json=body).json()["choices"]

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as other:
            company = [
                _body(name, prompt=f"Text {i}", temperature=1.0) for i, name in enumerate(["rank4", "rank8"] * 5)
            ]
            return await asyncio.gather(*(other.post(PATH, json=one) for one in [*company[:5], body, *company[5:]]))

    assert asyncio.run(run())[5].json()["choices"] == alone


@pytest.mark.parametrize("streams", [False, True])
def test_a_stop_string_is_not_shown_nor_any_part_of_it(live: Live, client: httpx.Client, streams: bool) -> None:
    _, text = live.expected("rank4", PROMPT, NUM_TOKENS)
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    body = _body("rank4", stop=["never this", stop], stream=streams)
    expected = text[: text.index(stop)]
    if streams:
        choices = [chunk["choices"][0] for chunk in _chunks(client.post(PATH, json=body))]
        assert "".join(choice["text"] for choice in choices) == expected
        assert [choice["finish_reason"] for choice in choices][-1] == "stop"
    else:
        choice = client.post(PATH, json=body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")


def test_a_stream_gives_the_text_and_usage_only_if_asked(live: Live, client: httpx.Client) -> None:
    chunks = _chunks(client.post(PATH, json=_body("dora", stream=True)))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == live.expected("dora", PROMPT, NUM_TOKENS)[1]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    chunks = _chunks(client.post(PATH, json=_body("dora", stream=True, stream_options={"include_usage": True})))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == NUM_TOKENS
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_stream_of_several_choices(live: Live, client: httpx.Client) -> None:
    texts: dict[int, str] = {}
    for chunk in _chunks(client.post(PATH, json=_body("dora", prompt=[PROMPT, "Hello"], n=2, stream=True))):
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert [texts[i] for i in range(4)] == [
        live.expected("dora", p, NUM_TOKENS)[1] for p in (PROMPT, "Hello") for _ in "ab"
    ]


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_with_echo(live: Live, client: httpx.Client, streams: bool) -> None:
    body = _body("rank4", logprobs=2, echo=True, stream=streams)
    response = client.post(PATH, json=body)
    if streams:
        choices = [chunk["choices"][0] for chunk in _chunks(response)]
        logprobs = {key: [one for c in choices for one in c["logprobs"][key]] for key in choices[0]["logprobs"]}
        text = "".join(choice["text"] for choice in choices)
    else:
        choice = response.json()["choices"][0]
        logprobs, text = choice["logprobs"], choice["text"]
    tokens, generated = live.expected("rank4", PROMPT, NUM_TOKENS)
    assert text == PROMPT + generated
    ids = live.tokenizer(PROMPT).input_ids + tokens
    with torch.inference_mode():
        expected = live.references["rank4"](torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(
        [float(expected[i, ids[i + 1]]) for i in range(len(ids) - 1)], abs=2e-3
    )
    assert {len(logprobs[key]) for key in logprobs} == {len(ids)}
    assert all(2 <= len(best) <= 3 for best in logprobs["top_logprobs"][1:])
    num_prompt = len(ids) - NUM_TOKENS
    for token, offset in zip(logprobs["tokens"][:num_prompt], logprobs["text_offset"], strict=False):
        assert PROMPT[offset : offset + len(token)] == token
    assert logprobs["text_offset"][num_prompt] == len(PROMPT)


def test_echo_without_output_scores_a_text(client: httpx.Client) -> None:
    answer = client.post(PATH, json=_body("rank4", max_tokens=0, echo=True, logprobs=0)).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    assert all(len(best) == 1 for best in choice["logprobs"]["top_logprobs"][1:])


def test_best_of_shows_the_likeliest(client: httpx.Client) -> None:
    body = _body("rank4", temperature=1.2, seed=11, logprobs=0)
    every = client.post(PATH, json=body | {"n": 5}).json()
    ranked = sorted(every["choices"], key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
    best = client.post(PATH, json=body | {"n": 2, "best_of": 5}).json()
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"] == every["usage"]


def test_logit_bias_decides(live: Live, client: httpx.Client) -> None:
    token_id = live.tokenizer("Z").input_ids[-1]
    answer = client.post(PATH, json=_body("rank4", logit_bias={str(token_id): 100})).json()
    assert answer["choices"][0]["text"] == "Z" * NUM_TOKENS


def test_unset_temperature_samples(client: httpx.Client) -> None:
    body = {"model": "rank4", "prompt": PROMPT, "ignore_eos": True}
    answers = [client.post(PATH, json=body).json() for _ in range(4)]
    assert len({answer["choices"][0]["text"] for answer in answers}) > 1
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {16}


BAD: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "unknown model": ({"model": "nobody"}, 404, "model_not_found", "model"),
    "unknown adapter": ({"adapter_id": "nobody"}, 404, "model_not_found", "model"),
    "an adapter under another name": ({"lora_name": "rank4"}, 400, "unknown_field", "lora_name"),
    "too long": ({"prompt": "x" * 3000}, 400, "context_length_exceeded", None),
    "output too long": ({"max_tokens": 10_000}, 400, "context_length_exceeded", None),
    "no prompt": ({"prompt": None}, 400, "invalid_value", "prompt"),
    "an empty list": ({"prompt": []}, 400, "invalid_value", "prompt"),
    "too many prompts": ({"prompt": ["x"] * 65}, 400, "invalid_value", "prompt"),
    "a token that is none": ({"prompt": [1, 10_000]}, 400, "token_unknown", "prompt"),
    "a negative token": ({"prompt": [-1]}, 400, "invalid_value", "prompt"),
    "n too large": ({"n": 17}, 400, "invalid_value", "n"),
    "n times prompts too large": ({"n": 16, "prompt": ["x"] * 20}, 400, "invalid_value", "n"),
    "best_of below n": ({"n": 3, "best_of": 2}, 400, "invalid_value", "best_of"),
    "best_of in a stream": ({"best_of": 2, "stream": True}, 400, "invalid_value", "best_of"),
    "nothing wanted": ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    "suffix": ({"suffix": "x"}, 400, "not_supported", "suffix"),
    "beam search": ({"use_beam_search": True}, 400, "not_supported", "use_beam_search"),
    "too many logprobs": ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
    "a bias for no token": ({"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    "a bias for an unknown token": ({"logit_bias": {"100000": 1}}, 400, "token_unknown", "logit_bias"),
    "a bias too strong": ({"logit_bias": {"1": 101}}, 400, "invalid_value", "logit_bias.1"),
    "too many biases": ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "invalid_value", "logit_bias"),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}},
        400,
        "grammar_invalid",
        "response_format",
    ),
    "a schema with a lone surrogate": (
        {"response_format": {"type": "json_object", "schema": {"const": "\ud800"}}},
        400,
        "grammar_invalid",
        "response_format",
    ),
    "two forms": (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        400,
        "invalid_value",
        "guided_json",
    ),
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_requests(client: httpx.Client, case: str, streams: bool) -> None:
    fields, status, code, param = BAD[case]
    body = json.dumps(_body("rank4", stream=streams) | fields if "model" in fields else _body(stream=streams) | fields)
    response = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert param is None or (error["param"] or "").startswith(param)
    assert error["type"] == "invalid_request_error"
    assert response.json()["error_type"] == ("not_found" if status == 404 else "validation")


def test_messages_that_clients_look_for(client: httpx.Client) -> None:
    too_long = client.post(PATH, json=_body(prompt="x" * 3000)).json()["error"]["message"]
    assert too_long.startswith("This model's maximum context length is 512 tokens, and the prompt is too long: ")
    assert client.post(PATH, json=_body("nobody")).json()["error"]["message"] == "The model `nobody` does not exist"
    malformed = client.post(PATH, content=b"{", headers={"Content-Type": "application/json"})
    assert (malformed.status_code, malformed.json()["error"]["code"]) == (400, "json_invalid")
