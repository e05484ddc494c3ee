"""How far something is, for functions that want to know and for people at a terminal."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from loramux_client.models import Job

__all__ = ["JobBar", "JobProgress", "Progress", "ProgressBar"]

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all, in bytes."""

JobProgress = Callable[[Job], None]
"""Called with a job as it is now."""

BAR_CHARACTERS = 30
REDRAW_S = 0.1
CLEAR_LINE = "\r\x1b[K"


class _Bar:
    """Draws on a terminal, by default on standard error; elsewhere it stays silent."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._drawn_s = -REDRAW_S

    def draw(self, label: str, share: float, more: str, *, is_last: bool) -> None:
        """At most ten times a second; the last time with a line end."""
        now = time.monotonic()
        if not self._stream.isatty() or (now - self._drawn_s < REDRAW_S and not is_last):
            return
        self._drawn_s = now
        filled = round(share * BAR_CHARACTERS)
        bar = "#" * filled + "." * (BAR_CHARACTERS - filled)
        self._stream.write(f"{CLEAR_LINE}{label} [{bar}] {share:4.0%} {more}" + "\n" * is_last)
        self._stream.flush()


class ProgressBar(_Bar):
    """Of an upload; a `Progress`."""

    def __call__(self, done: int, total: int) -> None:
        share = min(done / total, 1.0) if total else 1.0
        self.draw("upload", share, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", is_last=done >= total)


class JobBar(_Bar):
    """Of a job; a `JobProgress`."""

    def __call__(self, job: Job) -> None:
        left = "" if job.eta_s is None or job.is_over else f", {job.eta_s:.0f} s left"
        self.draw(job.kind, job.fraction, f"{job.state} {job.stage}".strip() + left, is_last=job.is_over)
