"""Jobs over HTTP: queued, watched as events, and what comes of them serves at once."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from tests import peft_adapters
from tests.api.conftest import Live, serve
from tests.api.test_generations import generate
from tests.jobs.conftest import InlineProcess
from tests.tiny_folder import tiny_tokenizer

TIMEOUT_S = 120
PROMPT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all."


def submit(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/admin/jobs", json=body)
    assert response.status_code == 202, response.text
    return response.json()


def events(client: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """All events of a job until it ends."""
    with client.stream("GET", f"/admin/jobs/{job_id}/events", timeout=TIMEOUT_S) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line[6:]) for line in response.iter_lines() if line]


def test_a_mixed_adapter_serves_what_a_mix_of_its_sources_does(live: Live, client: httpx.Client) -> None:
    sources = [{"name": "rank4", "weight": 0.6}, {"name": "rank8", "weight": 0.8}]
    job = submit(client, kind="mix", name="both", adapters=sources, combination_type="cat")
    assert (job["state"], [one["name"] for one in job["inputs"]]) == ("queued", ["rank4", "rank8"])
    seen = events(client, job["job_id"])
    assert seen[-1]["state"] == "succeeded", seen[-1]["error"]
    assert {one["stage"] for one in seen} & {"mixing", "reading the base", "starting"}
    assert [one["fraction"] for one in seen] == sorted(one["fraction"] for one in seen)
    info = client.get("/admin/adapters/both").json()
    assert info["digest"] == seen[-1]["result"]["adapter"]["digest"]
    assert info["source"]["job_id"] == job["job_id"]
    base: PreTrainedModel = live.references["base"]
    changes = [(one["weight"], peft_adapters.merged_delta(base, live.references[one["name"]])) for one in sources]
    model = peft_adapters.with_deltas(base, changes)
    tokens, _ = peft_adapters.greedy(model, live.tokenizer("Hello").input_ids, 6)
    text = live.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
    assert generate(client, "both").json()["generated_text"] == text
    assert job["job_id"] in [one["job_id"] for one in client.get("/admin/jobs").json()["jobs"]]
    retried = client.post(f"/admin/jobs/{job['job_id']}/retry")
    assert (retried.status_code, retried.json()["error"]["code"]) == (409, "job_state_conflict")
    client.delete("/admin/adapters/both")


def test_a_job_is_cancelled_while_it_works(client: httpx.Client) -> None:
    job = submit(client, kind="verify")
    cancelled = client.post(f"/admin/jobs/{job['job_id']}/cancel")
    assert cancelled.status_code == 202
    assert events(client, job["job_id"])[-1]["state"] == "cancelled"
    deadline = time.monotonic() + TIMEOUT_S
    while client.get(f"/admin/jobs/{job['job_id']}").json()["state"] != "cancelled":
        assert time.monotonic() < deadline


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown kind": ({"kind": "nothing"}, 422, "invalid_value"),
    "no kind": ({}, 422, "invalid_value"),
    "for a base that is not quantized": ({"kind": "loftq-compensation", "name": "x", "rank": 4}, 422, "not_supported"),
    "unknown field": ({"kind": "verify", "x": 1}, 422, "invalid_value"),
    "unknown adapter": ({"kind": "verify", "adapters": ["unknown"]}, 404, "adapter_not_found"),
    "unknown combination": (
        {"kind": "mix", "name": "x", "adapters": [{"name": "rank4"}], "combination_type": "best"},
        422,
        "invalid_value",
    ),
    "the base's name": ({"kind": "mix", "name": "tiny", "adapters": [{"name": "rank4"}]}, 422, "adapter_name_invalid"),
    "no path allowed": ({"kind": "import", "name": "x", "path": "x"}, 422, "path_forbidden"),
    "no hub allowed": ({"kind": "import", "name": "x", "repo": "a/b", "revision": "0" * 40}, 422, "not_supported"),
    "a moving revision": ({"kind": "import", "name": "x", "repo": "a/b", "revision": "main"}, 422, "invalid_value"),
    "two sources": ({"kind": "convert", "name": "x", "adapter": "a", "path": "b"}, 422, "invalid_value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_jobs_that_are_refused(client: httpx.Client, case: str) -> None:
    body, status, code = REFUSED[case]
    before = client.get("/admin/jobs").json()
    response = client.post("/admin/jobs", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert client.get("/admin/jobs").json() == before


def test_jobs_that_there_are_not(client: httpx.Client) -> None:
    for method, path in (("GET", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/events")):
        response = client.request(method, f"/admin/jobs/{'0' * 32}{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")


def test_compensation_on_a_quantized_base_brings_answers_back(tiny: Any, tmp_path: Path) -> None:
    base, ids = tiny[1]["base"], tiny_tokenizer()(PROMPT).input_ids
    with torch.no_grad():
        rows = torch.log_softmax(base(torch.tensor([ids])).logits[0], -1)
    wanted = torch.stack([row[token] for row, token in zip(rows, ids[1:], strict=False)])

    def distance(client: httpx.Client, adapter: str | None) -> float:
        parameters = {"max_new_tokens": 1, "details": True, "decoder_input_details": True, "adapter_id": adapter}
        answer = client.post("/generate", json={"inputs": PROMPT, "parameters": parameters}).json()
        found = [token["logprob"] for token in answer["details"]["prefill"]][1:]
        return float((torch.tensor(found) - wanted).abs().mean())

    with (
        serve(tiny, tmp_path / "store", quantization="nf4") as live,
        httpx.Client(base_url=live.url, timeout=60) as own,
    ):
        live.server.jobs._make_process = InlineProcess  # saves a start of Python
        before = distance(own, None)
        job = submit(own, kind="loftq-compensation", name="back", rank=32)
        ended = events(own, job["job_id"])[-1]
        assert ended["state"] == "succeeded", ended["error"]
        assert ended["result"]["quantization"] == "nf4"
        assert distance(own, "back") < before / 5
