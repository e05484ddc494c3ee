"""Stores for tests, and short adapters in them."""

import os
from pathlib import Path
from typing import Any

from server.adapters.record import Publication
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterRecord, AdapterStore

_holders: dict[Path, AdapterStore] = {}


def opened(root: Path) -> AdapterStore:
    """A store on `root`. The one that a test opened there before loses its claim, as if its process had ended."""
    if root in _holders:
        _holders.pop(root).close()
    store = _holders[root] = AdapterStore(root)
    store.open()
    return store


def put(store: AdapterStore, name: str, contents: str, **details: object) -> AdapterRecord:
    return publish(store, name, contents, details)


def publish(
    store: AdapterStore, name: str, contents: str, details: dict[str, object] | None = None, **options: Any
) -> AdapterRecord:
    with store.staging_folder() as folder:
        (folder / CONFIG_NAME).write_bytes(b"{}")
        (folder / WEIGHTS_NAME).write_bytes(contents.encode())
        return store.publish(name, folder, details or {}, Publication(**options))


def read(store: AdapterStore, digest: str) -> tuple[bytes, bytes]:
    """Configuration and weights of an object."""
    return store.read(digest, lambda config, weights: (config, bytes(weights)))


def weights_of(store: AdapterStore, reference: str) -> str:
    return read(store, store.get(reference).digest)[1].decode()


def objects(root: Path) -> set[str]:
    return set(os.listdir(root / "objects"))
