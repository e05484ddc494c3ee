"""Authentication: the way in. Plain ASGI, so that a client's disconnect still reaches the handlers.

It finds the caller, refuses what its key does not reach, holds it to its limits, and has the audit log written around
what changes something. Behind it `request.state.caller` is set, always.
"""

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.envelopes import error_response, family_of, route_not_found
from server.auth.access import OPEN, AccessRule, find_rule
from server.auth.audit import AuditLog
from server.auth.caller import ANYBODY, Caller
from server.auth.key_file import KeyFile
from server.auth.limits import Limiter
from server.errors import AuthenticationError, ForbiddenError, ServerError

__all__ = ["Authentication"]

logger = logging.getLogger(__name__)

SECRET_HEADERS = frozenset({b"authorization", b"x-api-key"})
MAX_AUTHORIZATION_BYTES = 1024


class Authentication:
    """Lets callers in, or answers in their place.

    Args:
        keys: None where keys are off: everybody may do everything.
        open_metrics: `/metrics` needs no key.
    """

    def __init__(
        self, app: ASGIApp, *, keys: KeyFile | None, limiter: Limiter, audit: AuditLog | None, open_metrics: bool
    ) -> None:
        self.app = app
        self._keys = keys
        self._limiter = limiter
        self._audit = audit
        self._open_metrics = open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        rule = find_rule(scope["method"], scope["path"])
        state = scope.setdefault("state", {})
        try:
            caller = state["caller"] = self._admit(scope, rule)
            if rule is not None and rule.is_work:
                with self._limiter.request(caller):
                    await self.app(scope, receive, send)
            elif rule is not None and rule.is_audited and self._audit is not None:
                await self._call_audited(caller, self._audit, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except ServerError as error:  # of this class only: the application answers its own
            await error_response(error, family_of(scope["path"]))(scope, receive, send)

    def _admit(self, scope: Scope, rule: AccessRule | None) -> Caller:
        """The caller, if it may come in.

        Raises:
            AuthenticationError, ForbiddenError, NotFoundError: it may not.
        """
        if self._keys is None:
            return ANYBODY
        is_open = rule is not None and (rule.scopes == OPEN or (self._open_metrics and scope["path"] == "/metrics"))
        if is_open:
            return Caller("", "", frozenset())
        secret = _bearer(scope)
        record = self._keys.find(secret) if secret else None
        if record is None:
            raise AuthenticationError(
                "the API key is not valid" if secret else "this needs an API key: `Authorization: Bearer KEY`"
            )
        caller = Caller.of(record, self._keys.limits_of(record))
        if rule is None and not caller.sees_all:
            raise route_not_found(scope["method"], scope["path"])
        if rule is not None and not caller.has_any(rule.scopes):
            needed = " or ".join(sorted(f"`{wanted.value}`" for wanted in rule.scopes))
            raise ForbiddenError(f"this needs a key with the scope {needed}")
        return caller

    async def _call_audited(self, caller: Caller, audit: AuditLog, scope: Scope, receive: Receive, send: Send) -> None:
        state: dict[str, Any] = scope["state"]
        facts: dict[str, object] = {
            "request_id": state.get("request_id"),
            "key_id": caller.key_id,
            "tenant": caller.tenant,
            "client": (scope.get("client") or [None])[0],
            "method": scope["method"],
            "path": scope["path"],
        }
        noted: dict[str, object] = {}
        state["note"] = noted.update
        await asyncio.to_thread(audit.write, {"event": "begun", **facts})

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                ended = {"event": "ended", **facts, **noted, "status": message["status"]}
                try:
                    await asyncio.to_thread(audit.write, ended)
                except ServerError:  # it is done, and its beginning is in the log
                    logger.exception("the end of an action could not be logged: %s", ended)
            await send(message)

        await self.app(scope, receive, send_noted)


def _bearer(scope: Scope) -> bytes:
    """The secret of the Authorization header, or of Anthropic's X-Api-Key; b"" if there is none, or more than one."""
    given = [(name, value) for name, value in scope["headers"] if name in SECRET_HEADERS]
    if len(given) != 1 or len(given[0][1]) > MAX_AUTHORIZATION_BYTES:
        return b""
    ((name, value),) = given
    if name == b"x-api-key":
        return value.strip()
    scheme, _, secret = value.strip().partition(b" ")
    return secret.strip() if scheme.lower() == b"bearer" else b""
