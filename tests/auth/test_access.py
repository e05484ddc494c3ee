"""Every route without a key, with a wrong one, and with each scope."""

import itertools
import re
from typing import Any

import httpx
import pytest

from server.auth.access import OPEN, find_rule
from server.auth.keys import Scope
from tests.auth.conftest import Guarded

WRONG = [
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic bG1x"},
    {"Authorization": "Bearer " + "x" * 5000},
    {"X-Api-Key": "wrong"},
]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def routes(guarded: Guarded) -> list[tuple[str, str]]:
    """Method and path of every route that the served application documents, and its documentation."""
    with guarded.client("admin") as client:
        paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    documented = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    return [*documented, ("GET", "/docs"), ("GET", "/openapi.json")]


def fill(path: str) -> str:
    return re.sub(r"\{generation\}", "1", re.sub(r"\{(?!generation)\w+\}", "nobody", path))


def test_every_route_is_in_the_table(guarded: Guarded) -> None:
    for method, path in routes(guarded):
        assert find_rule(method, fill(path)) is not None, (method, path)


def test_without_a_valid_key_only_the_probes_answer(guarded: Guarded) -> None:
    known = routes(guarded)
    everything = {path for _, path in known} | {"/nothing", "/admin", "/admin/", "/generate/", "/v1/%2e%2e/admin/keys"}
    with guarded.client(None) as client:
        for method, path in itertools.product(METHODS, everything):
            for headers in ({}, *WRONG):
                response = client.request(method, fill(path), headers=headers)
                rule = find_rule(method, fill(path))
                if rule is not None and rule.scopes == OPEN:
                    assert response.status_code != 401
                    assert fill(path) in {"/", "/health", "/ready", "/ping"}
                    continue
                assert response.status_code == 401, (method, path, response.text)
                assert response.headers["WWW-Authenticate"] == "Bearer"
                if method != "HEAD":
                    body = response.json()
                    fields = body["error"] if isinstance(body["error"], dict) else body
                    assert fields["code"] == "invalid_api_key"


def test_two_authorization_headers_are_none(guarded: Guarded) -> None:
    header = f"Bearer {guarded.secrets['a']}".encode()
    headers = [(b"authorization", header), (b"authorization", b"Bearer wrong")]
    assert httpx.get(f"{guarded.url}/info", headers=headers).status_code == 401
    assert httpx.get(f"{guarded.url}/info", headers=headers[:1]).status_code == 200
    lower = [(b"authorization", header.replace(b"Bearer", b"bearer"))]
    assert httpx.get(f"{guarded.url}/info", headers=lower).status_code == 200


@pytest.mark.parametrize("scope", list(Scope), ids=lambda scope: scope.value)
def test_each_scope_reaches_its_routes_and_no_others(guarded: Guarded, scope: Scope) -> None:
    guarded.add_key(f"only-{scope.value}", [scope])
    with guarded.client(f"only-{scope.value}") as client:
        for method, path in routes(guarded):
            rule = find_rule(method, fill(path))
            assert rule is not None
            may = rule.scopes == OPEN or scope in rule.scopes or scope is Scope.ADMIN
            response = client.request(method, fill(path), json={"expected_generation": -1})
            assert (response.status_code != 403) == may, (method, path, response.text)
            assert response.status_code != 401


def test_routes_that_nobody_knows_are_not_there(guarded: Guarded) -> None:
    for key in ("a", "admin"):
        with guarded.client(key) as client:
            response = client.get("/v1/nothing")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "route_not_found")
    with guarded.client("a") as mine, guarded.client("admin") as admin:
        assert mine.get("/v1/nothing").content == admin.get("/v1/nothing").content
