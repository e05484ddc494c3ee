"""vLLM's and mistral.rs' routes for loading and unloading: their texts and statuses, and harmless retries."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save

from tests.api.conftest import Live
from tests.api.test_generations import generate

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def root(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An import root with some adapters, while the test runs."""
    for name in ("rank4", "rank8"):
        folder = shutil.copytree(live.folders[name], tmp_path / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    monkeypatch.setattr(live.server.imports, "_root", tmp_path)
    return tmp_path


def load(client: httpx.Client, name: str, path: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | fields)


def unload(client: httpx.Client, name: str, **fields: Any) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name} | fields)


def outcome(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.text if response.is_success else response.json()["error"]["code"]


def test_loading_and_unloading_again_and_again(live: Live, client: httpx.Client, root: Path) -> None:
    loaded = (200, "Success: LoRA adapter 'v' added successfully.")
    assert outcome(load(client, "v", root / "rank4")) == loaded
    assert outcome(load(client, "v", "rank4")) == loaded
    assert generate(client, "v").status_code == 200
    assert client.get("/admin/adapters/v").json()["generation"] == 1
    assert outcome(load(client, "v", "rank8")) == (400, "adapter_exists")
    assert outcome(load(client, "v", "rank8", load_inplace=True)) == loaded
    assert client.get("/admin/adapters/v").json()["generation"] == 2
    for _ in range(2):
        assert outcome(unload(client, "v", lora_int_id=None)) == (
            200,
            "Success: LoRA adapter 'v' removed successfully.",
        )
    assert generate(client, "v").status_code == 404
    assert outcome(unload(client, "never")) == (404, "adapter_not_found")


def test_a_retry_for_an_adapter_that_was_converted_is_harmless(live: Live, client: httpx.Client, root: Path) -> None:
    initial = shutil.copytree(live.folders["rank4"], root / "trained" / "initial")
    shutil.copytree(live.folders["rank4"], root / "trained", dirs_exist_ok=True)
    zeros = {key: torch.zeros_like(value) for key, value in load_file(initial / WEIGHTS).items()}
    (initial / WEIGHTS).write_bytes(save(zeros))
    for _ in range(2):
        assert load(client, "c", "trained").status_code == 200
    shown = client.get("/admin/adapters/c").json()
    assert (shown["generation"], shown["details"]["rank"]) == (1, 8)
    assert {group["outcome"] for group in shown["details"]["report"]} == {"converted"}
    assert generate(client, "c").json()["generated_text"] == live.expected("rank4", "Hello", 6)[1]
    assert unload(client, "c").status_code == 200


def test_generations_as_numbers_and_as_digests(client: httpx.Client, root: Path) -> None:
    load(client, "m", "rank4")
    listed = client.get("/v1/lora_adapters").json()
    digest = next(one["generation"] for one in listed["data"] if one["id"] == "m")
    assert outcome(load(client, "m", "rank8", expected_generation="0" * 64)) == (409, "generation_conflict")
    assert outcome(unload(client, "m", expected_generation=7)) == (409, "generation_conflict")
    assert load(client, "m", "rank8", expected_generation=digest).status_code == 200
    client.post("/admin/adapters/m/warm")
    listed = client.get("/v1/lora_adapters").json()
    shown = next(one for one in listed["generations"] if "m" in one["aliases"])
    assert (shown["rank"], shown["active_leases"], shown["retired"]) == (8, 0, False)
    assert listed["resident_bytes"] >= shown["bytes"] > 0
    assert (listed["max_adapters"], listed["max_rank"]) == (4, 256)
    assert unload(client, "m").status_code == 200


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (400, "invalid_value")),
        ({"lora_name": "x"}, (400, "invalid_value")),
        ({"lora_name": "", "lora_path": "rank4"}, (400, "invalid_value")),
        ({"lora_name": "tiny", "lora_path": "rank4"}, (400, "adapter_name_invalid")),
        ({"lora_name": "x", "lora_path": "missing"}, (404, "path_not_found")),
        ({"lora_name": "x", "lora_path": "."}, (404, "path_not_found")),
        ({"lora_name": "x", "lora_path": "/etc"}, (400, "path_forbidden")),
        ({"lora_name": "x", "lora_path": "../.."}, (400, "path_forbidden")),
        ({"lora_name": "x", "lora_path": "rank4", "expected_generation": "abc"}, (400, "invalid_value")),
    ],
)
def test_what_is_refused(client: httpx.Client, root: Path, body: dict[str, Any], expected: tuple[int, str]) -> None:
    assert outcome(client.post("/v1/load_lora_adapter", json=body)) == expected


def test_without_an_import_root_no_path_is_taken(client: httpx.Client) -> None:
    assert outcome(load(client, "x", "rank4")) == (400, "path_forbidden")
