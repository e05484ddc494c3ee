"""Limiter: how much each key may ask for. On the event loop only, and in memory: a restart begins anew."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.auth.caller import Caller
from server.errors import OverloadedError

__all__ = ["Limiter"]

MINUTE_S = 60.0


@dataclass(slots=True)
class _Bucket:
    """Refills evenly up to a minute's worth. It may go into debt, and is empty until that is paid off."""

    per_minute: int
    level: float
    seen_s: float

    def refill(self, now_s: float) -> None:
        gained = (now_s - self.seen_s) * self.per_minute / MINUTE_S
        self.level = min(float(self.per_minute), self.level + gained)
        self.seen_s = now_s

    def wait_s(self, needed: float) -> float:
        """Seconds until the level is at least `needed`."""
        return max(0.0, (needed - self.level) * MINUTE_S / self.per_minute)


class Limiter:
    """Counts requests and tokens by key. Keys without limits cost nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        self._num_running: dict[str, int] = {}

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """Count a request as running while the block runs.

        Raises:
            OverloadedError: code `rate_limited` or `concurrency_limited`, with the time until it may come again.
        """
        limits, key_id = caller.limits, caller.key_id
        num_running = self._num_running.get(key_id, 0)
        if limits.max_concurrent is not None and num_running >= limits.max_concurrent:
            limit = f"this key may run {limits.max_concurrent} requests at once"
            raise _refusal(limit, 1.0, code="concurrency_limited")
        tokens = self._bucket(self._tokens, key_id, limits.tokens_per_minute)
        if tokens is not None and tokens.level <= 0:
            limit = f"this key may use {limits.tokens_per_minute} tokens a minute"
            raise _refusal(limit, tokens.wait_s(1.0), code="rate_limited")
        requests = self._bucket(self._requests, key_id, limits.requests_per_minute)
        if requests is not None:
            if requests.level < 1:
                limit = f"this key may send {limits.requests_per_minute} requests a minute"
                raise _refusal(limit, requests.wait_s(1.0), code="rate_limited")
            requests.level -= 1
        self._num_running[key_id] = num_running + 1
        try:
            yield
        finally:
            self._num_running[key_id] -= 1
            if not self._num_running[key_id]:
                del self._num_running[key_id]

    def charge(self, caller: Caller, num_tokens: int) -> None:
        """Take tokens that were used."""
        tokens = self._bucket(self._tokens, caller.key_id, caller.limits.tokens_per_minute)
        if tokens is not None:
            tokens.level -= num_tokens

    def _bucket(self, buckets: dict[str, _Bucket], key_id: str, per_minute: int | None) -> _Bucket | None:
        """The key's bucket, refilled; None without a limit."""
        if per_minute is None:
            return None
        now_s = self._clock()
        bucket = buckets.get(key_id)
        if bucket is None:
            bucket = buckets[key_id] = _Bucket(per_minute, float(per_minute), now_s)
        bucket.per_minute = per_minute  # the key may have been changed
        bucket.refill(now_s)
        return bucket


def _refusal(message: str, wait_s: float, *, code: str) -> OverloadedError:
    error = OverloadedError(message, code=code)
    error.retry_after_s = max(1, math.ceil(wait_s))
    return error
