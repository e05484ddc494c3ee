"""A server on a real socket in this process, over the tiny model."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from server.app import Server, build_server, create_app
from server.settings import Settings

__all__ = ["running_server", "tiny_settings"]


def tiny_settings(model: Path, store: Path, **others: Any) -> Settings:
    """Settings with small limits."""
    return Settings(
        model=str(model),
        store=store,
        dtype="float32",
        threads=1,
        **{"max_slots": 4, "max_running": 16, "kv_memory": 1 << 22, "min_free_bytes": 0} | others,
    )


@contextmanager
def running_server(settings: Settings) -> Iterator[tuple[str, Server]]:
    """Its URL and its parts."""
    server = build_server(settings, report=lambda _: None)
    web = uvicorn.Server(uvicorn.Config(create_app(server, settings), port=0, log_level="warning"))
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        web.should_exit = True
        thread.join()
