"""huggingface_hub, langchain-openai and curl, unmodified."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, OverloadedError, ValidationError
from langchain_openai import ChatOpenAI, OpenAI
from openai import NotFoundError
from pydantic import SecretStr

from tests.api.conftest import MODEL_ID, Live

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": PROMPT}]
NUM_TOKENS = 10


def chat_text(live: Live, name: str | None, num_tokens: int = NUM_TOKENS) -> str:
    prompt = live.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return live.expected(name, prompt, num_tokens)[1]


@pytest.mark.parametrize("name", [None, "rank8", "dora"])
def test_hubs_text_generation(live: Live, name: str | None) -> None:
    client = InferenceClient(model=live.url)
    tokens, text = live.expected(name, PROMPT, NUM_TOKENS)
    fields: dict[str, Any] = {"adapter_id": name, "max_new_tokens": NUM_TOKENS}
    answer = client.text_generation(PROMPT, **fields, details=True, decoder_input_details=True, top_n_tokens=2)
    ended = answer.details.finish_reason == "eos_token"
    assert [token.id for token in answer.details.tokens] == tokens[: len(answer.details.tokens)]
    assert ended or answer.generated_text == text
    assert len(answer.details.prefill) == len(live.tokenizer(PROMPT).input_ids)
    events = list(client.text_generation(PROMPT, **fields, details=True, stream=True))
    assert [event.token.id for event in events] == [token.id for token in answer.details.tokens]
    assert events[-1].generated_text == answer.generated_text
    assert events[-1].details.finish_reason == answer.details.finish_reason


def test_hubs_chat(live: Live) -> None:
    client = InferenceClient(base_url=live.url)
    fields: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    assert client.chat_completion(MESSAGES, **fields).choices[0].message.content == chat_text(live, None)
    one = client.chat_completion(MESSAGES, model="dora", **fields)
    assert one.choices[0].message.content == chat_text(live, "dora")
    chunks = client.chat_completion(MESSAGES, model="dora", stream=True, **fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat_text(live, "dora")
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = client.chat_completion(MESSAGES, max_tokens=200, response_format=form)
    assert json.loads(answer.choices[0].message.content)["x"] in {1, 2}


def test_hubs_async_client(live: Live) -> None:
    fields: dict[str, Any] = {"adapter_id": "rank4", "max_new_tokens": NUM_TOKENS, "stream": True}

    async def run() -> tuple[list[str], list[Any]]:
        async with AsyncInferenceClient(model=live.url) as client:
            pieces = [piece async for piece in await client.text_generation(PROMPT, **fields)]
            return pieces, [event async for event in await client.text_generation(PROMPT, **fields, details=True)]

    tokens, text = live.expected("rank4", PROMPT, NUM_TOKENS)
    pieces, events = asyncio.run(run())
    assert pieces == [event.token.text for event in events]
    assert [event.token.id for event in events] == tokens[: len(events)]
    # Random weights may make special tokens, which the generated text has not.
    written = "".join(event.token.text for event in events if not event.token.special)
    assert written == events[-1].generated_text
    assert written == text or 2 in tokens


def test_hubs_errors(live: Live) -> None:
    client = InferenceClient(model=live.url)
    with pytest.raises(ValidationError, match="max_new_tokens"):
        client.text_generation(PROMPT, max_new_tokens=10_000)
    with pytest.raises(Exception, match="nobody"):
        client.text_generation(PROMPT, adapter_id="nobody")
    with pytest.raises(HfHubHTTPError, match="nobody"):
        InferenceClient(base_url=live.url).chat_completion(MESSAGES, model="nobody")
    engine = live.server.engine
    old, engine.max_waiting = engine.max_waiting, -live.server.runner.config.max_running
    try:
        with pytest.raises(OverloadedError):
            client.text_generation(PROMPT)
    finally:
        engine.max_waiting = old


@pytest.fixture
def http_client() -> Iterator[httpx.Client]:
    """langchain leaves its own open."""
    with httpx.Client(timeout=60) as client:
        yield client


def test_langchain(live: Live, http_client: httpx.Client) -> None:
    fields: dict[str, Any] = {
        "http_client": http_client,
        "base_url": f"{live.url}/v1",
        "api_key": SecretStr("none"),
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    chat = ChatOpenAI(model="dora", max_completion_tokens=NUM_TOKENS, stream_usage=True, **fields)
    answer = chat.invoke(PROMPT)
    assert answer.content == chat_text(live, "dora")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == NUM_TOKENS
    pieces = list(chat.stream(PROMPT))
    assert "".join(str(piece.content) for piece in pieces) == chat_text(live, "dora")
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == NUM_TOKENS
    text = OpenAI(model="rank8", max_tokens=NUM_TOKENS, **fields).invoke(PROMPT)
    assert text == live.expected("rank8", PROMPT, NUM_TOKENS)[1]
    with pytest.raises(NotFoundError, match="nobody"):
        ChatOpenAI(model="nobody", **fields).invoke(PROMPT)


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def test_curl(live: Live) -> None:
    json_type = ("-H", "Content-Type: application/json")
    parameters = {"adapter_id": "rank4", "max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
    body = json.dumps({"inputs": PROMPT, "parameters": parameters})
    _, text = live.expected("rank4", PROMPT, NUM_TOKENS)
    assert json.loads(curl(f"{live.url}/generate", *json_type, "-d", body))["generated_text"] == text
    lines = curl("-N", f"{live.url}/generate_stream", *json_type, "-d", body).strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["generated_text"] == text
    status = curl("-o", "/dev/null", "-w", "%{http_code}", f"{live.url}/nowhere")
    assert status == "404"
    head = curl("-I", "-X", "GET", f"{live.url}/health")
    assert " 200 " in head.splitlines()[0]
    assert MODEL_ID in curl(f"{live.url}/v1/models")
