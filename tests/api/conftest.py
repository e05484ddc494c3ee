"""A live server: uvicorn on a real socket, over a tiny model in float32 and adapters made by PEFT."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from server.app import Server, build_server, create_app
from server.settings import Settings
from tests import peft_adapters
from tests.tiny_folder import tiny_tokenizer, write_tiny_folder

MODEL_ID = "tiny"
IDLE_TIMEOUT_S = 20.0


@dataclass
class Live:
    """A running server, and PEFT's models for the same adapters."""

    url: str
    server: Server
    references: dict[str, Any]
    folders: dict[str, Path]
    tokenizer: Any

    def expected(self, name: str | None, prompt: str, num_tokens: int) -> tuple[list[int], str]:
        """Greedy tokens and text of the base or of one adapter, by transformers and PEFT."""
        return self._greedy(self.references[name or "base"], prompt, num_tokens)

    def expected_of_mix(self, weights: dict[str, float], prompt: str, num_tokens: int) -> tuple[list[int], str]:
        """Greedy tokens and text of the base plus the weighted sum of what PEFT's merges change."""
        base = self.references["base"]
        deltas = [(w, peft_adapters.merged_delta(base, self.references[name])) for name, w in weights.items()]
        return self._greedy(peft_adapters.with_deltas(base, deltas), prompt, num_tokens)

    def _greedy(self, model: Any, prompt: str, num_tokens: int) -> tuple[list[int], str]:
        tokens, _ = peft_adapters.greedy(model, self.tokenizer(prompt).input_ids, num_tokens)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return tokens, text.rstrip("\ufffd")  # a character that is never completed is not shown

    def assert_idle(self) -> None:
        """Wait for the last request to be gone; then nothing may be held by anybody."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while time.monotonic() < deadline:
            stats = self.server.engine.stats
            is_idle = not stats.num_running and not stats.num_waiting and stats.num_free_blocks == stats.num_blocks
            # A request may still be on its way into the engine.
            if is_idle and not self._num_leases() and not self.server.engine._num_open:
                break
            time.sleep(0.01)
        self.server.engine.check_integrity()
        self.server.registry.check_integrity(is_idle=True)
        self.server.store.check_integrity()

    def _num_leases(self) -> int:
        registry = self.server.registry
        with registry._lock:
            return sum(entry.num_open for entry in registry._entries.values())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Path]]:
    """A model folder, PEFT's models by adapter name (and "base"), and the adapters' folders."""
    root = tmp_path_factory.mktemp("tiny")
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    base = write_tiny_folder(root / MODEL_ID, "llama", seed)
    models: dict[str, Any] = {"base": base}
    folders = {}
    for i, (name, config) in enumerate(peft_adapters.VARIANTS.items()):
        models[name] = peft_adapters.peft_model(base, "llama", seed + i, **config)
        folders[name] = peft_adapters.save(models[name], root / "adapters" / name)
    return root / MODEL_ID, models, folders


@contextmanager
def serve(tiny: tuple[Path, dict[str, Any], dict[str, Path]], store: Path, **settings: Any) -> Iterator[Live]:
    """A server over the tiny model; afterwards it must hold nothing."""
    model, references, folders = tiny
    fixed: dict[str, Any] = {
        "dtype": "float32",
        "max_slots": 4,
        "max_running": 16,
        "max_step_tokens": 64,
        "kv_memory": 1 << 22,
        "max_upload_bytes": 1 << 20,
        "max_json_bytes": 1 << 17,
        "min_free_bytes": 0,
        "threads": 1,
    }
    chosen = Settings(model=str(model), store=store, adapters=folders, **fixed | settings)
    server = build_server(chosen, report=lambda _: None)
    config = uvicorn.Config(create_app(server, chosen), port=0, log_level="warning")
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = web.servers[0].sockets[0].getsockname()[1]
    live = Live(f"http://127.0.0.1:{port}", server, references, folders, tiny_tokenizer())
    try:
        yield live
        live.assert_idle()
    finally:
        web.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def live(
    tiny: tuple[Path, dict[str, Any], dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    with serve(tiny, tmp_path_factory.mktemp("store")) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client
