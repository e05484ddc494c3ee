"""Every error of this client.

    LoraMuxError
    ├── APIConnectionError          the server could not be reached, or the connection was cut
    │   └── APITimeoutError         it did not answer in time
    ├── IncompleteAnswerError       a stream or a job ended before its last word
    ├── UnexpectedAnswerError       an answer that this client cannot read: is it a loramux server?
    ├── JobFailedError              the job ended without a result
    └── APIStatusError              the server refused; has `status`, `code`, `param`, `retry_after_s`, `request_id`
        ├── InvalidRequestError     a value is wrong, or an adapter was understood and refused (400, 415, 422)
        ├── AuthenticationError     no key, or not a valid one (401)
        ├── PermissionDeniedError   the key's scopes do not reach so far (403)
        ├── NotFoundError           no such adapter, model, job or key; or it is not yours (404)
        ├── ConflictError           changed under you, or in use (409)
        ├── TooLargeError           more bytes than the server accepts (413)
        ├── RateLimitedError        full at the moment, or your own limit is reached (429)
        ├── GenerationError         failed after it was accepted (424, or an event in a stream)
        ├── UnavailableError        draining, or the storage is down (503)
        ├── StorageFullError        no space left for adapters (507)
        └── ServerError             any other fault of the server

`code` is stable; the server's README lists all codes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "ConflictError",
    "GenerationError",
    "IncompleteAnswerError",
    "InvalidRequestError",
    "JobFailedError",
    "LoraMuxError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitedError",
    "ServerError",
    "StorageFullError",
    "TooLargeError",
    "UnavailableError",
    "UnexpectedAnswerError",
    "error_from_answer",
    "error_from_event",
]

MAX_RETRY_AFTER_CHARACTERS = 9


class LoraMuxError(Exception):
    """Base of all errors of this client."""


class APIConnectionError(LoraMuxError):
    pass


class APITimeoutError(APIConnectionError):
    pass


class IncompleteAnswerError(LoraMuxError):
    pass


class UnexpectedAnswerError(LoraMuxError):
    pass


class JobFailedError(LoraMuxError):
    """A job's end without a result.

    Attributes:
        code: stable; "" for a job that was cancelled or interrupted.
        report: of an adapter that was refused, as in APIStatusError.
    """

    def __init__(self, message: str, *, code: str = "", report: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.report = list(report)


class APIStatusError(LoraMuxError):
    """The server's refusal.

    Attributes:
        status: the HTTP status; 200 where it came as an event of a stream.
        code: stable; "" where something between the client and the server answered.
        param: the request's field at fault, where there is one.
        retry_after_s: when the server says to try again.
        request_id: to find the request in the server's logs.
        body: the whole answer, if it was a JSON object.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str = "",
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.body = body or {}

    @property
    def report(self) -> list[Mapping[str, Any]]:
        """Of an adapter that was refused: each group of its tensors with `outcome` and `reason`; else empty."""
        inner = self.body.get("error")
        return list((inner if isinstance(inner, dict) else self.body).get("report") or ())


class InvalidRequestError(APIStatusError):
    pass


class AuthenticationError(APIStatusError):
    pass


class PermissionDeniedError(APIStatusError):
    pass


class NotFoundError(APIStatusError):
    pass


class ConflictError(APIStatusError):
    pass


class TooLargeError(APIStatusError):
    pass


class RateLimitedError(APIStatusError):
    pass


class GenerationError(APIStatusError):
    pass


class UnavailableError(APIStatusError):
    pass


class StorageFullError(APIStatusError):
    pass


class ServerError(APIStatusError):
    pass


BY_STATUS: dict[int, type[APIStatusError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: TooLargeError,
    415: InvalidRequestError,
    422: InvalidRequestError,
    424: GenerationError,
    429: RateLimitedError,
    503: UnavailableError,
    507: StorageFullError,
}
UNAVAILABLE_CODES = frozenset({"draining", "shutting_down", "unavailable"})


def error_from_answer(status: int, headers: Mapping[str, str], content: bytes) -> APIStatusError:
    """The error that an answer with a status of 400 or more stands for, whatever sent it."""
    body: Any = None
    if "json" in headers.get("content-type", ""):
        try:
            body = json.loads(content)
        except ValueError:
            body = None
    body = body if isinstance(body, dict) else {}
    message, code, param = _facts(body)
    kind = BY_STATUS.get(status, ServerError if status >= 500 else InvalidRequestError)
    return kind(
        message or f"the server answered with status {status}",
        status=status,
        code=code,
        param=param,
        retry_after_s=_retry_after_s(headers.get("retry-after", "")),
        request_id=headers.get("x-request-id"),
        body=body,
    )


def error_from_event(body: Mapping[str, Any]) -> APIStatusError:
    """The error that a stream's last event stands for."""
    message, code, param = _facts(body)
    kind = UnavailableError if code in UNAVAILABLE_CODES else GenerationError
    return kind(message, status=200, code=code, param=param, body=body)


def _facts(body: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Message, code and field, from either of the two shapes that the server uses."""
    inner = body.get("error")
    fields = inner if isinstance(inner, dict) else body
    message = fields.get("message") if isinstance(inner, dict) else inner
    param = fields.get("param")
    return str(message or ""), str(fields.get("code") or ""), None if param is None else str(param)


def _retry_after_s(text: str) -> float | None:
    is_number = text.isascii() and text.isdigit() and len(text) <= MAX_RETRY_AFTER_CHARACTERS
    return float(text) if is_number else None
