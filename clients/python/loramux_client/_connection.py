"""Where the server is and how to talk to it, for both clients."""

import os
from typing import Any

import httpx

from loramux_client._operation import Operation, reader
from loramux_client.models import ServerInfo

__all__ = ["INFO", "READY", "http_arguments"]

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0
READY = Operation(method="GET", path="/ready", read=bool, is_single=True)
INFO = Operation(method="GET", path="/info", read=reader(ServerInfo), changes_nothing=True)


def http_arguments(
    url: str | None, api_key: str | None, timeout_s: float, headers: dict[str, str] | None
) -> dict[str, Any]:
    """Arguments of httpx's clients; what is not given comes from the environment."""
    key = api_key or os.environ.get("LORAMUX_API_KEY")
    given = dict(headers or {})
    if key:
        given["Authorization"] = f"Bearer {key}"
    return {
        "base_url": url or os.environ.get("LORAMUX_URL") or DEFAULT_URL,
        "headers": given,
        "timeout": httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
    }
