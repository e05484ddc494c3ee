"""Many requests at once: each ends once, with the right text, and nothing stays behind."""

import asyncio
import json
import random
from typing import Any

import httpx

from tests import peft_adapters
from tests.api.conftest import Live

NAMES = [None, *peft_adapters.VARIANTS]
PROMPTS = ["The quick brown fox", "What is the capital", "Käse aus Köln", "done " * 30]


def _body(name: str | None, prompt: str, num_tokens: int) -> dict[str, Any]:
    return {
        "inputs": prompt,
        "parameters": {"adapter_id": name, "max_new_tokens": num_tokens, "ignore_eos_token": True, "details": True},
    }


async def _plain(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["details"]["generated_tokens"] == body["parameters"]["max_new_tokens"]
    return answer["generated_text"]


async def _streamed(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None = None) -> str:
    events = []
    async with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line:
                events.append(json.loads(line[6:]))
            if leave_after is not None and len(events) == leave_after:
                return ""
    assert [event["index"] for event in events] == list(range(1, body["parameters"]["max_new_tokens"] + 1))
    assert [event["generated_text"] is None for event in events] == [True] * (len(events) - 1) + [False]
    return events[-1]["generated_text"]


def test_32_requests_on_8_adapters_with_4_slots_some_cancelled(live: Live) -> None:
    jobs = [(NAMES[i % len(NAMES)], random.choice(PROMPTS), random.randint(5, 40)) for i in range(32)]
    cancelled_streams, cancelled_plain = {3, 11, 19}, {6, 14}

    async def run() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits) as client:

            async def one(i: int) -> str:
                name, prompt, num_tokens = jobs[i]
                if i in cancelled_streams:
                    return await _streamed(client, _body(name, prompt, 300), leave_after=2)
                if i in cancelled_plain:
                    try:
                        async with asyncio.timeout(0.3):
                            return await _plain(client, _body(name, prompt, 350))
                    except TimeoutError:
                        return ""
                work = _streamed if i % 2 else _plain
                return await work(client, _body(name, prompt, num_tokens))

            return await asyncio.gather(*(one(i) for i in range(len(jobs))))

    texts = asyncio.run(run())
    for i, (text, (name, prompt, num_tokens)) in enumerate(zip(texts, jobs, strict=True)):
        if i not in cancelled_streams | cancelled_plain:
            assert text == live.expected(name, prompt, num_tokens)[1], (i, name)
    live.assert_idle()


def test_a_client_that_goes_before_its_answer_frees_everything_soon(live: Live) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
            for path in ("/generate", "/generate_stream") * 5:
                request = asyncio.create_task(client.post(path, json=_body("rank4", "Hello", 450)))
                await asyncio.sleep(random.random() * 0.05)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)

    generated = live.server.engine.stats.num_generated_tokens
    asyncio.run(run())
    live.assert_idle()
    assert live.server.engine.stats.num_generated_tokens - generated < 10 * 450 / 2


def test_a_full_queue_is_429_with_retry_after(live: Live) -> None:
    engine = live.server.engine
    old, engine.max_waiting = engine.max_waiting, 0

    async def run() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits) as client:
            jobs = [client.post("/generate", json=_body(None, "Hello", 60)) for _ in range(40)]
            return await asyncio.gather(*jobs)

    try:
        responses = asyncio.run(run())
    finally:
        engine.max_waiting = old
    refused = [response for response in responses if response.status_code != 200]
    assert refused
    assert {response.status_code for response in refused} == {429}
    assert {response.json()["code"] for response in refused} == {"overloaded"}
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert len(responses) - len(refused) >= live.server.runner.config.max_running
    live.assert_idle()
