"""How an error looks on the wire: the one place where a kind of error gets a status.

Families of routes, told by their path: TGI's and LoRAX's (`/generate` and its like), OpenAI's (`/v1/…`) and our own
(`/admin/…`), which share OpenAI's shape, and Anthropic's (`/v1/messages`). Every body has a stable `code`; all but
Anthropic's have TGI's `error_type` word, which several clients pick their exception by.
"""

import json
import logging
from enum import Enum
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from server.errors import InvalidRequestError, NotFoundError, ServerError

__all__ = ["Family", "error_body", "error_response", "family_of", "install_error_handlers", "route_not_found"]

logger = logging.getLogger(__name__)


class Family(Enum):
    """A group of routes whose clients expect the same shapes."""

    TGI = "tgi"
    OPENAI = "openai"
    ADMIN = "admin"
    ANTHROPIC = "anthropic"


class _Shape(NamedTuple):
    """Status in each family, and the words of TGI and OpenAI for a kind of error."""

    tgi: int
    openai: int
    admin: int
    tgi_type: str
    openai_type: str

    @property
    def anthropic(self) -> int:
        return self.openai


SHAPES: dict[str, _Shape] = {
    "validation": _Shape(422, 400, 422, "validation", "invalid_request_error"),
    "malformed": _Shape(422, 400, 400, "validation", "invalid_request_error"),
    "unprocessable": _Shape(422, 400, 422, "validation", "invalid_request_error"),
    "authentication": _Shape(401, 401, 401, "authentication", "authentication_error"),
    "forbidden": _Shape(403, 403, 403, "authentication", "permission_error"),
    "not_found": _Shape(404, 404, 404, "not_found", "invalid_request_error"),
    "method": _Shape(405, 405, 405, "validation", "invalid_request_error"),
    "conflict": _Shape(409, 409, 409, "conflict", "invalid_request_error"),
    "too_large": _Shape(413, 413, 413, "validation", "invalid_request_error"),
    "overloaded": _Shape(429, 429, 429, "overloaded", "rate_limit_error"),
    "unavailable": _Shape(503, 503, 503, "unavailable", "server_error"),
    "storage_full": _Shape(507, 507, 507, "unavailable", "server_error"),
    "quota": _Shape(507, 507, 507, "unavailable", "insufficient_quota"),
    "generation": _Shape(424, 500, 500, "generation", "server_error"),
    "internal": _Shape(500, 500, 500, "incomplete_generation", "server_error"),
}


ENCODE = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def family_of(path: str) -> Family:
    """Which family a path belongs to."""
    if path == "/v1/messages":
        return Family.ANTHROPIC
    if path.startswith("/v1/") or path == "/v1":
        return Family.OPENAI
    return Family.ADMIN if path.startswith("/admin") else Family.TGI


def error_body(error: ServerError, family: Family) -> dict[str, Any]:
    """The JSON body of an error."""
    shape = SHAPES[error.kind]
    if family is Family.TGI:
        return {
            "error": error.message,
            "error_type": shape.tgi_type,
            "code": error.code,
            "param": error.param,
        } | error.details
    if family is Family.ANTHROPIC:
        other = "api_error" if shape.openai >= 500 else "invalid_request_error"
        kind = ANTHROPIC_TYPES.get(shape.openai, other)
        said = {"type": kind, "message": error.message, "code": error.code, "param": error.param}
        return {"type": "error", "error": said | error.details}
    inner = {"message": error.message, "type": shape.openai_type, "param": error.param, "code": error.code}
    return {"error": inner | error.details, "error_type": shape.tgi_type}


def error_response(error: ServerError, family: Family) -> Response:
    """The whole answer for an error: status, headers and body."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.kind == "authentication":
        headers["WWW-Authenticate"] = "Bearer"
    status = getattr(SHAPES[error.kind], family.value)
    return Response(dump(error_body(error, family)), status, headers, media_type="application/json")


def dump(body: Any) -> str:
    """JSON on one line, all ASCII: clients that split streams at any line separator stay whole."""
    return ENCODE(body)


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of a route come out in its family's shape."""

    async def on_server_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServerError)
        return error_response(error, family_of(request.url.path))

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(error), family_of(request.url.path))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = error_response(_from_http(request, error), family_of(request.url.path))
        if error.status_code == 405:
            response.headers["Allow"] = _allowed_methods(app, request.url.path)
        return response

    async def on_crash(request: Request, error: Exception) -> Response:
        logger.error("a request to %s failed", request.url.path, exc_info=error)
        return error_response(ServerError("internal error"), family_of(request.url.path))

    app.add_exception_handler(ServerError, on_server_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_crash)


def _allowed_methods(app: FastAPI, path: str) -> str:
    """Of all routes with this path: Starlette itself looks at the first one only."""
    templates = app.openapi()["paths"].items()
    found = {
        m.upper() for template, operations in templates if compile_path(template)[0].match(path) for m in operations
    }
    return ", ".join(sorted(found))


def _from_validation(error: RequestValidationError) -> ServerError:
    """The first fault, by the name of its field. The input itself is not echoed."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return _malformed_json()
    field = ".".join(location)
    message = f"`{field}`: {first['msg']}" if field else str(first["msg"])
    return InvalidRequestError(message.encode("ascii", "backslashreplace").decode(), param=field or None)


def _malformed_json() -> ServerError:
    error = InvalidRequestError("the body is not valid JSON", code="json_invalid")
    error.kind = "malformed"
    return error


def route_not_found(method: str, path: str) -> NotFoundError:
    """What is answered where there is no route, or none that the caller may know."""
    shown = path[:256].encode("ascii", "backslashreplace").decode()
    return NotFoundError(f"there is no route {method} {shown}", code="route_not_found")


def _from_http(request: Request, error: HTTPException) -> ServerError:
    if isinstance(error.__cause__, ServerError):  # raised while FastAPI read the body
        return error.__cause__
    if isinstance(error.__cause__, ValueError | RecursionError):
        return _malformed_json()
    if error.status_code == 404:
        return route_not_found(request.method, request.url.path)
    fault = InvalidRequestError(str(error.detail))
    fault.kind = "method" if error.status_code == 405 else "malformed" if error.status_code < 500 else "internal"
    fault.code = "method_not_allowed" if error.status_code == 405 else "bad_request"
    return fault
