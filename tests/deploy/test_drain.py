"""SIGTERM to a real process under load: nobody is cut off, nobody gets in, and it ends with status 0."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import httpx
import uvicorn

from server.app import build_server, create_app
from server.drain import DrainingServer
from tests.live_server import tiny_settings

NUM_STREAMS = 32
START_TIMEOUT_S = 120


class Process:
    """A server in a process of its own; killed at the end of the block if it still runs."""

    def __init__(self, model: Path, store: Path, **flags: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        flags |= {"model": model, "store": store, "port": port, "min-free-bytes": 0, "kv-memory": "32M", "threads": 1}
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
        command = [sys.executable, "-m", "server", "serve", *given]
        self._errors = (store.parent / "stderr").open("w+")
        self._process = subprocess.Popen(command, stderr=self._errors, stdout=subprocess.DEVNULL)

    def __enter__(self) -> "Process":
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._process.poll() is None, "the server did not start"
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def log(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


async def _stream(
    client: httpx.AsyncClient, num_tokens: int, on_first: Callable[[], None], go_on: asyncio.Event
) -> list[Any]:
    """All events of a stream, of which those behind the first are read later."""
    parameters = {"max_new_tokens": num_tokens, "ignore_eos_token": True}
    events = []
    async with client.stream(
        "POST", "/generate_stream", json={"inputs": "Hello", "parameters": parameters}
    ) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line:
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 1:
                    on_first()
                    await go_on.wait()
    return events


class Terminable(Protocol):
    url: str

    def terminate(self) -> None: ...


async def _under_load(
    process: Terminable, num_tokens: int, after: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> Any:
    """Terminate the process once all streams have begun, then call `after`; the streams' events.

    Nobody reads them meanwhile: on a busy machine the server would be done before a reader had time for `after`.
    """
    begun, go_on = asyncio.Semaphore(0), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=process.url, timeout=60, limits=limits) as client:
        streams = [asyncio.create_task(_stream(client, num_tokens, begun.release, go_on)) for _ in range(NUM_STREAMS)]
        for _ in streams:
            await begun.acquire()
        process.terminate()
        await after(client)
        go_on.set()
        return await asyncio.gather(*streams)


def test_no_running_stream_is_cut(tiny: tuple[Path, Any, Any], tmp_path: Path) -> None:
    async def refused(client: httpx.AsyncClient) -> None:
        start_s = time.monotonic()
        while (ready := await client.get("/ready")).status_code == 200:
            assert time.monotonic() < start_s + 1
        assert (ready.status_code, ready.json()["code"]) == (503, "draining")
        assert (await client.get("/health")).status_code == 200
        new = await client.post("/generate", json={"inputs": "Hello", "parameters": {"max_new_tokens": 1}})
        assert (new.status_code, new.json()["code"], new.headers["connection"]) == (503, "draining", "close")
        assert int(new.headers["Retry-After"]) >= 1

    with Process(tiny[0], tmp_path / "store", **{"max-running": NUM_STREAMS}) as process:
        answers = asyncio.run(_under_load(process, 450, refused))
        assert process.wait(30) == 0, process.log()
    num_cut = sum(len(events) != 450 or events[-1]["generated_text"] is None for events in answers)
    print(f"{num_cut} of {NUM_STREAMS} running streams were cut")
    assert num_cut == 0


def test_after_the_deadline_the_rest_is_told(tiny: tuple[Path, Any, Any], tmp_path: Path) -> None:
    settings = tiny_settings(tiny[0], tmp_path, max_running=NUM_STREAMS, kv_memory=32 << 20)
    server = build_server(settings, report=lambda _: None)
    config = uvicorn.Config(create_app(server, settings), port=0, log_level="warning", timeout_graceful_shutdown=5)
    web = DrainingServer(config, server.drain, timeout_s=0.1, stop_work=server.engine.close)
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        time.sleep(0.01)

    class Signal:
        url = f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"

        def terminate(self) -> None:
            web.handle_exit(signal.SIGTERM, None)

    async def plain(client: httpx.AsyncClient) -> None:
        """Nothing more."""

    answers = asyncio.run(_under_load(Signal(), 500, plain))
    thread.join(20)
    assert not thread.is_alive()
    told = [events[-1] for events in answers if "error" in events[-1]]
    assert told, "all streams had ended before the deadline"
    assert {event["code"] for event in told} == {"shutting_down"}
    assert all(events[-1].get("generated_text") is not None for events in answers if "error" not in events[-1])
    server.store.check_integrity()
