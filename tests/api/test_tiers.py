"""Warming, evicting and pinning over HTTP, and the memory that a deleted adapter gives back."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import Live
from tests.api.test_generations import generate, upload

TIMEOUT_S = 20.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def residency(client: httpx.Client, name: str) -> str:
    return client.get(f"/admin/adapters/{name}").json()["residency"]


def test_warm_and_evict(live: Live, client: httpx.Client) -> None:
    warmed = client.post("/admin/adapters/rank8/warm")
    assert (warmed.status_code, warmed.json()["residency"]) == (200, "slot")
    before = client.get("/admin/tiers").json()
    assert before["slots"]["bytes"] >= warmed.json()["details"]["folded_bytes"]
    assert generate(client, "rank8").json()["generated_text"] == live.expected("rank8", "Hello", 6)[1]
    after = client.get("/admin/tiers").json()
    assert after["slots"]["hits"] == before["slots"]["hits"] + 1
    assert client.post("/admin/adapters/rank8/evict").status_code == 200
    until(lambda: residency(client, "rank8") == "store")
    assert generate(client, "rank8").json()["generated_text"] == live.expected("rank8", "Hello", 6)[1]
    for action in ("warm", "evict", "pin", "unpin"):
        missing = client.post(f"/admin/adapters/unknown/{action}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "adapter_not_found")


def test_a_pinned_name_stays_in_a_slot_whichever_generation_it_means(live: Live, client: httpx.Client) -> None:
    upload(client, "pinned", live.folders["rank4"])
    assert client.post("/admin/adapters/pinned/pin").json()["is_pinned"]
    until(lambda: residency(client, "pinned") == "slot")
    for name in ("rank8", "rank16", "dora", "rslora", "dora16", "rank8"):
        generate(client, name)
    assert residency(client, "pinned") == "slot"
    refused = client.post("/admin/adapters/pinned/evict")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_pinned")
    upload(client, "pinned", live.folders["dora16"])
    until(lambda: residency(client, "pinned") == "slot")
    assert client.post("/admin/adapters/rank8/pin").status_code == 200
    limit = client.post("/admin/adapters/rank16/pin")  # four slots: two can be pinned
    assert (limit.status_code, limit.json()["error"]["code"]) == (409, "pin_limit")
    assert client.get("/admin/tiers").json()["pinned"] == 2
    mix = {"inputs": "Hello", "adapters": [{"name": n} for n in ("rank4", "rank16", "rslora")]}
    too_many = client.post("/generate", json=mix)
    assert (too_many.status_code, too_many.json()["code"]) == (422, "too_many_adapters")
    assert not client.post("/admin/adapters/rank8/unpin").json()["is_pinned"]
    client.delete("/admin/adapters/pinned")
    assert client.get("/admin/tiers").json()["pinned"] == 0
    assert client.post("/generate", json=mix).status_code == 200


def test_a_deleted_adapter_gives_its_memory_back_after_its_last_request(
    live: Live, client: httpx.Client, tmp_path: Path
) -> None:
    folder = shutil.copytree(live.folders["dora16"], tmp_path / "other")  # no other name has the same contents
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    for name in live.folders:
        client.post(f"/admin/adapters/{name}/evict")
    until(lambda: client.get("/admin/tiers").json()["slot_allocated_bytes"] == 0)
    upload(client, "gone", folder)
    body = {"inputs": "Hello", "parameters": {"adapter_id": "gone", "max_new_tokens": 300, "ignore_eos_token": True}}
    with httpx.stream("POST", f"{live.url}/generate_stream", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        client.delete("/admin/adapters/gone")
        assert client.get("/admin/tiers").json()["slot_allocated_bytes"] > 0
        assert any('"generated_text":"' in line for line in lines)
    until(lambda: client.get("/admin/tiers").json()["slot_allocated_bytes"] == 0)
    tiers = client.get("/admin/tiers").json()
    assert (tiers["slots"]["bytes"], tiers["host"]["bytes"]) == (0, 0)
    live.assert_idle()


def test_loads_beside_running_requests_stay_within_the_budget(live: Live, client: httpx.Client) -> None:
    seen: list[tuple[int, int]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            stats = live.server.registry.stats()
            assert stats.slot_tier.num_bytes <= stats.slot_tier.max_bytes
            assert stats.host_tier.num_bytes <= stats.host_tier.max_bytes
            seen.append((stats.slot_tier.num_bytes, stats.host_tier.num_bytes))
            time.sleep(0.001)

    def ask(name: str) -> None:
        with httpx.Client(base_url=live.url, timeout=60) as own:
            for _ in range(3):
                assert generate(own, name).json()["generated_text"] == live.expected(name, "Hello", 6)[1]

    watcher = threading.Thread(target=watch)
    threads: list[Any] = [threading.Thread(target=ask, args=[name]) for name in live.folders]
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert max(slot for slot, _ in seen) > 0


@pytest.mark.parametrize("name", ["a/b", "..", "%2e%2e"])
def test_odd_paths(client: httpx.Client, name: str) -> None:
    assert client.post(f"/admin/adapters/{name}/warm").status_code in (404, 405)


def test_an_adapter_larger_than_all_slots_is_refused(
    live: Live, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(live.server.registry._slots, "max_bytes", 100)
    response = upload(client, "large", live.folders["rank4"])
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_too_large")
