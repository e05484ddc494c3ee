"""A few threads that do the most urgent piece of work first."""

import itertools
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable

__all__ = ["PriorityThreads"]

logger = logging.getLogger(__name__)

# The engine's step is as fast as the slowest of its threads, which need every core: who works beside them gives way.
NICENESS = 10


class PriorityThreads:
    """Runs pieces of work, those with the lowest number first and equal ones in order. Threads start with the first.
    They are of lower priority than others where the system has such.

    Args:
        num_threads: pieces that may run at once.
        name: prefix of the threads' names.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._work: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def submit(self, priority: int, work: Callable[[], None]) -> None:
        """Queue a piece of work, which must not raise; after `close` it is dropped."""
        with self._lock:
            if self._is_closed:
                return
            if len(self._threads) < self._num_threads:
                name = f"{self._name}-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
        self._work.put((priority, next(self._order), work))

    def close(self) -> None:
        """Finish what is under way, drop what is queued. Calling it again does nothing."""
        with self._lock:
            self._is_closed = True
        for _ in self._threads:
            self._work.put((-1, next(self._order), lambda: None))
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while not self._is_closed:
            _, _, work = self._work.get()
            if self._is_closed:
                return
            try:
                work()
            except Exception:
                logger.exception("work on an adapter failed")
