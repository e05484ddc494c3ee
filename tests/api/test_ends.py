"""However a call ends, its client is told in its own words, and nothing is left behind."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.api.conftest import Live

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True, "max_tokens": 400}
CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "ignore_eos": True, "max_tokens": 400, "n": 2},
    "/v1/chat/completions": CHAT,
    "/": {"inputs": "Hello", "parameters": {"max_new_tokens": 400, "ignore_eos_token": True}},
}


def events(text: str) -> list[Any]:
    frames = text.split("\n\n")
    assert frames.pop() == ""
    return [frame if frame == "data: [DONE]" else json.loads(frame.removeprefix("data: ")) for frame in frames]


@contextmanager
def broken(live: Live, name: str) -> Iterator[None]:
    """An adapter whose file is damaged when it is read."""
    record = live.server.store.get(name)
    live.server.registry.forget(record.digest)
    path = next((live.server.store._objects.root / record.digest).glob("*.safetensors"))
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        yield
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("path", CALLS)
@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_frees_everything(live: Live, path: str, streams: bool) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
            for _ in range(4):
                call = asyncio.create_task(client.post(path, json=CALLS[path] | {"stream": streams}))
                await asyncio.sleep(random.random() * 0.2)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)

    generated = live.server.engine.stats.num_generated_tokens
    asyncio.run(run())
    live.assert_idle()
    num_sequences = CALLS[path].get("n", 1)
    assert live.server.engine.stats.num_generated_tokens - generated < 4 * num_sequences * 400 * 0.8


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_went_first_is_accounted_for(
    live: Live, client: httpx.Client, streams: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def count(status: int) -> float:
        line = f'loramux_http_requests_total{{method="POST",route="/v1/completions",status="{status}"}} '
        found = [text for text in client.get("/metrics").text.splitlines() if text.startswith(line)]
        return float(found[0].removeprefix(line)) if found else 0.0

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as leaving:
            body = CALLS["/v1/completions"] | {"stream": streams}
            call = asyncio.create_task(leaving.post("/v1/completions", json=body, headers={"X-Request-Id": "gone"}))
            await asyncio.sleep(0.1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    before = count(499), count(200)
    caplog.set_level("INFO", "server.api.access_log")
    asyncio.run(leave())
    live.assert_idle()
    deadline = time.monotonic() + 10
    while count(499) == before[0]:
        assert time.monotonic() < deadline
    assert (count(499) - before[0], count(200) - before[1]) == (1, 0)
    (line,) = (record.getMessage() for record in caplog.records if "/v1/completions" in record.getMessage())
    assert "POST /v1/completions 499" in line
    assert "request gone" in line
    assert client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
    assert (count(499) - before[0], count(200) - before[1]) == (1, 1)


@pytest.mark.parametrize("path", CALLS)
def test_a_failure_after_the_headers_is_an_event(live: Live, client: httpx.Client, path: str) -> None:
    with broken(live, "dora16"):
        body = CALLS[path] | {"stream": True}
        if path != "/":
            body["model"] = "dora16"
        response = client.post(path, json=body, headers={"X-Adapter-Id": "dora16"})
    assert response.status_code == 200
    told = events(response.text)
    if path == "/":
        (error,) = told
        assert error["code"] == "adapter_corrupt"
        assert error["error_type"] == "incomplete_generation"
    else:
        error, done = told
        assert error["error"]["code"] == "adapter_corrupt"
        assert done == "data: [DONE]"
    live.assert_idle()


def test_a_call_that_finds_half_a_place_starts_nothing(live: Live, client: httpx.Client) -> None:
    engine = live.server.engine
    old, engine.max_waiting = engine.max_waiting, 4 - live.server.runner.config.max_running
    try:
        response = client.post("/v1/completions", json={"prompt": "Hello", "n": 8, "max_tokens": 200})
    finally:
        engine.max_waiting = old
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    live.assert_idle()
