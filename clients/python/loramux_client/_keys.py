"""The operations on API keys, without input or output of their own."""

from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from loramux_client._operation import Operation, reader
from loramux_client.models import Key, NewKey

__all__ = ["create_key", "list_keys", "revoke_key"]


class KeyList(BaseModel):
    """All keys, oldest first."""

    keys: list[Key]


def list_keys() -> Operation[list[Key]]:
    """All keys."""
    read = reader(KeyList)
    return Operation(method="GET", path="/admin/keys", read=lambda content: read(content).keys, changes_nothing=True)


def create_key(body: dict[str, Any]) -> Operation[NewKey]:
    """A new key."""
    given = {name: value for name, value in body.items() if value is not None}
    return Operation(method="POST", path="/admin/keys", json=given, read=reader(NewKey))


def revoke_key(key_id: str) -> Operation[Key]:
    """End a key."""
    return Operation(method="DELETE", path=f"/admin/keys/{quote(key_id, safe='')}", read=reader(Key))
