"""`/admin/jobs`: long work on adapters."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.responses import Response

from server.api.dependencies import Jobs
from server.api.sse import EventStream, event
from server.jobs.queue import JobQueue
from server.schemas.jobs import JobInfo, JobList, JobRequest

__all__ = ["router"]

router = APIRouter(prefix="/admin/jobs", tags=["jobs"])

POLL_S = 0.1


@router.post("", status_code=202)
async def submit(body: Annotated[JobRequest, Body()], jobs: Jobs) -> JobInfo:
    """Queue a job. 202 means that it is safe on disk; what comes of it appears at once or not at all."""
    options = body.model_dump(exclude={"kind"})
    return JobInfo.of(await asyncio.to_thread(jobs.submit, body.kind, options))


@router.get("")
async def list_jobs(jobs: Jobs) -> JobList:
    """All jobs, newest first."""
    return JobList(jobs=[JobInfo.of(view) for view in jobs.views()])


@router.get("/{job_id}")
async def show(job_id: str, jobs: Jobs) -> JobInfo:
    """One job."""
    return JobInfo.of(jobs.get(job_id))


@router.post("/{job_id}/cancel", status_code=202)
async def cancel(job_id: str, jobs: Jobs) -> JobInfo:
    """End a job that has not ended. One whose result is being published may still succeed."""
    return JobInfo.of(await asyncio.to_thread(jobs.cancel, job_id))


@router.post("/{job_id}/retry", status_code=202)
async def retry(job_id: str, jobs: Jobs) -> JobInfo:
    """Queue a job again that failed, was cancelled or interrupted, with the inputs that it had."""
    return JobInfo.of(await asyncio.to_thread(jobs.retry, job_id))


@router.get("/{job_id}/events", response_class=Response)
async def events(job_id: str, jobs: Jobs) -> Response:
    """The job as server-sent events: now, at every change, and when it has ended, which ends the stream."""
    jobs.get(job_id)
    return EventStream(_events(jobs, job_id), {}, on_close=lambda: None)


async def _events(jobs: JobQueue, job_id: str) -> AsyncIterator[str]:
    last = None
    while True:
        view = jobs.get(job_id)
        if view.record != last:
            last = view.record
            yield event(JobInfo.of(view).model_dump())
        if last.state.is_final:
            return
        await asyncio.sleep(POLL_S)
