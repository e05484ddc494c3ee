"""`/v1/chat/completions`: the model's own template, OpenAI's shapes, tools."""

import json
from typing import Any

import httpx
import pytest
import torch

from tests.api.conftest import Live
from tests.api.test_completions import _chunks

PATH = "/v1/chat/completions"
NUM_TOKENS = 12
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"enum": [1, 2, 3]}},
        },
    },
}
OTHER_TOOL = {"type": "function", "function": {"name": "get_time"}}


def _body(model: str | None = None, **fields: Any) -> dict[str, Any]:
    fixed = {"model": model, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return fixed | fields


def _prompt(live: Live, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return live.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


@pytest.mark.parametrize("adapter", [None, "rank8", "dora"])
def test_the_answer_is_pefts(live: Live, client: httpx.Client, adapter: str | None) -> None:
    answer = client.post(PATH, json=_body(adapter)).json()
    prompt = _prompt(live, MESSAGES)
    _, text = live.expected(adapter, prompt, NUM_TOKENS)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(live.tokenizer(prompt).input_ids)
    assert (answer["object"], answer["id"][:9]) == ("chat.completion", "chatcmpl-")


def test_every_spelling_of_a_message_makes_the_same_prompt(live: Live, client: httpx.Client) -> None:
    spelled = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}], "name": None},
    ]
    one, other = (client.post(PATH, json=_body("rank4", messages=messages)).json() for messages in (MESSAGES, spelled))
    assert one["choices"] == other["choices"]
    assert one["usage"] == other["usage"]


def test_max_completion_tokens_wins(client: httpx.Client) -> None:
    answer = client.post(PATH, json=_body("rank4", max_completion_tokens=5)).json()
    assert answer["usage"]["completion_tokens"] == 5


def test_template_variables(live: Live, client: httpx.Client) -> None:
    answer = client.post(PATH, json=_body("rank4", chat_template_kwargs={"mood": "sad"})).json()
    _, text = live.expected("rank4", _prompt(live, MESSAGES, mood="sad"), NUM_TOKENS)
    assert answer["choices"][0]["message"]["content"] == text


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(live: Live, client: httpx.Client) -> None:
    body = _body("rank8", stream=True, stream_options={"include_usage": True})
    *chunks, usage = _chunks(client.post(PATH, json=body))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert choices[-1]["finish_reason"] == "length"
    assert choices[-1]["delta"] == {}
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == live.expected("rank8", _prompt(live, MESSAGES), NUM_TOKENS)[1]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], NUM_TOKENS)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_usage_on_every_chunk_if_asked(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = _chunks(client.post(PATH, json=_body("rank8", stream=True, stream_options=options)))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == NUM_TOKENS


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs(live: Live, client: httpx.Client, streams: bool) -> None:
    response = client.post(PATH, json=_body("rank4", logprobs=True, top_logprobs=3, stream=streams))
    if streams:
        parts = [chunk["choices"][0]["logprobs"] for chunk in _chunks(response)]
        content = [entry for part in parts if part for entry in part["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    prompt = _prompt(live, MESSAGES)
    ids = live.tokenizer(prompt).input_ids
    tokens, _ = live.expected("rank4", prompt, NUM_TOKENS)
    with torch.inference_mode():
        logits = live.references["rank4"](torch.tensor([ids + tokens])).logits[0, len(ids) - 1 :]
    for row, token, entry in zip(logits.log_softmax(dim=-1), tokens, content, strict=False):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=2e-3)
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"] == live.tokenizer.decode([token])
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(row.topk(3).values.tolist(), abs=2e-3)
    assert len(content) == NUM_TOKENS


def test_choices(client: httpx.Client) -> None:
    body = _body("rank4", n=3, temperature=1.4, seed=3)
    answer = client.post(PATH, json=body).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in _chunks(client.post(PATH, json=body | {"stream": True})):
        choice = chunk["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


def _calls(answer: dict[str, Any]) -> list[dict[str, Any]]:
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    return choice["message"]["tool_calls"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
    ],
    ids=["required", "named"],
)
@pytest.mark.parametrize("adapter", [None, "dora"])
def test_a_forced_tool_is_called_with_arguments_that_fit(
    client: httpx.Client, adapter: str | None, choice: Any, names: set[str]
) -> None:
    body = _body(adapter, tools=[TOOL, OTHER_TOOL], tool_choice=choice, max_tokens=400, temperature=1, ignore_eos=False)
    answer = client.post(PATH, json=body | {"response_format": None}).json()
    if answer["choices"][0]["finish_reason"] == "length":  # a random model may go on with an object for long
        assert names != {"get_weather"}
        return
    (call,) = _calls(answer)
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] in names
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "get_weather":
        assert arguments["city"] in {"Paris", "Rome"}
        assert arguments["days"] in {1, 2, 3}


def test_a_forced_tool_in_a_stream(client: httpx.Client) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    body = _body("rank4", tools=[TOOL], tool_choice=choice, max_tokens=400, stream=True, ignore_eos=False)
    choices = [chunk["choices"][0] for chunk in _chunks(client.post(PATH, json=body))]
    assert choices[-1]["finish_reason"] == "tool_calls"
    (call,) = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert (call["index"], call["function"]["name"]) == (0, "get_weather")
    assert set(json.loads(call["function"]["arguments"])) == {"city", "days"}
    assert not "".join(choice["delta"].get("content") or "" for choice in choices).strip()


def test_earlier_calls_and_tools_are_in_the_prompt(live: Live, client: httpx.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "CET"}'}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "tool_call_id": "1"},
    ]
    body = {"messages": messages, "tools": [OTHER_TOOL]}
    text = client.post("/chat_tokenize", json=body).json()["templated_text"]
    assert '{"name": "get_time", "arguments": {"zone": "CET"}}' in text
    assert text.startswith("<tools>get_time </tools>")
    answer = client.post(PATH, json=_body("rank4", **body)).json()
    assert answer["choices"][0]["message"]["content"] == live.expected("rank4", text, NUM_TOKENS)[1]
    without = client.post(PATH, json=_body("rank4", **body, tool_choice="none")).json()
    assert without["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "invalid_value"),
    "a role that is none": ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "not_supported",
    ),
    "what the template refuses": ({"messages": [{"role": "user", "content": "forbidden"}]}, "messages_invalid"),
    "a forced tool that is not there": (
        {"tools": [OTHER_TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "invalid_value",
    ),
    "a tool is required but there is none": ({"tool_choice": "required"}, "invalid_value"),
    "tools with a form": ({"tools": [OTHER_TOOL], "response_format": {"type": "json_object"}}, "not_supported"),
    "functions": ({"functions": [{"name": "x"}]}, "not_supported"),
    "audio": ({"modalities": ["text", "audio"]}, "not_supported"),
    "a template": ({"chat_template": "{{ messages }}"}, "not_supported"),
    "a reserved variable": ({"chat_template_kwargs": {"tokenize": True}}, "invalid_value"),
    "top_logprobs alone": ({"top_logprobs": 2}, "invalid_value"),
    "best_of": ({"best_of": 2}, "not_supported"),
    "text that is no Unicode": ({"messages": [{"role": "user", "content": "\ud800"}]}, "text_invalid"),
    "a schema for a tool that is none": (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
            "tool_choice": "required",
        },
        "grammar_invalid",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(client: httpx.Client, case: str) -> None:
    fields, code = BAD[case]
    content = json.dumps(_body("rank4") | fields)
    response = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code), response.text


def test_fields_that_nobody_knows_are_ignored(client: httpx.Client) -> None:
    unknown = {
        "store": True,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "service_tier": "auto",
        "user": "me",
    }
    assert client.post(PATH, json=_body("rank4") | unknown | {"future_field": [1]}).status_code == 200
