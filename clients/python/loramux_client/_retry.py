"""When to try again, and after how long: decided here, waited for elsewhere.

A call that changes nothing on the server may be repeated whatever became of it. One that does change something is
repeated only if it certainly was not run: no connection came about, or the server says that it refused it.
"""

import random
from dataclasses import dataclass

import httpx

from loramux_client.errors import APIStatusError

__all__ = ["RetryPolicy"]

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
NEVER_RUN_CODES = frozenset({"draining"})  # of 503; a 429 always stands for "not run"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient a client is.

    Attributes:
        max_retries: further attempts after the first; 0 for none.
        first_wait_s: doubled with each attempt up to `max_wait_s`; half of it is jitter, so that the clients of a
            server that was away do not come back all at once.
        max_retry_after_s: if the server asks to wait longer than that, its error is raised at once.
    """

    max_retries: int = 3
    first_wait_s: float = 0.5
    max_wait_s: float = 8.0
    max_retry_after_s: float = 60.0

    def wait_s(self, attempt: int, failure: Exception, *, changes_nothing: bool) -> float | None:
        """Seconds to wait after attempt number `attempt`, from 0, failed; None to give up."""
        if attempt >= self.max_retries or not _may_repeat(failure, changes_nothing):
            return None
        wait_s = min(self.max_wait_s, self.first_wait_s * 2.0**attempt)
        wait_s *= random.uniform(0.5, 1.0)
        asked_s = getattr(failure, "retry_after_s", None)
        if asked_s is None:
            return wait_s
        if asked_s > self.max_retry_after_s:
            return None
        return float(asked_s) + wait_s * 0.5


def _may_repeat(failure: Exception, changes_nothing: bool) -> bool:
    if isinstance(failure, APIStatusError):
        if failure.status == 503:
            return changes_nothing or failure.code in NEVER_RUN_CODES
        return failure.status == 429
    if isinstance(failure, NEVER_SENT):
        return True
    # A slow answer would be as slow again: only a cut connection is worth another attempt.
    return changes_nothing and isinstance(failure, httpx.NetworkError | httpx.RemoteProtocolError)
