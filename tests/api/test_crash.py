"""Kill -9 while adapters are uploaded over HTTP: what was acknowledged is there afterwards, byte for byte."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.store import FILE_NAMES, AdapterStore

NUM_ROUNDS = 6
START_TIMEOUT_S = 120


class Process:
    """A server in a process of its own, over the tiny model."""

    def __init__(self, model: Path, store: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        flags = {"model": model, "store": store, "port": port, "min-free-bytes": 0, "kv-memory": "4M", "threads": 1}
        command = [sys.executable, "-m", "server", "serve", *(f"--{name}={value}" for name, value in flags.items())]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._process.poll() is None, "the server did not start"
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _upload_until_it_dies(
    url: str, worker: int, folders: list[Path], acknowledged: dict[str, tuple[int, str, Path]]
) -> None:
    rng = random.Random()
    with httpx.Client(base_url=url, timeout=30) as client:
        while True:
            name, folder = f"adapter-{worker}-{rng.randrange(3)}", rng.choice(folders)
            files = [("files", (file_name, (folder / file_name).read_bytes())) for file_name in FILE_NAMES]
            try:
                response = client.post("/admin/adapters", data={"name": name}, files=files)
            except httpx.TransportError:
                return
            if response.status_code == 201:
                info = response.json()
                acknowledged[name] = (info["generation"], info["digest"], folder)
            else:
                assert response.status_code == 429


@pytest.mark.slow
def test_kill_9_during_uploads(tiny: tuple[Path, Any, dict[str, Path]], tmp_path: Path) -> None:
    model, _, by_name = tiny
    folders = list(by_name.values())
    acknowledged: dict[str, tuple[int, str, Path]] = {}
    for _ in range(NUM_ROUNDS):
        process = Process(model, tmp_path)
        listed = {a["name"]: a for a in httpx.get(f"{process.url}/admin/adapters").json()["adapters"]}
        for name, (generation, digest, _) in acknowledged.items():
            assert listed[name]["generation"] >= generation
            if listed[name]["generation"] == generation:
                assert listed[name]["digest"] == digest
        threads = [
            threading.Thread(target=_upload_until_it_dies, args=(process.url, worker, folders, acknowledged))
            for worker in range(3)
        ]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0.2, 1.5))
        process.kill()
        for thread in threads:
            thread.join()
    assert acknowledged

    store = AdapterStore(tmp_path)
    store.open()
    store.check_integrity()
    for name, (generation, digest, folder) in acknowledged.items():
        record = store.get(name)
        if record.generation == generation:
            assert record.digest == digest
            assert store.read(digest) == tuple((folder / file_name).read_bytes() for file_name in FILE_NAMES)
    for record in store.records():
        config, _ = store.read(record.digest)
        assert json.loads(config)["peft_type"] == "LORA"
