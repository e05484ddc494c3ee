"""The clients against a live server."""

import asyncio
import json
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loramux_client import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    ChatOptions,
    Client,
    ConflictError,
    GenerateOptions,
    GenerationError,
    IncompleteAnswerError,
    InvalidRequestError,
    Job,
    JobBar,
    JobFailedError,
    NotFoundError,
    ProgressBar,
    RetryPolicy,
    ServerError,
    TooLargeError,
    UnexpectedAnswerError,
)
from server.schemas.chat import ChatRequest
from server.schemas.tgi import GenerateParameters
from tests.api.conftest import Live

PROMPT = "What is the capital of France?"
EXACT: Any = {"max_new_tokens": 12, "ignore_eos_token": True}


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.url) as client:
        yield client


def test_answers_are_those_of_peft(live: Live, client: Client) -> None:
    for name in (None, "dora", "rank8"):
        ids, text = live.expected(name, PROMPT, 12)
        answer = client.generate(PROMPT, adapters=name, **EXACT)
        assert (answer.text, [token.id for token in answer.tokens]) == (text, ids)
        assert (answer.finish_reason, answer.num_generated_tokens) == ("length", 12)
        assert answer.num_prompt_tokens == len(live.tokenizer(PROMPT).input_ids)


def test_a_mix_of_one_is_that_one_and_weights_matter(live: Live, client: Client) -> None:
    assert client.generate(PROMPT, adapters={"dora": 1}, **EXACT).text == live.expected("dora", PROMPT, 12)[1]
    assert client.generate(PROMPT, adapters={"dora": 0}, **EXACT).text == live.expected(None, PROMPT, 12)[1]
    assert client.generate(PROMPT, adapters={}, **EXACT).text == live.expected(None, PROMPT, 12)[1]


def test_a_stream_gives_the_same_token_by_token(live: Live, client: Client) -> None:
    whole = client.generate(PROMPT, adapters="rank4", temperature=0.9, seed=5, max_new_tokens=9)
    with client.stream(PROMPT, adapters="rank4", temperature=0.9, seed=5, max_new_tokens=9) as stream:
        tokens = list(stream)
    assert tokens == whole.tokens
    assert "".join(token.text for token in tokens) == stream.result.text == whole.text
    assert stream.result.seed == 5
    without_block = client.stream(PROMPT, **EXACT)
    assert len(list(without_block)) == without_block.result.num_generated_tokens == 12


def test_leaving_a_stream_stops_it(live: Live, client: Client) -> None:
    with client.stream(PROMPT, max_new_tokens=400, ignore_eos_token=True) as stream:
        next(stream)
    with pytest.raises(IncompleteAnswerError):
        _ = stream.result
    live.assert_idle()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_refusals_are_typed(live: Live, client: Client) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.generate(PROMPT, adapters="nobody")
    assert (missing.value.code, missing.value.status, missing.value.param) == ("adapter_not_found", 404, "adapter")
    assert missing.value.request_id
    with pytest.raises(NotFoundError), client.stream(PROMPT, adapters="nobody"):
        pass
    with pytest.raises(InvalidRequestError) as invalid:
        client.generate(PROMPT, top_p=2.0)
    assert invalid.value.code == "invalid_value"
    with pytest.raises(TypeError, match="max_tokens"):
        client.generate(PROMPT, max_tokens=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        client.generate(PROMPT, adapters=["dora"])  # type: ignore[arg-type]


def test_adapters_come_and_go(live: Live, client: Client, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    adapter = client.adapters.upload(live.folders["dora"], "mine", progress=lambda done, of: seen.append((done, of)))
    assert (adapter.name, adapter.generation, adapter.details["type"]) == ("mine", 1, "dora")
    total = sum((live.folders["dora"] / name).stat().st_size for name in ("adapter_config.json", WEIGHTS))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert client.generate(PROMPT, adapters="mine", **EXACT).text == live.expected("dora", PROMPT, 12)[1]
    assert client.adapters.get("mine").digest == adapter.digest
    assert {*live.folders, "mine"} == {each.name for each in client.adapters.list()}
    assert client.adapters.delete("mine").name == "mine"
    for call in (client.adapters.get, client.adapters.delete):
        with pytest.raises(NotFoundError):
            call("mine")
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(live.folders["rank4"], "folder")
    assert client.adapters.upload(tmp_path / "packed.tar.gz").name == "packed"
    assert client.adapters.delete("packed").generation == 1


def test_generations_and_tiers(live: Live, client: Client) -> None:
    first = client.adapters.upload(live.folders["rank4"], "many", labels={"stage": "one"}, note="the first")
    assert (first.labels, first.note, first.is_current) == ({"stage": "one"}, "the first", True)
    second = client.adapters.upload(live.folders["rank8"], "many", expected_generation=1, promote=False)
    assert (second.generation, second.is_current) == (2, False)
    with pytest.raises(ConflictError) as conflict:
        client.adapters.upload(live.folders["dora"], "many", expected_generation=2)
    assert conflict.value.body["error"]["current_generation"] == 1
    assert client.generate(PROMPT, adapters="many@2", **EXACT).text == live.expected("rank8", PROMPT, 12)[1]
    assert client.adapters.promote("many", 2, expected_generation=1).generation == 2
    assert client.generate(PROMPT, adapters="many", **EXACT).text == live.expected("rank8", PROMPT, 12)[1]
    assert client.adapters.rollback("many").generation == 1
    assert [one.generation for one in client.adapters.generations("many")] == [2, 1]
    assert client.adapters.annotate("many", generation=2, note="the other").note == "the other"
    assert client.adapters.delete("many", generation=2).generation == 2
    assert client.adapters.warm("many").residency == "slot"
    assert client.adapters.pin("many").is_pinned
    with pytest.raises(ConflictError):
        client.adapters.evict("many")
    assert not client.adapters.unpin("many").is_pinned
    assert client.adapters.evict("many").residency == "store"
    client.adapters.delete("many", expected_generation=1)


def test_a_live_chat(live: Live, client: Client) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    options: Any = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    base, adapted = (client.chat(messages, adapters=name, **options) for name in (None, "dora"))
    assert base.usage.completion_tokens == 8
    assert base.text != adapted.text
    assert client.chat(messages, adapters={"dora": 1.0}, **options).text == adapted.text
    with client.chat_stream(messages, adapters="dora", **options) as stream:
        assert "".join(delta.text for delta in stream) == adapted.text
    assert stream.result.usage == adapted.usage
    assert stream.result.finish_reason == "length"


def test_options_are_the_servers() -> None:
    assert GenerateOptions.__annotations__.keys() <= GenerateParameters.model_fields.keys()
    assert ChatOptions.__annotations__.keys() <= ChatRequest.model_fields.keys()


WEIGHTS = "adapter_model.safetensors"


def test_uploads_that_cannot_be(live: Live, client: Client, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder and no archive"):
        client.adapters.upload(tmp_path / "nothing")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors; .*safe_serialization"):
        client.adapters.upload(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x" * (3 << 20))
    with pytest.raises(TooLargeError):
        client.adapters.upload(tmp_path, "big")
    (tmp_path / WEIGHTS).write_bytes(b"x")
    with pytest.raises(InvalidRequestError) as refused:
        client.adapters.upload(tmp_path, "broken")
    assert refused.value.code.startswith("adapter_")


def test_the_asynchronous_client(live: Live) -> None:
    async def main() -> None:
        async with AsyncClient(live.url) as client:
            assert (await client.info()).model_id == "tiny"
            names = [None, "dora", "rank16"]
            answers = await asyncio.gather(*(client.generate(PROMPT, adapters=name, **EXACT) for name in names))
            assert [a.text for a in answers] == [live.expected(name, PROMPT, 12)[1] for name in names]
            async with client.stream(PROMPT, adapters="dora", **EXACT) as stream:
                text = "".join([token.text async for token in stream])
            assert text == stream.result.text == answers[1].text
            adapter = await client.adapters.upload(live.folders["rank4"], "async")
            assert await client.adapters.get("async") == adapter
            assert adapter in await client.adapters.list()
            await client.adapters.delete("async")
            with pytest.raises(NotFoundError):
                await client.generate(PROMPT, adapters="async")

    asyncio.run(main())


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", retries=RetryPolicy(max_retries=1, first_wait_s=0.01))
    with client, pytest.raises(APIConnectionError):
        client.info()


def _mocked(*answers: httpx.Response | Exception) -> tuple[Client, list[httpx.Request]]:
    left, seen = list(answers), []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    quick = RetryPolicy(first_wait_s=0.001, max_wait_s=0.001)
    return Client(api_key="secret", retries=quick, transport=httpx.MockTransport(handle)), seen


def _events(*bodies: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies) + b"data: [DONE]\n\n"


def test_an_upload_is_sent_again_whole(tmp_path: Path) -> None:
    for name in ("adapter_config.json", WEIGHTS):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    done = {"name": "a", "digest": "d", "generation": 1, "created_at": "2026-01-01T00:00:00Z", "num_bytes": 1}
    client, seen = _mocked(httpx.Response(429), httpx.ConnectError("no"), httpx.Response(201, json=done))
    assert client.adapters.upload(tmp_path, "a").name == "a"
    sizes = {len(request.content) for request in (seen[0], seen[2])}
    assert len(sizes) == 1
    assert sizes.pop() > 1000 * len("adapter_config.json" + WEIGHTS)
    assert seen[0].headers["Authorization"] == "Bearer secret"
    client, seen = _mocked(httpx.ReadError("cut"))
    with pytest.raises(APIConnectionError):
        client.adapters.upload(tmp_path, "a")
    assert len(seen) == 1


def test_a_failure_inside_a_stream() -> None:
    token = {"index": 1, "token": {"id": 1, "text": "a", "logprob": -1.0, "special": False}, "generated_text": None}
    error = {"error": "it failed", "error_type": "generation", "code": "output_not_finite"}
    client, _ = _mocked(httpx.Response(200, content=_events(token, error)))
    stream = client.stream("x")
    assert next(stream).text == "a"
    with pytest.raises(GenerationError) as failed:
        next(stream)
    assert (failed.value.code, str(failed.value)) == ("output_not_finite", "it failed")
    client, _ = _mocked(httpx.Response(200, content=_events(token)))
    with pytest.raises(IncompleteAnswerError):
        list(client.stream("x"))


def test_a_chat_and_its_stream() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    plain = {"id": "c", "model": "m", "usage": usage}
    plain |= {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]}

    def chunk(**choice: Any) -> dict[str, Any]:
        return {"id": "c", "model": "m", "choices": [{"index": 0, "finish_reason": None} | choice]}

    pieces = [chunk(delta={"role": "assistant", "content": ""}), chunk(delta={"content": "H"})]
    pieces += [chunk(delta={"content": "i"}), chunk(delta={}, finish_reason="stop")]
    pieces += [{"id": "c", "model": "m", "choices": [], "usage": usage}]
    client, seen = _mocked(httpx.Response(200, json=plain), httpx.Response(200, content=_events(*pieces)))
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.chat(messages, adapters={"a": 1, "b": 0.5}, max_tokens=2)
    assert (answer.text, answer.finish_reason, answer.usage.total_tokens) == ("Hi", "stop", 3)
    sent = json.loads(seen[0].content)
    assert sent["adapters"] == [{"name": "a", "weight": 1.0}, {"name": "b", "weight": 0.5}]
    stream = client.chat_stream(messages, adapters="a")
    assert "".join(delta.text for delta in stream) == "Hi"
    assert stream.result == answer
    assert json.loads(seen[1].content)["model"] == "a"


def test_a_chat_that_calls_tools() -> None:
    first = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": ""}}
    deltas = [{"tool_calls": [first]}]
    deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"a"', ": 1}")]
    events: list[Any] = [{"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    events.append({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    events.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}})
    client, _ = _mocked(httpx.Response(200, content=_events(*events)))
    stream = client.chat_stream([{"role": "user", "content": "x"}])
    list(stream)
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert stream.result.tool_calls == [{"type": "function", "id": "t", "function": function}]


def test_answers_that_are_not_ours() -> None:
    client, _ = _mocked(httpx.Response(200, json={"hello": 1}))
    with pytest.raises(UnexpectedAnswerError, match="no ServerInfo"):
        client.info()
    client, _ = _mocked(httpx.Response(500, json={"error": "x", "code": "internal_error"}))
    with pytest.raises(ServerError):
        client.info()


def _job(state: str, fraction: float = 0.0, **others: Any) -> httpx.Response:
    values = {"job_id": "j", "kind": "mix", "state": state, "fraction": fraction, "stage": "layers", "eta_s": 2.0}
    return httpx.Response(200, json=values | others)


def test_waiting_for_a_job() -> None:
    client, seen = _mocked(_job("queued"), _job("running", 0.5), _job("succeeded", 1.0, result={"name": "ab"}))
    job = client.jobs.create("mix", name="ab", adapters=[{"name": "a"}], svd_rank=None)
    assert json.loads(seen[0].content) == {"kind": "mix", "name": "ab", "adapters": [{"name": "a"}]}
    shown: list[Job] = []
    assert client.jobs.wait(job, progress=shown.append).result == {"name": "ab"}
    assert [(one.state, one.fraction) for one in shown] == [("running", 0.5), ("succeeded", 1.0)]


@pytest.mark.parametrize("state", ["failed", "cancelled", "interrupted"])
def test_a_job_that_comes_to_nothing(state: str) -> None:
    client, _ = _mocked(_job(state, error={"message": "no space", "code": "storage_full"}))
    with pytest.raises(JobFailedError, match=rf"job j \(mix\) {state}: no space"):
        client.jobs.wait("j")


def test_a_job_that_takes_too_long() -> None:
    client, _ = _mocked(*[_job("running")] * 3)
    with pytest.raises(APITimeoutError):
        client.jobs.wait("j", timeout_s=0.25)


class _Terminal:
    """A terminal that remembers."""

    def __init__(self, is_terminal: bool) -> None:
        self.text = ""
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_the_bar_is_drawn_on_terminals_only() -> None:
    terminal, pipe = _Terminal(True), _Terminal(False)
    for stream in (terminal, pipe):
        bar = ProgressBar(stream)  # type: ignore[arg-type]
        for done in range(0, 1001, 10):
            bar(done, 1000)
        JobBar(stream)(Job(job_id="j", kind="mix", state="running", fraction=0.5, stage="layers", eta_s=3))  # type: ignore[arg-type]
    assert pipe.text == ""
    assert "mix [###############...............]  50% running layers, 3 s left" in terminal.text
    assert terminal.text.count("\n") == 1
    assert "100%" in terminal.text
    assert terminal.text.count("\r") < 5
