"""Noticing that a client has gone while its plain answer is being made."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

__all__ = ["CLIENT_CLOSED_REQUEST", "ClientGoneError", "or_disconnect"]

# nginx's number for "the client went first"; nobody reads the answer, but logs may.
CLIENT_CLOSED_REQUEST = 499

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


async def or_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or cancel it as soon as the client disconnects.

    Raises:
        ClientGoneError: the client went first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
