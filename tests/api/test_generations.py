"""Generations over HTTP: name@N, compare-and-set, rollback, promotion, labels, and swaps under load."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.store import FILE_NAMES
from tests.api.conftest import Live


def upload(client: httpx.Client, name: str, folder: Path, **fields: Any) -> httpx.Response:
    files = [("files", (file_name, (folder / file_name).read_bytes())) for file_name in FILE_NAMES]
    return client.post("/admin/adapters", data={"name": name} | fields, files=files)


def generate(client: httpx.Client, adapter: str, num_tokens: int = 6) -> httpx.Response:
    parameters = {"adapter_id": adapter, "max_new_tokens": num_tokens, "ignore_eos_token": True}
    return client.post("/generate", json={"inputs": "Hello", "parameters": parameters})


@pytest.fixture
def two(live: Live, client: httpx.Client) -> Any:
    """The name "two" with generation 1 (rank4) and 2 (dora)."""
    numbers = [upload(client, "two", live.folders[kind]).json()["generation"] for kind in ("rank4", "dora")]
    yield dict(zip(("rank4", "dora"), numbers, strict=True))
    client.delete("/admin/adapters/two")


def test_every_generation_answers_under_its_number(live: Live, client: httpx.Client, two: dict[str, int]) -> None:
    for kind, number in two.items():
        answer = generate(client, f"two@{number}")
        assert answer.json()["generated_text"] == live.expected(kind, "Hello", 6)[1]
        assert answer.headers["x-adapter-generation"] == str(number)
        assert answer.headers["x-adapter-id"] == f"two@{number}"
    answer = generate(client, "two")
    assert answer.headers["x-adapter-generation"] == str(two["dora"])
    assert answer.json()["generated_text"] == live.expected("dora", "Hello", 6)[1]
    missing = generate(client, "two@999")
    assert (missing.status_code, missing.json()["code"]) == (404, "adapter_not_found")
    mixed = client.post(
        "/generate",
        json={"inputs": "Hello", "adapters": [{"name": "rank8"}, {"name": f"two@{two['rank4']}", "weight": 0.5}]},
    )
    assert mixed.headers["x-adapter-generation"].split(",")[1] == str(two["rank4"])
    assert "x-adapter-generation" not in client.post("/generate", json={"inputs": "Hello"}).headers


def test_a_stream_names_its_generation(live: Live, client: httpx.Client, two: dict[str, int]) -> None:
    body = {"inputs": "Hello", "parameters": {"adapter_id": "two", "max_new_tokens": 3}}
    assert client.post("/generate_stream", json=body).headers["x-adapter-generation"] == str(two["dora"])


def test_rollback_promote_and_conditions(live: Live, client: httpx.Client, two: dict[str, int]) -> None:
    first, second = two["rank4"], two["dora"]
    stale = client.post("/admin/adapters/two/rollback", json={"expected_generation": first})
    assert stale.status_code == 409
    error = stale.json()["error"]
    assert (error["code"], error["current_generation"]) == ("generation_conflict", second)
    for response in (
        upload(client, "two", live.folders["rank16"], expected_generation=first),
        client.delete("/admin/adapters/two", params={"expected_generation": 0}),
        client.post("/admin/adapters/two/promote", json={"generation": first, "expected_generation": first}),
    ):
        assert (response.status_code, response.json()["error"]["current_generation"]) == (409, second)
    assert client.post("/admin/adapters/two/rollback").json()["generation"] == first
    assert generate(client, "two").json()["generated_text"] == live.expected("rank4", "Hello", 6)[1]
    assert client.post("/admin/adapters/two/rollback").status_code == 409
    promoted = client.post("/admin/adapters/two/promote", json={"generation": second, "expected_generation": first})
    assert (promoted.json()["generation"], promoted.json()["is_current"]) == (second, True)
    assert client.post("/admin/adapters/two/promote", json={"generation": 999}).status_code == 404
    assert client.post("/admin/adapters/two/promote", json={"generation": 1, "x": 1}).status_code == 422


def test_generations_are_listed_and_dropped(live: Live, client: httpx.Client, two: dict[str, int]) -> None:
    waiting = upload(
        client, "two", live.folders["rank16"], promote="false", labels=json.dumps({"stage": "canary"}), note="try it"
    ).json()
    assert (waiting["is_current"], waiting["labels"], waiting["note"]) == (False, {"stage": "canary"}, "try it")
    listed = client.get("/admin/adapters/two/generations").json()["generations"]
    assert [one["generation"] for one in listed] == [waiting["generation"], two["dora"], two["rank4"]]
    assert [one["is_current"] for one in listed] == [False, True, False]
    patch = {"generation": two["rank4"], "note": "old"}
    assert client.patch("/admin/adapters/two", json=patch).json()["note"] == "old"
    assert client.get(f"/admin/adapters/two@{two['rank4']}").json()["note"] == "old"
    assert client.patch("/admin/adapters/two", json={"labels": {"": "x"}}).json()["error"]["code"] == "label_invalid"
    dropped = client.delete(f"/admin/adapters/two/generations/{two['rank4']}")
    assert dropped.json()["generation"] == two["rank4"]
    assert generate(client, f"two@{two['rank4']}").status_code == 404
    current = client.delete(f"/admin/adapters/two/generations/{two['dora']}")
    assert (current.status_code, current.json()["error"]["code"]) == (409, "generation_conflict")
