"""Drain: how a server stops without cutting anybody off.

The first signal makes `/ready` fail and refuses new work; what runs goes on, up to a deadline. Then the engine stops,
which ends what is left with an error that says so. A second signal brings the deadline forward.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

__all__ = ["Drain", "DrainingServer"]

# From the deadline on: for the last events to reach the clients.
LAST_WORDS_S = 3.0


class Drain:
    """Whether the server is going away, and how much still runs. Only used on the event loop's thread."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_running = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as running while the block runs."""
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1


class DrainingServer(uvicorn.Server):
    """A uvicorn that drains on SIGTERM or SIGINT and then ends with status 0.

    Args:
        timeout_s: how long running requests may take from the first signal on.
        stop_work: ends all that still runs then; called on a thread of its own.
    """

    def __init__(
        self, config: uvicorn.Config, drain: Drain, *, timeout_s: float, stop_work: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._timeout_s = timeout_s
        self._stop_work = stop_work
        self._deadline_s = float("inf")
        self._stopping: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Called between two instructions of the main thread, so it only leaves word."""
        now = time.monotonic()
        self._deadline_s = now if self._drain.is_draining else now + self._timeout_s
        self._drain.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn's heartbeat, ten times a second; True ends the server."""
        if self._drain.is_draining:
            late_s = time.monotonic() - self._deadline_s
            if late_s >= 0 and self._stopping is None:
                self._stopping = asyncio.create_task(asyncio.to_thread(self._stop_work))
            if not self._drain.num_running or late_s > LAST_WORDS_S:
                self.should_exit = True
        return await super().on_tick(counter)
