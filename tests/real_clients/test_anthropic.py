"""Anthropic's Python client, unmodified: whole answers, streams, and its exception classes."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.api.conftest import MODEL_ID, Live
from tests.api.test_ends import broken
from tests.auth.conftest import Guarded

MESSAGES: list[Any] = [{"role": "user", "content": "The quick brown fox"}]
NUM_TOKENS = 10
GREEDY = {"temperature": 0}  # a field that this client has no argument for
EXTRA: dict[str, Any] = {"messages": MESSAGES, "max_tokens": NUM_TOKENS, "extra_body": GREEDY}


@pytest.fixture
def client(live: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def expected(live: Live, name: str | None, messages: list[Any]) -> tuple[str, int]:
    """Greedy text for a conversation, and the number of the prompt's tokens."""
    prompt = live.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, text = live.expected(name, prompt, NUM_TOKENS)
    return text, len(live.tokenizer(prompt, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", [MODEL_ID, "rank8", "dora", "rank8@1"])
def test_a_message_and_its_stream(live: Live, client: anthropic.Anthropic, name: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    adapter = None if name == MODEL_ID else name.partition("@")[0]
    text, num_prompt = expected(live, adapter, [system, *MESSAGES])
    answer = client.messages.create(model=name, system="Be brief.", **EXTRA)
    (block,) = answer.content
    assert block.type == "text"
    ended = answer.stop_reason == "end_turn"
    assert block.text == text or (ended and text.startswith(block.text))
    assert (answer.role, answer.model, answer.stop_sequence) == ("assistant", name, None)
    assert ended or answer.stop_reason == "max_tokens"
    assert answer.usage.input_tokens == num_prompt
    assert answer.usage.output_tokens == NUM_TOKENS or ended
    with client.messages.stream(model=name, system=[{"type": "text", "text": "Be brief."}], **EXTRA) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (answer.stop_reason, answer.usage.output_tokens)
    assert final.usage.input_tokens == num_prompt
    kinds = [event.type for event in client.messages.create(model=name, system="Be brief.", stream=True, **EXTRA)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) <= {"content_block_delta"}


def test_stop_sequences_and_mixes(live: Live, client: anthropic.Anthropic) -> None:
    text = ""
    for i in range(50):  # until a random model says enough
        asked = EXTRA | {"messages": [{"role": "user", "content": f"Fox {i}"}]}
        text = client.messages.create(model="rank4", **asked).content[0].text  # type: ignore[union-attr]
        if len(text) > 4:
            break
    stop = text[len(text) // 2 :][:2]
    fields = asked | {"stop_sequences": ["never this", stop]}
    answer = client.messages.create(model="rank4", **fields)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]
    with client.messages.stream(model="rank4", **fields) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == answer.content[0].text  # type: ignore[union-attr]
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    mix = asked | {"extra_body": GREEDY | {"adapters": [{"name": "rank4", "weight": 1.0}]}}
    assert client.messages.create(model=MODEL_ID, **mix).content[0].text == text  # type: ignore[union-attr]


def test_the_async_client(live: Live, client: anthropic.Anthropic) -> None:
    async def run() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=live.url, api_key="none") as asynchronous:

            async def one(name: str) -> str:
                async with asynchronous.messages.stream(model=name, **EXTRA) as stream:
                    return await stream.get_final_text()

            return await asyncio.gather(*(one(name) for name in ("rank4", "dora", MODEL_ID)))

    names = ("rank4", "dora", MODEL_ID)
    assert asyncio.run(run()) == [client.messages.create(model=name, **EXTRA).content[0].text for name in names]  # type: ignore[union-attr]
    live.assert_idle()


def test_errors_have_their_classes(live: Live, client: anthropic.Anthropic, guarded: Guarded) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.NotFoundError, match="nobody") as missing:
            client.messages.create(model="nobody", stream=stream, **EXTRA)
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            client.messages.create(model="rank4", stream=stream, **EXTRA | {"extra_body": {"temperature": 2}})
        with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
            client.messages.create(model="rank4", stream=stream, **EXTRA | {"max_tokens": 100_000})
        for field, value in (("tools", [{"name": "f", "input_schema": {}}]), ("thinking", {"type": "enabled"})):
            with pytest.raises(anthropic.BadRequestError, match=f"`{field}` is not supported"):
                client.messages.create(model="rank4", stream=stream, **EXTRA | {"extra_body": {field: value}})
        prefilled = [*MESSAGES, {"role": "assistant", "content": "Well,"}]
        with pytest.raises(anthropic.BadRequestError, match="assistant's last message"):
            client.messages.create(model="rank4", stream=stream, **EXTRA | {"messages": prefilled})
        image = [{"type": "image", "source": {"type": "url", "url": "x"}}]
        with pytest.raises(anthropic.BadRequestError, match="'image' is not supported"):
            client.messages.create(model="rank4", **EXTRA | {"messages": [{"role": "user", "content": image}]})
    engine = live.server.engine
    old, engine.max_waiting = engine.max_waiting, -live.server.runner.config.max_running
    try:
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(model="rank4", **EXTRA)
    finally:
        engine.max_waiting = old
    with anthropic.Anthropic(base_url=guarded.url, api_key=guarded.secrets["a"], max_retries=0) as own:
        assert own.messages.create(model="own", **EXTRA).content
        with pytest.raises(anthropic.NotFoundError, match="secret"):
            own.messages.create(model="secret", **EXTRA)
    with anthropic.Anthropic(base_url=guarded.url, api_key="lmx_wrong", max_retries=0) as wrong:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            wrong.messages.create(model="own", **EXTRA)
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_a_failure_after_the_headers_is_an_event(live: Live, client: anthropic.Anthropic) -> None:
    with broken(live, "dora16"), pytest.raises(anthropic.APIError, match=r"damaged|digest|contents"):
        list(client.messages.create(model="dora16", stream=True, **EXTRA))
    live.assert_idle()


def test_a_stream_that_is_left_frees_its_place(live: Live, client: anthropic.Anthropic) -> None:
    stream = client.messages.create(model="rank4", stream=True, **EXTRA | {"max_tokens": 400})
    next(iter(stream))
    stream.close()
    live.assert_idle()
