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
from tests.adapters.stores import read

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


class Uploads:
    """What was sent and what was answered. A name is one thread's, so at most one of its uploads is without answer.

    Attributes:
        acknowledged: for each name, the digest that the last answer named.
        pending: for each name, the folder that was sent since.
        digests: of the folders' content, where an answer has told it.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.acknowledged: dict[str, str] = {}
        self.pending: dict[str, Path] = {}
        self.digests: dict[Path, str] = {}

    def run(self, url: str, worker: int) -> None:
        """Upload until the server dies."""
        rng = random.Random()
        with httpx.Client(base_url=url, timeout=30) as client:
            while True:
                name, folder = f"adapter-{worker}-{rng.randrange(3)}", rng.choice(self.folders)
                files = [("files", (file_name, (folder / file_name).read_bytes())) for file_name in FILE_NAMES]
                self.pending[name] = folder
                try:
                    response = client.post("/admin/adapters", data={"name": name}, files=files)
                except httpx.TransportError:
                    return
                del self.pending[name]
                if response.status_code == 201:
                    self.acknowledged[name] = self.digests[folder] = response.json()["digest"]
                else:
                    assert response.status_code == 429

    def check(self, current: dict[str, str]) -> None:
        """Each name stands for what was acknowledged last, or for what was sent since: new content, or old again."""
        for name, digest in self.acknowledged.items():
            sent = self.pending.get(name)
            if sent is None or current[name] == digest:
                assert current[name] == digest
            elif sent in self.digests:
                assert current[name] == self.digests[sent]
            else:
                assert current[name] not in self.digests.values()
            self.acknowledged[name] = current[name]
        self.pending.clear()


@pytest.mark.slow
def test_kill_9_during_uploads(tiny: tuple[Path, Any, dict[str, Path]], tmp_path: Path) -> None:
    model, _, by_name = tiny
    uploads = Uploads(list(by_name.values()))
    for _ in range(NUM_ROUNDS):
        process = Process(model, tmp_path)
        listed = httpx.get(f"{process.url}/admin/adapters").json()["adapters"]
        uploads.check({adapter["name"]: adapter["digest"] for adapter in listed})
        threads = [threading.Thread(target=uploads.run, args=(process.url, worker)) for worker in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0.2, 1.5))
        process.kill()
        for thread in threads:
            thread.join()
    assert uploads.acknowledged

    store = AdapterStore(tmp_path)
    store.open()
    store.check_integrity()
    uploads.check({record.name: record.digest for record in store.records()})
    contents = {
        digest: tuple((folder / file_name).read_bytes() for file_name in FILE_NAMES)
        for folder, digest in uploads.digests.items()
    }
    for record in store.records():
        config, weights = read(store, record.digest)
        assert json.loads(config)["peft_type"] == "LORA"
        assert contents.get(record.digest, (config, weights)) == (config, weights)
