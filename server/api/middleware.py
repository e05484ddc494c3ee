"""Plain ASGI middleware. (Starlette's BaseHTTPMiddleware hides a client's disconnect from the handlers.)"""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.envelopes import error_response, family_of
from server.errors import TooLargeError

__all__ = ["BodyLimit", "RequestId"]


class RequestId:
    """Echoes the caller's X-Request-Id, or makes one; also `request.state.request_id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex

        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses a body above a limit, by its declared length or while it streams in.

    Args:
        max_json_bytes: for every route but uploads.
        max_upload_bytes: for routes under `upload_prefix`.
    """

    def __init__(self, app: ASGIApp, *, max_json_bytes: int, max_upload_bytes: int, upload_prefix: str) -> None:
        self.app = app
        self._max_json_bytes = max_json_bytes
        self._max_upload_bytes = max_upload_bytes
        self._upload_prefix = upload_prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"].startswith(self._upload_prefix)
        limit = self._max_upload_bytes if is_upload else self._max_json_bytes
        error = TooLargeError(f"the body may have {limit} bytes at most", code="body_too_large")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            await error_response(error, family_of(scope["path"]))(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    raise error
            return message

        await self.app(scope, receive_counted, send)
