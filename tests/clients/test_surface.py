"""The synchronous and the asynchronous client are the same."""

import importlib.util
import inspect
from types import ModuleType
from typing import Any

import pytest

import loramux_client
from loramux_client import AsyncClient, AsyncStream, Client, Stream
from tests.architecture.source_tree import ROOT

FOLDER = ROOT / "clients/python"


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sync", FOLDER / "make_sync.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_synchronous_client_is_made_from_the_asynchronous_one() -> None:
    for path, text in _maker().made().items():
        assert path.read_text() == text, f"{path.name} is out of date: python clients/python/make_sync.py"


def _members(kind: type) -> dict[str, str]:
    """Public methods with their parameters."""
    return {
        name: str(inspect.signature(member).replace(return_annotation=inspect.Signature.empty))
        for name, member in inspect.getmembers(kind, callable)
        if not name.startswith("_")
    }


def _parts(client: Any) -> dict[str, type]:
    return {name: type(part) for name, part in vars(client).items() if not name.startswith("_")}


def test_both_have_the_same_surface() -> None:
    assert _members(Client) == _members(AsyncClient)
    assert _members(Stream) == _members(AsyncStream)
    parts, async_parts = _parts(Client()), _parts(AsyncClient())
    assert parts.keys() == async_parts.keys()
    assert parts.keys() >= {"adapters"}
    for name, kind in parts.items():
        assert _members(kind) == _members(async_parts[name])


@pytest.mark.parametrize("name", loramux_client.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(loramux_client, name) is not None


def test_the_package_says_that_it_is_typed() -> None:
    assert (FOLDER / "loramux_client/py.typed").exists()
