"""The driver: does what the core says, and waits for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Generic, TypeVar

import httpx

from loramux_client._generation import Assembler
from loramux_client._operation import Course, Operation, Send, exchange
from loramux_client._retry import RetryPolicy
from loramux_client._sse import EventDecoder
from loramux_client.errors import APITimeoutError, IncompleteAnswerError

__all__ = ["AsyncDriver", "AsyncStream"]

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")


class AsyncDriver:
    """Runs operations on an httpx.AsyncClient."""

    def __init__(
        self, http: httpx.AsyncClient, policy: RetryPolicy, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.http = http
        self._policy = policy
        self._sleep = sleep

    async def run(self, operation: Operation[T]) -> T:
        """The operation's answer, read."""
        return operation.read((await self._follow(exchange(operation, self._policy))).content)

    async def open(self, operation: Operation[Any]) -> httpx.Response:
        """The response of a stream that has begun; to be closed by the caller."""
        return await self._follow(exchange(operation, self._policy, is_stream=True))

    async def sleep(self, seconds: float) -> None:
        await self._sleep(seconds)

    async def _follow(self, course: Course) -> httpx.Response:
        outcome: httpx.Response | httpx.RequestError | None = None
        while True:
            try:
                step = course.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Send):
                outcome = await self._send(step)
            else:
                await self._sleep(step.seconds)
                outcome = None

    async def _send(self, step: Send) -> httpx.Response | httpx.RequestError:
        with ExitStack() as files:
            request = self.http.build_request(**step.operation.arguments(files))
            try:
                response = await self.http.send(request, stream=step.is_stream)
                if step.is_stream and not response.is_success:
                    await response.aread()
            except httpx.RequestError as error:
                return error
            return response


class AsyncStream(Generic[Item, Result]):
    """A running answer: iterate for its pieces, then read `result`.

    Use it with `async with`, so that the server stops working when you leave early; a loop that runs to the end closes
    it by itself. The request goes out when the block or the loop begins.
    """

    def __init__(self, driver: AsyncDriver, operation: Operation[Any], assembler: Assembler[Item, Result]) -> None:
        self._driver = driver
        self._operation = operation
        self._assembler = assembler
        self._response: httpx.Response | None = None
        self._is_closed = False
        self._items = self._read()

    async def __aenter__(self) -> "AsyncStream[Item, Result]":
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        return await anext(self._items)

    @property
    def result(self) -> Result:
        """The whole answer, once the loop is over.

        Raises:
            IncompleteAnswerError: the stream was left, or ended, before that.
        """
        return self._assembler.result()

    async def close(self) -> None:
        """Hang up; the server stops working on it. Calling it again does nothing."""
        self._is_closed = True
        if self._response is not None:
            await self._response.aclose()

    async def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = await self._driver.open(self._operation)
        return self._response

    async def _read(self) -> AsyncIterator[Item]:
        response = await self._open()
        decoder = EventDecoder()
        try:
            async for chunk in response.aiter_bytes():
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
            await response.aclose()
        if not self._is_closed:
            self._assembler.result()  # raises if the last event is missing
