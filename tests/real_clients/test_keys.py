"""Clients with a wrong key, with none, and with one that does not reach what they ask for; each in its own words."""

import asyncio
import json
import subprocess
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, UnknownError
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from server.auth.keys import Scope
from tests.auth.conftest import Guarded

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
WRONG = "lmx_wrong"


def test_openai(guarded: Guarded) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}
    guarded.add_key("reader", [Scope.ADAPTERS_READ])
    for stream in (False, True):
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=WRONG, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as wrong:
                client.chat.completions.create(model="own", **fields, stream=stream)
            assert (wrong.value.status_code, wrong.value.code) == (401, "invalid_api_key")
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.secrets["a"], max_retries=0) as client:
            assert client.chat.completions.create(model="own", **fields)
            with pytest.raises(openai.NotFoundError) as missing:
                client.chat.completions.create(model="secret", **fields, stream=stream)
            assert missing.value.code == "model_not_found"
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.secrets["reader"], max_retries=0) as client:
            with pytest.raises(openai.PermissionDeniedError) as refused:
                client.chat.completions.create(model="public", **fields, stream=stream)
            assert refused.value.code == "scope_missing"

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key=WRONG, max_retries=0) as client:
            await client.chat.completions.create(model="own", **fields)

    with pytest.raises(openai.AuthenticationError):
        asyncio.run(run())


def test_huggingface_hub(guarded: Guarded) -> None:
    right = InferenceClient(model=guarded.url, token=guarded.secrets["a"])
    assert right.text_generation("Hello", adapter_id="own", max_new_tokens=2, details=True).details.generated_tokens
    with pytest.raises(Exception, match="secret"):
        right.text_generation("Hello", adapter_id="secret", max_new_tokens=2)
    wrong = InferenceClient(model=guarded.url, token=WRONG)
    with pytest.raises(UnknownError, match="the API key is not valid") as unknown:  # it has no class for it
        wrong.text_generation("Hello", adapter_id="own", max_new_tokens=2)
    assert isinstance(unknown.value.__cause__, HfHubHTTPError)
    assert unknown.value.__cause__.response.status_code == 401
    with pytest.raises(HfHubHTTPError) as refused:
        InferenceClient(base_url=guarded.url, api_key=WRONG).chat_completion(MESSAGES, model="own", max_tokens=2)
    assert refused.value.response.status_code == 401


def test_langchain(guarded: Guarded) -> None:
    with httpx.Client(timeout=60) as http_client:  # langchain leaves its own open
        fields: dict[str, Any] = {"base_url": f"{guarded.url}/v1", "http_client": http_client, "max_retries": 0}
        wrong = ChatOpenAI(model="own", api_key=SecretStr(WRONG), **fields)
        with pytest.raises(openai.AuthenticationError):
            wrong.invoke("Hello")
        with pytest.raises(openai.AuthenticationError):
            list(wrong.stream("Hello"))
        with pytest.raises(openai.NotFoundError, match="secret"):
            ChatOpenAI(model="secret", api_key=SecretStr(guarded.secrets["a"]), **fields).invoke("Hello")


def test_curl(guarded: Guarded) -> None:
    def curl(key: str | None, adapter: str) -> tuple[int, Any]:
        body = json.dumps({"inputs": "Hello", "parameters": {"adapter_id": adapter, "max_new_tokens": 2}})
        command = ["curl", "-sS", "-w", "\n%{http_code}", f"{guarded.url}/generate", "-d", body]
        command += ["-H", "Content-Type: application/json"]
        command += [] if key is None else ["-H", f"Authorization: Bearer {key}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        answer, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(answer)

    for key in (None, WRONG):
        status, answer = curl(key, "own")
        assert (status, answer["code"], answer["error_type"]) == (401, "invalid_api_key", "authentication")
    status, answer = curl(guarded.secrets["a"], "secret")
    assert (status, answer["code"], answer["error_type"]) == (404, "adapter_not_found", "not_found")
    status, answer = curl(guarded.secrets["a"], "own")
    assert (status, list(answer)) == (200, ["generated_text"])
