"""Jobs and storage quotas of tenants: on their own adapters, in their own words, and nobody else's business."""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.quota import StorageQuota, StoredUsage
from server.auth.keys import KeyLimits, Scope
from server.errors import QuotaExceededError
from tests.auth.conftest import Guarded, upload
from tests.auth.naming_calls import JOB_CALLS, generate
from tests.auth.test_tenants import assert_same
from tests.jobs.conftest import InlineProcess

WRITE = [Scope.GENERATE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE]
MIX: dict[str, Any] = {"kind": "mix", "combination_type": "cat"}
TIMEOUT_S = 120


def submit(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/admin/jobs", json=body)
    assert response.status_code == 202, response.text
    return response.json()


def wait(client: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + TIMEOUT_S
    while (job := client.get(f"/admin/jobs/{job_id}").json())["state"] in {"queued", "running"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return job


def job_ids(client: httpx.Client) -> set[str]:
    return {job["job_id"] for job in client.get("/admin/jobs").json()["jobs"]}


@pytest.fixture(scope="module")
def mixed(guarded: Guarded) -> Iterator[str]:
    """The id of a job of b, which mixed its `secret` and the public adapter into `both`."""
    with guarded.client("b") as b:
        sources = [{"name": "secret", "weight": 0.5}, {"name": "public@1", "weight": 0.5}]
        job = submit(b, **MIX, name="both", adapters=sources, note="b~note")
        done = wait(b, job["job_id"])
        assert done["state"] == "succeeded", done["error"]
        yield job["job_id"]
        b.delete("/admin/adapters/both")


def test_a_tenant_mixes_its_own_and_reads_its_own_words(guarded: Guarded, mixed: str) -> None:
    with guarded.client("b") as b, guarded.client("admin") as admin:
        job, seen = b.get(f"/admin/jobs/{mixed}").json(), admin.get(f"/admin/jobs/{mixed}").json()
        assert [one["name"] for one in job["inputs"]] == ["secret", "public"]
        assert [one["name"] for one in job["options"]["adapters"]] == ["secret", "public@1"]
        assert (job["options"]["name"], job["result"]["adapter"]["name"]) == ("both", "both")
        assert (seen["options"]["name"], seen["inputs"][0]["name"]) == ("b~both", "b~secret")
        assert job["options"]["note"] == "b~note"  # free words stay as they are
        assert generate(b, "both").status_code == 200
        info = b.get("/admin/adapters/both").json()
        assert (info["name"], info["source"]["inputs"][0]["name"]) == ("both", "secret")
        assert generate(admin, "both").status_code == 404
        assert generate(admin, "b~both").json() == generate(b, "both").json()


@pytest.mark.parametrize("call", JOB_CALLS.values(), ids=JOB_CALLS)
def test_the_others_jobs_do_not_exist(guarded: Guarded, mixed: str, call: Any) -> None:
    nobodys = uuid.uuid4().hex
    for key in ("a", "operator"):
        with guarded.client(key) as client:
            found, missing = call(client, mixed), call(client, nobodys)
            assert (found.status_code, found.json()["error"]["code"]) == (404, "job_not_found")
            assert_same(found, missing, mixed, nobodys)
            assert mixed not in job_ids(client)
    with guarded.client("b") as b, guarded.client("admin") as admin:
        assert mixed in job_ids(b) & job_ids(admin)
        assert b.get(f"/admin/jobs/{mixed}").json()["state"] == "succeeded"


def test_what_was_made_of_others_adapters_is_not_told(guarded: Guarded) -> None:
    with guarded.client("admin") as admin, guarded.client("a") as a:
        sources = [{"name": "b~secret"}, {"name": "public"}]
        job = submit(admin, **MIX, name="blend", adapters=sources)
        assert wait(admin, job["job_id"])["state"] == "succeeded"
        assert job["job_id"] not in job_ids(a)
        shown = a.get("/admin/adapters/blend").json()
        assert shown["source"] == {"kind": "mix", "job_id": job["job_id"]}
        assert "secret" not in a.get("/admin/adapters").text
        assert admin.get("/admin/adapters/blend").json()["source"]["inputs"][0]["name"] == "b~secret"
        admin.delete("/admin/adapters/blend")


def test_a_tenant_verifies_what_it_owns(guarded: Guarded) -> None:
    with guarded.client("b") as b, guarded.client("a") as a:
        job = wait(b, submit(b, kind="verify")["job_id"])
        assert job["state"] == "succeeded", job["error"]
        assert {one["name"] for one in job["inputs"]} >= {"own", "secret"}
        assert not {one["name"] for one in job["inputs"]} & {"public"}
        assert "b~" not in b.get(f"/admin/jobs/{job['job_id']}").text.replace("b~note", "")
        named = submit(a, kind="verify", adapters=["own"])
        assert [one["name"] for one in named["inputs"]] == ["own"]
    guarded.add_key("empty", WRITE, tenant="empty")
    with guarded.client("empty") as client:
        refused = client.post("/admin/jobs", json={"kind": "verify"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")


def test_what_only_administrators_begin_is_refused_by_its_scope(guarded: Guarded) -> None:
    bodies: list[dict[str, Any]] = [
        {"kind": "merge", "adapters": ["own"]},
        {"kind": "extract", "name": "x", "path": "x", "rank": 2, "target_modules": ["q_proj"]},
        {"kind": "import", "name": "x", "path": "x"},
        {"kind": "import", "name": "x", "url": "s3://bucket/x"},
        {"kind": "loftq", "name": "x", "rank": 2, "quantization": "nf4"},
        {"kind": "convert", "name": "x", "path": "x"},
        {"kind": "convert", "name": "x", "adapter": "own", "initial_path": "x"},
        {"kind": "convert", "name": "x", "adapter": "own", "original_path": "x"},
    ]
    for key in ("a", "operator"):
        with guarded.client(key) as client:
            for body in bodies:
                refused = client.post("/admin/jobs", json=body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing"), refused.text
    guarded.add_key("narrow-writer", WRITE, tenant="b", adapters=["own", "own-*"])
    with guarded.client("narrow-writer") as narrow:
        for name in ("other", "a~own"):
            body = {**MIX, "name": name, "adapters": [{"name": "own"}]}
            refused = narrow.post("/admin/jobs", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "adapter_not_allowed")
        missing = narrow.post("/admin/jobs", json={**MIX, "name": "own-2", "adapters": [{"name": "secret"}]})
        assert missing.status_code == 404
    with guarded.client("narrow-writer") as narrow, guarded.client("b") as b:
        job = submit(b, kind="verify", adapters=["secret"])
        assert narrow.get(f"/admin/jobs/{job['job_id']}").status_code == 404
        assert job["job_id"] not in job_ids(narrow)
        wait(b, job["job_id"])


def test_a_tenant_cancels_and_retries_its_own(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    class HeldProcess(InlineProcess):
        def run(self, *task: Any) -> dict[str, Any]:
            assert gate.wait(TIMEOUT_S)
            return super().run(*task)

    monkeypatch.setattr(guarded.server.jobs, "_make_process", HeldProcess)
    with guarded.client("b") as b:
        first, second = submit(b, kind="verify"), submit(b, kind="verify", adapters=["own"])
        assert b.post(f"/admin/jobs/{second['job_id']}/cancel").status_code == 202
        assert b.get(f"/admin/jobs/{second['job_id']}").json()["state"] == "cancelled"
        gate.set()
        retried = b.post(f"/admin/jobs/{second['job_id']}/retry").json()
        assert (retried["attempt"], [one["name"] for one in retried["inputs"]]) == (2, ["own"])
        assert {wait(b, job["job_id"])["state"] for job in (first, second)} == {"succeeded"}
    entries = [entry for entry in guarded.audit() if entry.get("job_id") == second["job_id"]]
    assert [entry["action"] for entry in entries] == ["submit_job", "cancel_job", "retry_job"]


def test_quotas_count_what_a_change_would_leave() -> None:
    def usage(*generations: tuple[str, str, int]) -> StoredUsage:
        return StoredUsage.of(generations)

    assert usage(("x", "d1", 5), ("x", "d2", 7), ("y", "d1", 5)) == StoredUsage(2, 12)
    nothing, one, two = StoredUsage(0, 0), StoredUsage(1, 10), StoredUsage(2, 30)
    StorageQuota().check(nothing, two)
    StorageQuota(2, 30).check(one, two)
    StorageQuota(0, 0).check(two, one)
    StorageQuota(1, 10).check(two, two)
    for quota in (StorageQuota(1, None), StorageQuota(None, 29), StorageQuota(0, 0)):
        with pytest.raises(QuotaExceededError):
            quota.check(one, two)


def test_a_tenant_keeps_no_more_than_its_quota(guarded: Guarded) -> None:
    def num_bytes(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("adapter_"))

    folders = guarded.folders
    limit = num_bytes(folders["rank4"]) + num_bytes(folders["rank8"])
    guarded.add_key("two", WRITE, tenant="quota", limits=KeyLimits(max_adapters=3))
    guarded.add_key("bytes", WRITE, tenant="quota", limits=KeyLimits(max_adapter_bytes=limit))

    def refused(response: httpx.Response) -> bool:
        if response.status_code == 201:
            return False
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (507, "quota_exceeded", "insufficient_quota")
        assert error["would_be"] > error["limit"]
        assert "retry-after" not in response.headers
        return True

    with guarded.client("two") as two, guarded.client("bytes") as by_bytes:
        assert not refused(upload(two, "x", folders["rank4"]))
        assert not refused(upload(two, "y", folders["rank8"]))
        assert refused(upload(by_bytes, "x", folders["dora"]))
        assert not refused(upload(by_bytes, "z", folders["rank4"]))  # equal contents take no more bytes
        for client in (two, by_bytes):  # both limits are the tenant's
            assert refused(upload(client, "w", folders["rank4"]))
            assert refused(upload(client, "x", folders["dora"]))
        assert two.get("/admin/adapters/w").status_code == 404
        assert not refused(upload(two, "x", folders["rank4"]))  # again: nothing new
        assert two.get("/admin/adapters/x").json()["generation"] == 1
        job = submit(by_bytes, **MIX, name="x", adapters=[{"name": "x"}, {"name": "y"}])
        failed = wait(by_bytes, job["job_id"])
        assert (failed["state"], failed["error"]["code"]) == ("failed", "quota_exceeded")
        for name in ("x", "y", "z"):
            assert two.delete(f"/admin/adapters/{name}").status_code == 200
        assert not refused(upload(two, "new", folders["rank8"]))
        two.delete("/admin/adapters/new")
    guarded.add_key("fewer", WRITE, tenant="quota", limits=KeyLimits(max_adapters=1))
    guarded.add_key("others", WRITE, tenant="quota2")
    with guarded.client("two") as two, guarded.client("others") as others:
        assert not refused(upload(two, "x", folders["rank4"]))
        assert refused(upload(two, "y", folders["rank4"]))  # the lowest limit of all of its keys
        for name in ("x", "y"):
            assert not refused(upload(others, name, folders["rank4"]))
            others.delete(f"/admin/adapters/{name}")
        two.delete("/admin/adapters/x")
