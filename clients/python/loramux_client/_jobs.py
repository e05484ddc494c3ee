"""The operations on jobs, without input or output of their own."""

import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from loramux_client._operation import Operation, reader
from loramux_client.errors import APITimeoutError, JobFailedError
from loramux_client.models import Job

__all__ = ["Pace", "create_job", "get_job", "list_jobs", "post_job_action", "succeeded"]

FIRST_POLL_S = 0.2
MAX_POLL_S = 2.0


class JobList(BaseModel):
    """All jobs, newest first."""

    jobs: list[Job]


def create_job(kind: str, options: Mapping[str, Any]) -> Operation[Job]:
    """A new job of a kind."""
    body = {"kind": kind} | {name: value for name, value in options.items() if value is not None}
    return Operation(method="POST", path="/admin/jobs", json=body, read=reader(Job))


def list_jobs() -> Operation[list[Job]]:
    """All jobs."""
    read = reader(JobList)
    return Operation(method="GET", path="/admin/jobs", read=lambda content: read(content).jobs, changes_nothing=True)


def get_job(job_id: str) -> Operation[Job]:
    """A job as it is now."""
    return Operation(method="GET", path=f"/admin/jobs/{quote(job_id, safe='')}", read=reader(Job), changes_nothing=True)


def post_job_action(job_id: str, action: str) -> Operation[Job]:
    """`cancel` or `retry`."""
    return Operation(method="POST", path=f"/admin/jobs/{quote(job_id, safe='')}/{action}", read=reader(Job))


def succeeded(job: Job) -> Job:
    """The same job; JobFailedError if it ended in another way."""
    if job.state != "succeeded":
        message = job.error.get("message", "")
        raise JobFailedError(
            f"job {job.job_id} ({job.kind}) {job.state}" + (f": {message}" if message else ""),
            code=job.error.get("code", ""),
            report=job.error.get("report", ()),
        )
    return job


class Pace:
    """How long to wait between two looks at a job: longer and longer.

    Args:
        timeout_s: how long to wait in all; None for as long as it takes.
    """

    def __init__(self, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._poll_s = FIRST_POLL_S

    def wait_s(self) -> float:
        """Until the next look.

        Raises:
            APITimeoutError: the time is over; the job goes on.
        """
        wait_s = self._poll_s
        self._poll_s = min(self._poll_s * 1.5, MAX_POLL_S)
        if self._deadline_s is None:
            return wait_s
        left_s = self._deadline_s - self._clock()
        if left_s <= 0:
            raise APITimeoutError("the job has not ended yet")
        return min(wait_s, left_s)
