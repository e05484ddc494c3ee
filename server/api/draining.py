"""What clients see of a server that is going away: `/ready`, and the refusal of new work. Plain ASGI."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.envelopes import error_response, family_of
from server.drain import Drain
from server.errors import ServerError, UnavailableError

__all__ = ["DrainGate", "router"]

router = APIRouter(tags=["system"])

READ_METHODS = frozenset({"GET", "HEAD"})


@router.get("/ready", response_class=Response, responses={503: {"description": "not now: draining, or broken"}})
async def ready(request: Request) -> Response:
    """200 while new requests are welcome. (`/health` stays 200 while a server drains: it need not be restarted.)"""
    if request.app.state.drain.is_draining:
        raise _draining()
    if not request.app.state.generations.engine.is_healthy:
        raise UnavailableError("the engine does not run")
    return Response()


class DrainGate:
    """Counts what runs, and refuses what would begin while the server drains. Reading stays possible."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self.app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READ_METHODS:
            await self.app(scope, receive, send)
        elif self._drain.is_draining:
            response = error_response(_draining(), family_of(scope["path"]))
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
        else:
            with self._drain.request():
                await self.app(scope, receive, send)


def _draining() -> ServerError:
    return UnavailableError("the server is going away and takes no new requests", code="draining")
