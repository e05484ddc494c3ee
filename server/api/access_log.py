"""AccessLog: one count and one line for every request, with 499 for those whose client went first. Plain ASGI."""

import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.disconnect import CLIENT_CLOSED_REQUEST

__all__ = ["AccessLog"]

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"
Count = Callable[[str, str, int], None]
"""Takes a request's method, route and status."""


class AccessLog:
    """Counts requests by route and status, and logs those that went wrong; all of them at the level `debug`.

    A stream's status was sent with its first byte; if its client goes before the last one, it counts as 499 all the
    same.
    """

    def __init__(self, app: ASGIApp, *, count: Count) -> None:
        self.app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start_s = time.monotonic()
        status, is_answered, is_left = 500, False, False

        async def receive_watched() -> Message:
            nonlocal is_left
            message = await receive()
            if message["type"] == "http.disconnect" and not is_answered:
                is_left = True
            return message

        async def send_watched(message: Message) -> None:
            nonlocal status, is_answered
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                is_answered = True
            await send(message)

        try:
            await self.app(scope, receive_watched, send_watched)
        finally:
            if is_left:
                status = CLIENT_CLOSED_REQUEST
            self._note(scope, status, time.monotonic() - start_s)

    def _note(self, scope: Scope, status: int, duration_s: float) -> None:
        method = scope["method"] if scope["method"] in {"GET", "HEAD", "POST", "PATCH", "DELETE"} else "other"
        self._count(method, getattr(scope.get("route"), "path", UNMATCHED), status)
        level = logging.INFO if status == CLIENT_CLOSED_REQUEST or status >= 500 else logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        state = scope.get("state", {})
        caller = state.get("caller")
        logger.log(
            level,
            "%s %s %s %d %.3f s request %s key %s",
            (scope.get("client") or ("-",))[0],
            method,
            scope["path"][:256].encode("unicode_escape").decode(),
            status,
            duration_s,
            state.get("request_id", "-"),
            getattr(caller, "key_id", "") or "-",
        )
