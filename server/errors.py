"""Errors that reach a client.

An error has a `kind`, which decides its HTTP status in each API family (see server.api.envelopes), and a `code`, which
is stable and listed in the README. Messages are for people: they name values and limits, never paths or traces.

    ServerError
    ├── InvalidRequestError    a value is wrong                      kind "validation"
    │   └── ContextLengthError prompt and output do not fit
    ├── InvalidAdapterError    an adapter is understood and refused  kind "unprocessable"
    ├── AuthenticationError    no valid key                          kind "authentication"
    ├── ForbiddenError         the key does not reach so far         kind "forbidden"
    ├── NotFoundError          unknown adapter or route              kind "not_found"
    ├── ConflictError          changed under you, or in use          kind "conflict"
    ├── TooLargeError          more bytes than allowed               kind "too_large"
    ├── OverloadedError        full at the moment, with Retry-After  kind "overloaded"
    ├── UnavailableError       starting, draining or storage down    kind "unavailable"
    ├── StorageFullError       no space left for adapters            kind "storage_full"
    └── GenerationError        failed after it was accepted          kind "generation"
"""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "AuthenticationError",
    "ConflictError",
    "ContextLengthError",
    "ForbiddenError",
    "GenerationError",
    "InvalidAdapterError",
    "InvalidRequestError",
    "NotFoundError",
    "OverloadedError",
    "ServerError",
    "StorageFullError",
    "TooLargeError",
    "UnavailableError",
]


class ServerError(Exception):
    """Base of every error with a stable code.

    Attributes:
        param: the request field at fault, where there is one.
        retry_after_s: when to try again; None if trying again is of no use.
        details: what a program needs to react, shown beside the message; JSON.
    """

    kind = "internal"
    code = "internal_error"
    retry_after_s: int | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = dict(details or {})
        if code is not None:
            self.code = code


class InvalidRequestError(ServerError):
    kind = "validation"
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"

    def __init__(self, limit: int, num_prompt_tokens: int, max_new_tokens: int) -> None:
        super().__init__(
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. "
            f"Given: {num_prompt_tokens} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
        )
        self.limit = limit
        self.num_prompt_tokens = num_prompt_tokens
        self.max_new_tokens = max_new_tokens


class InvalidAdapterError(ServerError):
    kind = "unprocessable"
    code = "adapter_invalid"


class AuthenticationError(ServerError):
    kind = "authentication"
    code = "invalid_api_key"


class ForbiddenError(ServerError):
    kind = "forbidden"
    code = "scope_missing"


class NotFoundError(ServerError):
    kind = "not_found"
    code = "not_found"


class ConflictError(ServerError):
    kind = "conflict"
    code = "conflict"


class TooLargeError(ServerError):
    kind = "too_large"
    code = "too_large"


class OverloadedError(ServerError):
    kind = "overloaded"
    code = "overloaded"
    retry_after_s = 1


class UnavailableError(ServerError):
    kind = "unavailable"
    code = "unavailable"
    retry_after_s = 5


class StorageFullError(ServerError):
    kind = "storage_full"
    code = "storage_full"
    retry_after_s = 60


class GenerationError(ServerError):
    kind = "generation"
    code = "generation_failed"
