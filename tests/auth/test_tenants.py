"""Tenants: each sees its own adapters and the public ones; the others' do not exist."""

import random
import statistics
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux_client import AuthenticationError, Client, PermissionDeniedError
from loramux_client import KeyLimits as ClientLimits
from server.adapters.service import AdapterService
from server.auth.caller import Caller
from server.auth.keys import KeyLimits, Scope
from server.errors import NotFoundError
from server.tenancy import CallerAdapters
from tests.auth.conftest import Guarded, upload
from tests.auth.naming_calls import CALLS, GREEDY, JOB_CALLS, NAMELESS, NamingCall, generate

LISTS = ("/admin/adapters", "/v1/models", "/admin/jobs")


def test_every_method_of_the_service_has_a_tenants_form() -> None:
    # The server's own, and what only routes for administrators need.
    for_nobody = {"import_folder", "names_by_digest", "apply_pins"}
    for_nobody |= {"check_name", "existed", "folded_bytes", "max_rank", "peek"}

    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    callers_own = {"knows", "stored_name", "own_name", "owned_references", "in_own_words", "without_tenant", "quota"}
    assert public(CallerAdapters) - callers_own == public(AdapterService) - for_nobody


def test_every_route_is_tried(guarded: Guarded) -> None:
    """Whoever adds a route says in `naming_calls` how an adapter's name could get into it."""
    with guarded.client("admin") as client:
        paths = client.get("/openapi.json").json()["paths"]
    served = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    tried = {(call.method, call.route) for call in [*CALLS.values(), *JOB_CALLS.values()]}
    assert served == tried | NAMELESS
    assert not tried & NAMELESS


def assert_same(found: httpx.Response, missing: httpx.Response, theirs: str, nobodys: str) -> None:
    """Status, body and headers are alike but for the name that was sent."""
    assert found.status_code == missing.status_code
    assert found.content.replace(theirs.encode(), nobodys.encode()) == missing.content
    same = {"x-request-id", "date", "content-length"}
    headers = [{k: v for k, v in answer.headers.items() if k not in same} for answer in (found, missing)]
    assert headers[0] == headers[1]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_belongs_to_others_is_like_what_nobody_has(guarded: Guarded, call: NamingCall) -> None:
    """`secret` is b's. For a, and for a key without a tenant, the answers are those for `nobody`, byte for byte."""
    for key in ("a", "operator"):
        with guarded.client(key) as client:
            lists = [client.get(path).content for path in LISTS]
            for theirs, nobodys in (("secret", "nobody"), ("b~secret", "b~nobody"), ("secret@1", "nobody@1")):
                found, missing = call(client, theirs), call(client, nobodys)
                assert found.status_code == (403 if call.is_admins else 404), found.text
                assert_same(found, missing, "secret", "nobody")
            assert [client.get(path).content for path in LISTS] == lists
    with guarded.client("b") as owner:
        assert owner.get("/admin/adapters/secret").status_code == 200


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_name_others_have_tells_nothing(guarded: Guarded, data: st.DataObject) -> None:
    """b has a name for a while: every answer to a is what it was without, and what it is for any other name."""
    letters = st.text("abcxyzABC019._-", min_size=1, max_size=30)
    theirs, nobodys = data.draw(letters.map("q7t".__add__)), data.draw(letters.map("q7n".__add__))
    labels = data.draw(st.lists(st.sampled_from(sorted(CALLS)), min_size=3, max_size=6, unique=True))
    form = data.draw(st.sampled_from(["{}", "{}@1", "b~{}", "b~{}@1"]))
    with guarded.client("a") as a, guarded.client("b") as b:
        before = [CALLS[label](a, form.format(theirs)) for label in labels]
        lists = [a.get(path).content for path in LISTS]
        assert upload(b, theirs, guarded.folders["rank4"]).status_code == 201
        try:
            for label, former in zip(labels, before, strict=True):
                found = CALLS[label](a, form.format(theirs))
                assert_same(found, former, theirs, theirs)
                assert_same(found, CALLS[label](a, form.format(nobodys)), theirs, nobodys)
            assert [a.get(path).content for path in LISTS] == lists
        finally:
            assert b.delete(f"/admin/adapters/{theirs}").status_code == 200


def test_everybody_lists_what_is_theirs(guarded: Guarded) -> None:
    expected = {
        "a": {"own", "public"},
        "b": {"own", "secret", "public"},
        "operator": {"public"},
        "admin": {"a~own", "b~own", "b~secret", "public"},
    }
    for key, names in expected.items():
        with guarded.client(key) as client:
            assert {adapter["name"] for adapter in client.get("/admin/adapters").json()["adapters"]} == names
            assert {card["id"] for card in client.get("/v1/models").json()["data"][1:]} == names


def test_the_same_name_is_another_adapter_for_each_tenant(guarded: Guarded) -> None:
    with guarded.client("a") as a, guarded.client("b") as b, guarded.client("admin") as admin:
        assert generate(a, "own").json() == generate(admin, "a~own").json() != generate(b, "own").json()
        assert generate(b, "own").json() == generate(admin, "b~own").json()
        assert generate(a, "public").json() == generate(b, "public").json()
        assert a.get("/admin/adapters/own").json()["details"]["type"] == "lora"
        assert b.get("/admin/adapters/own").json()["details"]["type"] == "dora"
        assert generate(admin, "own").status_code == 404


def test_a_tenant_changes_only_its_own(guarded: Guarded) -> None:
    with guarded.client("a") as a, guarded.client("operator") as operator, guarded.client("admin") as admin:
        for call in ("delete", "annotate", "rollback"):
            assert CALLS[call](a, "public").status_code == 404
        response = upload(a, "public", guarded.folders["rslora"])  # hides the public one, for a alone
        assert response.status_code == 201
        assert response.json()["name"] == "public"
        assert generate(a, "public").json() == generate(admin, "a~public").json() != generate(operator, "public").json()
        shown = a.get("/admin/adapters/public").json()
        changed = {"residency", "usage"}
        assert {k: v for k, v in shown.items() if k not in changed} == {
            k: v for k, v in response.json().items() if k not in changed
        }
        assert a.delete("/admin/adapters/public").json()["name"] == "public"
        assert generate(a, "public").json() == generate(operator, "public").json()
        for key in ("a", "operator"):
            with guarded.client(key) as client:
                refused = upload(client, "b~smuggled", guarded.folders["rank4"])
                assert refused.status_code == 403
                assert refused.json()["error"]["code"] == "adapter_not_allowed"
        assert upload(a, "x/y", guarded.folders["rank4"]).json()["error"]["code"] == "adapter_name_invalid"


def test_generations_are_the_tenants_own(guarded: Guarded) -> None:
    with guarded.client("a") as a, guarded.client("b") as b:
        assert upload(a, "own", guarded.folders["rank8"]).json()["generation"] == 2
        assert generate(a, "own@1").json() != generate(a, "own@2").json()
        assert [g["generation"] for g in a.get("/admin/adapters/own/generations").json()["generations"]] == [2, 1]
        assert {g["name"] for g in a.get("/admin/adapters/own/generations").json()["generations"]} == {"own"}
        assert generate(b, "own@2").status_code == 404
        assert a.post("/admin/adapters/own/rollback").json()["generation"] == 1
        wrong = a.delete("/admin/adapters/own", params={"expected_generation": 7})
        assert wrong.status_code == 409
        assert "a~" not in wrong.text


def test_a_keys_own_list_confines_it(guarded: Guarded) -> None:
    guarded.add_key("narrow", [Scope.GENERATE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE], tenant="b", adapters=["o*"])
    with guarded.client("narrow") as client:
        assert generate(client, "own").status_code == 200
        assert generate(client, "own@1").status_code == 200
        for name in ("secret", "public", "nobody"):
            for call in CALLS.values():
                assert call(client, name).status_code == (403 if call.is_admins else 404)
        assert [a["name"] for a in client.get("/admin/adapters").json()["adapters"]] == ["own"]
        assert upload(client, "secret", guarded.folders["rank4"]).json()["error"]["code"] == "adapter_not_allowed"
        assert client.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 1}}).status_code == 200


def test_the_engine_is_told_whose_a_request_is(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = []
    submit = guarded.server.engine.submit
    monkeypatch.setattr(
        guarded.server.engine, "submit", lambda request: tenants.append(request.tenant) or submit(request)
    )
    for key in ("a", "b", "operator"):
        with guarded.client(key) as client:
            assert generate(client, "public").status_code == 200
    assert tenants == ["a", "b", ""]


def test_prefixes_are_shared_within_a_tenant_and_never_across(guarded: Guarded) -> None:
    prompt = (
        f"{random.randrange(10**9)} What is the capital of France? The quick brown fox jumps over the lazy dog. " * 2
    )

    def num_hit_tokens(key: str) -> int:
        before = guarded.server.engine.stats.num_prefix_hit_tokens
        with guarded.client(key) as client:
            assert generate(client, "shared", prompt).status_code == 200
        return guarded.server.engine.stats.num_prefix_hit_tokens - before

    digests = set()
    for key in ("a", "b"):
        with guarded.client(key) as client:
            digests.add(upload(client, "shared", guarded.folders["rank16"]).json()["digest"])
    assert len(digests) == 1, "both tenants have the same contents"
    assert num_hit_tokens("a") == 0
    assert num_hit_tokens("b") == 0, "a tenant's prompt was found by another"
    assert num_hit_tokens("a") > 0
    assert num_hit_tokens("b") > 0
    for key in ("a", "b"):
        with guarded.client(key) as client:
            assert client.delete("/admin/adapters/shared").status_code == 200


def test_a_tenants_weight_is_its_share_of_the_engine(guarded: Guarded) -> None:
    guarded.add_key("light", [Scope.GENERATE], tenant="light")
    guarded.add_key("heavy", [Scope.GENERATE], tenant="heavy", limits=KeyLimits(weight=50.0))
    assert guarded.server.keys is not None
    assert (guarded.server.keys.weight_of("light"), guarded.server.keys.weight_of("heavy")) == (1.0, 50.0)
    ended: list[str] = []

    def ask(key: str) -> None:
        parameters = {"max_new_tokens": 40, "ignore_eos_token": True}
        with guarded.client(key) as client:
            assert client.post("/generate", json={"inputs": "Hello", "parameters": parameters}).status_code == 200
        ended.append(key)

    threads = [threading.Thread(target=ask, args=[key]) for key in ["light", "heavy"] * 32]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended[-12:].count("light") > 8, ended


def test_limits_are_held(guarded: Guarded) -> None:
    guarded.add_key("slow", [Scope.GENERATE], limits=KeyLimits(requests_per_minute=2))
    guarded.add_key("small", [Scope.GENERATE], limits=KeyLimits(tokens_per_minute=10))
    guarded.add_key("one", [Scope.GENERATE], limits=KeyLimits(max_concurrent=1))
    body: dict[str, Any] = {"inputs": "Hello", "parameters": GREEDY | {"max_new_tokens": 20}}
    with guarded.client("slow") as client:
        statuses = [client.post("/generate", json=body).status_code for _ in range(3)]
        refused = client.post("/generate", json=body)
        assert statuses == [200, 200, 429]
        assert (refused.json()["code"], refused.json()["error_type"]) == ("rate_limited", "overloaded")
        assert 1 <= int(refused.headers["Retry-After"]) <= 31
        assert client.get("/v1/models").status_code == 200
    with guarded.client("small") as client:
        assert [client.post("/generate", json=body).status_code for _ in range(2)] == [200, 429]
    with guarded.client("one") as client:
        long = {"inputs": "Hello", "parameters": {"max_new_tokens": 400, "ignore_eos_token": True}}
        with client.stream("POST", "/generate_stream", json=long) as response:
            lines = response.iter_lines()
            next(lines)
            with guarded.client("one") as other:
                assert other.post("/generate", json=body).json()["code"] == "concurrency_limited"
        deadline = time.monotonic() + 10
        while client.post("/generate", json=body).status_code == 429:
            assert time.monotonic() < deadline


def test_keys_over_http(guarded: Guarded) -> None:
    with guarded.client("admin") as admin:
        wanted = {"name": "made", "scopes": ["generate"], "tenant": "b", "limits": {"max_concurrent": 5}}
        made = admin.post("/admin/keys", json=wanted)
        assert made.status_code == 201
        key = made.json()
        assert "sha256" not in key
        listed = admin.get("/admin/keys").json()["keys"]
        assert {k: v for k, v in key.items() if k != "secret"} in listed
        assert key["secret"] not in admin.get("/admin/keys").text
        with guarded.client(key["secret"]) as client:
            assert generate(client, "secret").status_code == 200
            assert client.get("/admin/keys").status_code == 403
            assert admin.delete(f"/admin/keys/{key['key_id']}").json()["name"] == "made"
            assert generate(client, "secret").status_code == 401
        assert admin.delete(f"/admin/keys/{key['key_id']}").json()["error"]["code"] == "key_not_found"
        for bad in (
            {"scopes": ["admin"], "tenant": "a"},
            {"scopes": ["all"]},
            {"scopes": []},
            {"tenant": "A"},
            {"x": 1},
        ):
            response = admin.post("/admin/keys", json={"name": "bad", "scopes": ["generate"]} | bad)
            assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_value"), response.text


def test_keys_by_the_client(guarded: Guarded) -> None:
    with Client(guarded.url, api_key=guarded.secrets["admin"]) as admin:
        limits = ClientLimits(requests_per_minute=5)
        made = admin.keys.create("clients", ["generate"], tenant="b", adapters=["sec*"], limits=limits)
        assert (made.tenant, made.adapters, made.limits) == ("b", ["sec*"], limits)
        assert made.key_id in {key.key_id for key in admin.keys.list()}
        with Client(guarded.url, api_key=made.secret) as client:
            assert client.generate("x", adapters="secret", max_new_tokens=1).num_generated_tokens == 1
            with pytest.raises(PermissionDeniedError):
                client.keys.list()
            admin.keys.revoke(made.key_id)
            with pytest.raises(AuthenticationError):
                client.info()


def test_the_audit_log_has_what_was_changed(guarded: Guarded) -> None:
    before = len(guarded.audit())
    with guarded.client("b", **{"X-Request-Id": "audited"}) as client:
        generation = upload(client, "logged", guarded.folders["rank4"]).json()
        client.get("/admin/adapters/logged")
        client.delete("/admin/adapters/logged")
        client.delete("/admin/adapters/logged")
        client.get("/admin/keys")
    key_ids = {record.name: record.key_id for record in guarded.keys.records()}
    entries = guarded.audit()[before:]
    assert [(e["event"], e["method"], e.get("status")) for e in entries] == [
        ("begun", "POST", None),
        ("ended", "POST", 201),
        ("begun", "DELETE", None),
        ("ended", "DELETE", 200),
        ("begun", "DELETE", None),
        ("ended", "DELETE", 404),
    ]
    assert {(e["key_id"], e["tenant"], e["request_id"]) for e in entries} == {(key_ids["b"], "b", "audited")}
    uploaded = entries[1]
    assert (uploaded["action"], uploaded["adapter"]) == ("upload", "b~logged")
    assert (uploaded["generation"], uploaded["digest"]) == (generation["generation"], generation["digest"])
    assert all(secret not in guarded.audit_path.read_text() for secret in guarded.secrets.values())


def test_nothing_is_changed_that_cannot_be_logged(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = guarded.server.audit
    assert audit is not None
    descriptor = audit._descriptor
    with guarded.client("b") as client:
        monkeypatch.setattr(audit, "_descriptor", None)
        refused = client.delete("/admin/adapters/secret")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        monkeypatch.setattr(audit, "_descriptor", descriptor)
        assert client.get("/admin/adapters/secret").status_code == 200


def test_metrics_are_the_administrators(guarded: Guarded) -> None:
    with guarded.client("a") as a, guarded.client("admin") as admin:
        assert a.get("/metrics").status_code == 403
        assert admin.get("/metrics").status_code == 200


def test_a_look_up_takes_as_long_for_what_others_have(guarded: Guarded) -> None:
    """Both are the same look-ups, so medians of many, in turn, are within 5 %; whatever else runs may disturb."""
    view = CallerAdapters(
        guarded.server.adapters, Caller("k", "a", frozenset(Scope) - {Scope.ADMIN}), lambda facts: None
    )

    def look_up(name: str) -> float:
        start_s = time.perf_counter()
        with suppress(NotFoundError):
            view.open_lease({name: 1.0})
        return time.perf_counter() - start_s

    def ratio() -> float:
        taken: dict[str, list[float]] = {"secret": [], "nobody": []}
        for i in range(4000):  # each comes first as often as second
            for name in sorted(taken, reverse=bool(i % 2)):
                taken[name].append(look_up(name))
        medians = [statistics.median(times) for times in taken.values()]
        print(f"medians {medians[0] * 1e6:.2f} µs for another tenant's, {medians[1] * 1e6:.2f} µs for nobody's")
        return max(medians) / min(medians)

    assert min(ratio() for _ in range(3)) < 1.05
