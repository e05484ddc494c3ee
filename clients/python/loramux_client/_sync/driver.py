# Made from _async/driver.py by make_sync.py: change that file.
"""The driver: does what the core says, and waits for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Generic, TypeVar

import httpx

from loramux_client._generation import Assembler
from loramux_client._operation import Course, Operation, Send, exchange
from loramux_client._retry import RetryPolicy
from loramux_client._sse import EventDecoder
from loramux_client.errors import APITimeoutError, IncompleteAnswerError

__all__ = ["Driver", "Stream"]

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Driver:
    """Runs operations on an httpx.Client."""

    def __init__(
        self, http: httpx.Client, policy: RetryPolicy, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.http = http
        self._policy = policy
        self._sleep = sleep

    def run(self, operation: Operation[T]) -> T:
        """The operation's answer, read."""
        return operation.read(self._follow(exchange(operation, self._policy)).content)

    def open(self, operation: Operation[Any]) -> httpx.Response:
        """The response of a stream that has begun; to be closed by the caller."""
        return self._follow(exchange(operation, self._policy, is_stream=True))

    def sleep(self, seconds: float) -> None:
        self._sleep(seconds)

    def _follow(self, course: Course) -> httpx.Response:
        outcome: httpx.Response | httpx.RequestError | None = None
        while True:
            try:
                step = course.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Send):
                outcome = self._send(step)
            else:
                self._sleep(step.seconds)
                outcome = None

    def _send(self, step: Send) -> httpx.Response | httpx.RequestError:
        with ExitStack() as files:
            request = self.http.build_request(**step.operation.arguments(files))
            try:
                response = self.http.send(request, stream=step.is_stream)
                if step.is_stream and not response.is_success:
                    response.read()
            except httpx.RequestError as error:
                return error
            return response


class Stream(Generic[Item, Result]):
    """A running answer: iterate for its pieces, then read `result`.

    Use it with `with`, so that the server stops working when you leave early; a loop that runs to the end closes
    it by itself. The request goes out when the block or the loop begins.
    """

    def __init__(self, driver: Driver, operation: Operation[Any], assembler: Assembler[Item, Result]) -> None:
        self._driver = driver
        self._operation = operation
        self._assembler = assembler
        self._response: httpx.Response | None = None
        self._is_closed = False
        self._items = self._read()

    def __enter__(self) -> "Stream[Item, Result]":
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return next(self._items)

    @property
    def result(self) -> Result:
        """The whole answer, once the loop is over.

        Raises:
            IncompleteAnswerError: the stream was left, or ended, before that.
        """
        return self._assembler.result()

    def close(self) -> None:
        """Hang up; the server stops working on it. Calling it again does nothing."""
        self._is_closed = True
        if self._response is not None:
            self._response.close()

    def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = self._driver.open(self._operation)
        return self._response

    def _read(self) -> Iterator[Item]:
        response = self._open()
        decoder = EventDecoder()
        try:
            for chunk in response.iter_bytes():
                for event in decoder.feed(chunk):
                    if self._is_closed:
                        return
                    item = self._assembler.add(event)
                    if item is not None:
                        yield item
        except httpx.TimeoutException as error:
            raise APITimeoutError("the stream stalled") from error
        except httpx.RequestError as error:
            if self._is_closed:
                return
            raise IncompleteAnswerError(f"the stream was cut off: {error or type(error).__name__}") from error
        finally:
            response.close()
        if not self._is_closed:
            self._assembler.result()  # raises if the last event is missing
