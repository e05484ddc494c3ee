"""Server-sent events, written by hand: one `data:` line and a blank line per event, in one write each.

No comments, pings or, but for Anthropic's clients, other fields: several clients glue a stray line to the next event.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.envelopes import dump

__all__ = ["EventStream", "event"]

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(body: Any, *, name: str = "") -> str:
    """One event with this JSON body; named only for clients that look at its name."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dump(body)}\n\n"


class EventStream(StreamingResponse):
    """Streams events and calls `on_close` when it is over, however it ends; also if the client went before it began."""

    def __init__(self, events: AsyncIterator[str], headers: dict[str, str], on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS | headers)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
