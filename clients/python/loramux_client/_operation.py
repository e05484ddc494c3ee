"""One call of the API as data, and the course of an exchange without any input or output of its own.

`exchange` says what to do next and is told what came of it; the drivers (`_sync`, `_async`) do it. So everything that
can be got wrong, retries above all, is written once and tested without a network.
"""

import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from loramux_client._retry import RetryPolicy
from loramux_client._upload import Upload
from loramux_client.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    UnexpectedAnswerError,
    error_from_answer,
)

__all__ = ["Course", "Operation", "Send", "Sleep", "exchange", "reader"]

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[T]):
    """A call: where it goes, what it carries, and how its answer is read.

    Attributes:
        changes_nothing: on the server; then it may be repeated whatever became of it.
        is_single: never repeated: it asks for how things are now.
        timeout_s: for each step of the exchange; None for the client's.
    """

    method: str
    path: str
    read: Callable[[bytes], T]
    json: Mapping[str, Any] | None = None
    params: Mapping[str, str | int] | None = None
    upload: Upload | None = None
    changes_nothing: bool = False
    is_single: bool = False
    timeout_s: float | None = None

    def arguments(self, stack: ExitStack) -> dict[str, Any]:
        """Arguments of httpx's `build_request`; files that it opens are closed by `stack`."""
        arguments: dict[str, Any] = {"method": self.method, "url": self.path, "params": self.params}
        if self.json is not None:
            arguments["json"] = self.json
        if self.upload is not None:
            arguments["data"] = self.upload.fields
            arguments["files"] = self.upload.open(stack)
        if self.timeout_s is not None:
            arguments["timeout"] = httpx.Timeout(self.timeout_s)
        return arguments


@dataclass(frozen=True, slots=True)
class Send:
    """Send the operation, and tell the response, or httpx's error. A stream's body is read only if it was refused."""

    operation: Operation[Any]
    is_stream: bool


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait, and tell None."""

    seconds: float


Course = Generator[Send | Sleep, httpx.Response | httpx.RequestError | None, httpx.Response]


def exchange(operation: Operation[Any], policy: RetryPolicy, *, is_stream: bool = False) -> Course:
    """What to do until the operation has succeeded; returns the response.

    Raises:
        LoraMuxError: it failed, and is not or no longer to be repeated.
    """
    for attempt in itertools.count():
        outcome = yield Send(operation, is_stream)
        assert outcome is not None
        if isinstance(outcome, httpx.Response):
            if outcome.is_success:
                return outcome
            if outcome.status_code < 400:
                raise UnexpectedAnswerError(f"the server answered with status {outcome.status_code}")
        failure = _failure(outcome)
        wait_s = policy.wait_s(attempt, failure, changes_nothing=operation.changes_nothing)
        if wait_s is None or operation.is_single:
            raise _typed(failure) from (failure if isinstance(failure, httpx.RequestError) else None)
        yield Sleep(wait_s)
    raise AssertionError("attempts never run out before the policy gives up")


def _failure(outcome: httpx.Response | httpx.RequestError) -> APIStatusError | httpx.RequestError:
    if isinstance(outcome, httpx.Response):
        return error_from_answer(outcome.status_code, outcome.headers, outcome.content)
    return outcome


def _typed(failure: APIStatusError | httpx.RequestError) -> Exception:
    if isinstance(failure, APIStatusError):
        return failure
    message = str(failure) or type(failure).__name__
    if isinstance(failure, httpx.TimeoutException):
        return APITimeoutError(f"the server did not answer in time: {message}")
    return APIConnectionError(f"no answer from the server: {message}")


def reader(model: type[M]) -> Callable[[bytes], M]:
    """Reads an answer's body as one of the models.

    Raises (when called):
        UnexpectedAnswerError: the body is something else.
    """

    def read(content: bytes) -> M:
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UnexpectedAnswerError(f"the answer is no {model.__name__}: {where}: {first['msg']}") from None

    return read
