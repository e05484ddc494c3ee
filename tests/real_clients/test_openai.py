"""openai's Python client, unmodified: sync, async, streams, helpers, and its exception classes."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel

from tests.api.conftest import MODEL_ID, Live

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": PROMPT}]
NUM_TOKENS = 10
EXTRA = {"ignore_eos": True}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat_text(live: Live, name: str | None) -> str:
    prompt = live.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return live.expected(name, prompt, NUM_TOKENS)[1]


def test_models(live: Live, client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert models[0].id == MODEL_ID
    assert {model.id for model in models[1:]} == set(live.folders)
    assert client.models.retrieve("dora").id == "dora"
    with pytest.raises(openai.NotFoundError, match="nobody/at-all"):
        client.models.retrieve("nobody/at-all")


@pytest.mark.parametrize("name", [MODEL_ID, "rank8", "dora", "rank8@1"])
def test_a_completion_and_its_stream(live: Live, client: openai.OpenAI, name: str) -> None:
    adapter = None if name == MODEL_ID else name.partition("@")[0]
    _, text = live.expected(adapter, PROMPT, NUM_TOKENS)
    fields = {"model": name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": EXTRA}
    answer = client.completions.create(**fields)
    assert answer.choices[0].text == text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert answer._request_id
    streamed = client.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_a_chat_with_logprobs_and_a_mix_in_the_body(live: Live, client: openai.OpenAI) -> None:
    fields = {"messages": MESSAGES, "max_completion_tokens": NUM_TOKENS, "temperature": 0}
    answer = client.chat.completions.create(model="dora", **fields, logprobs=True, top_logprobs=2, extra_body=EXTRA)
    assert answer.choices[0].message.content == chat_text(live, "dora")
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or ()) == NUM_TOKENS
    mix = EXTRA | {"adapters": [{"name": "dora", "weight": 1.0}]}
    same = client.chat.completions.create(model=MODEL_ID, **fields, extra_body=mix)
    assert same.choices[0].message.content == answer.choices[0].message.content


def test_a_chat_stream_with_usage(live: Live, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="rank16",
            messages=MESSAGES,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=EXTRA,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat_text(live, "rank16")
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS


def test_the_async_client(live: Live) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:

            async def one(name: str) -> str:
                stream = await client.chat.completions.create(
                    model=name, messages=MESSAGES, max_tokens=NUM_TOKENS, temperature=0, stream=True, extra_body=EXTRA
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(name) for name in ("rank4", "dora", MODEL_ID)))

    assert asyncio.run(run()) == [chat_text(live, "rank4"), chat_text(live, "dora"), chat_text(live, None)]


def test_a_stream_that_is_left_frees_its_place(live: Live, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="rank4", prompt=PROMPT, max_tokens=450, stream=True, extra_body=EXTRA)
    next(iter(stream))
    stream.close()
    live.assert_idle()


class City(BaseModel):
    """What the model has to answer with."""

    name: str
    size: int


def test_parsed_answers(client: openai.OpenAI) -> None:
    fields = {"model": "rank4", "messages": MESSAGES, "max_tokens": 400, "seed": 1, "top_p": 0.5}
    schema = {
        "type": "object",
        "properties": {"size": {"enum": [1, 2]}},
        "required": ["size"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        **fields,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content or "")["size"] in {1, 2}
    try:
        parsed = client.chat.completions.parse(**fields, response_format=City)
    except openai.LengthFinishReasonError:  # a random model may not find the end of a string
        return
    assert isinstance(parsed.choices[0].message.parsed, City)


def test_tools(client: openai.OpenAI) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}}
    function["parameters"]["additionalProperties"] = False
    answer = client.chat.completions.create(
        model="rank4",
        messages=MESSAGES,
        max_tokens=300,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "f"}},
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.name == "f"
    assert json.loads(call.function.arguments)["x"] in {1, 2}


def test_errors_have_their_classes(live: Live, client: openai.OpenAI) -> None:
    for stream in (False, True):
        fields = {"messages": MESSAGES, "max_tokens": 3, "stream": stream}
        with pytest.raises(openai.NotFoundError, match="nobody") as missing:
            client.chat.completions.create(model="nobody", **fields)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            client.chat.completions.create(model="rank4", **fields, temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as long:
            client.completions.create(model="rank4", prompt="x" * 2000, stream=stream)
        assert long.value.code == "context_length_exceeded"
    engine = live.server.engine
    old, engine.max_waiting = engine.max_waiting, -live.server.runner.config.max_running
    try:
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="rank4", prompt="x")
        assert full.value.response.headers["retry-after"] == "1"
    finally:
        engine.max_waiting = old
