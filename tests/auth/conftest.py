"""A live server with keys: two tenants, an operator of public adapters, and an administrator."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import Server
from server.auth.key_file import KeyFile
from server.auth.keys import Scope, new_key
from tests.api.conftest import tiny
from tests.jobs.conftest import InlineProcess
from tests.live_server import running_server, tiny_settings

__all__ = ["tiny"]

ALL_BUT_ADMIN = frozenset(Scope) - {Scope.ADMIN}
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Guarded:
    """A running server that asks for keys."""

    url: str
    server: Server
    keys: KeyFile
    audit_path: Path
    folders: dict[str, Path]
    secrets: dict[str, str] = field(default_factory=dict)

    def add_key(self, name: str, scopes: Any, **others: Any) -> str:
        record, self.secrets[name] = new_key(name, scopes, **others)
        self.keys.add(record)
        return self.secrets[name]

    def client(self, name: str | None, **headers: str) -> httpx.Client:
        if name is not None:
            headers["Authorization"] = f"Bearer {self.secrets.get(name, name)}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit_path.read_text().splitlines()]


def upload(client: httpx.Client, name: str, folder: Path) -> httpx.Response:
    files = [("files", (file_name, (folder / file_name).read_bytes())) for file_name in FILES]
    return client.post("/admin/adapters", data={"name": name}, files=files)


@pytest.fixture(scope="module")
def guarded(tiny: tuple[Path, Any, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """Tenants a and b each have an adapter `own` of their own; b also has `secret`; `public` is everybody's."""
    model, _, folders = tiny
    home = tmp_path_factory.mktemp("guarded")
    keys = KeyFile(home / "keys.json")
    secrets: dict[str, str] = {}
    for name, scopes, tenant in (
        ("admin", {Scope.ADMIN}, None),
        ("a", ALL_BUT_ADMIN, "a"),
        ("b", ALL_BUT_ADMIN, "b"),
        ("operator", ALL_BUT_ADMIN, None),
    ):
        record, secrets[name] = new_key(name, scopes, tenant=tenant)
        keys.add(record)
    settings = tiny_settings(model, home / "store", keys=keys.path, max_upload_bytes=1 << 20)
    with running_server(settings) as (url, server):
        assert server.keys is not None
        server.jobs._make_process = InlineProcess  # each job's own Python would take seconds to start
        guarded = Guarded(url, server, server.keys, home / "audit.jsonl", folders, secrets)
        for key, name, folder in (
            ("a", "own", "rank4"),
            ("b", "own", "dora"),
            ("b", "secret", "rank8"),
            ("operator", "public", "rank16"),
        ):
            with guarded.client(key) as client:
                assert upload(client, name, folders[folder]).status_code == 201
        yield guarded
