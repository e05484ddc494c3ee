"""JobQueue: jobs one after the other, on a thread that only waits for their processes."""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from server.errors import ConflictError, NotFoundError, OverloadedError, ServerError
from server.jobs.process import JobCancelledError, WorkProcess
from server.jobs.record import JobRecord, JobState
from server.jobs.store import JobStore

__all__ = ["JobHandler", "JobQueue", "JobView", "no_such_job"]

logger = logging.getLogger(__name__)

MAX_QUEUED = 64
MAX_QUEUED_OF_TENANT = 16
MAX_KEPT = 1000  # finished jobs; the oldest are forgotten


ADMINISTRATOR: Mapping[str, Any] = {}


class JobHandler(Protocol):
    """What jobs of all kinds have in common, seen from the queue."""

    def resolve(self, kind: str, options: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The adapters that a job will read, as they are now.

        Raises:
            ServerError: the job cannot be done.
        """

    def run(self, record: JobRecord, process: WorkProcess, report: Callable[[str, float], None]) -> dict[str, Any]:
        """Do a job and publish what comes of it, in one step at the end.

        Raises:
            ServerError, JobCancelledError: it was not done, and nothing was published.
        """


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is at this moment.

    Attributes:
        eta_s: seconds that are left if it goes on as it went so far; None if nobody knows.
    """

    record: JobRecord
    eta_s: float | None


class JobQueue:
    """Jobs in order of arrival, one at a time. Thread-safe.

    Args:
        make_process: gives each attempt its process.
    """

    def __init__(
        self, store: JobStore, handler: JobHandler, make_process: Callable[[], WorkProcess] = WorkProcess
    ) -> None:
        self._store = store
        self._handler = handler
        self._make_process = make_process
        self._lock = threading.Lock()  # around the books; never held while files are written
        self._writing = threading.Lock()  # one change of a job's state at a time
        self._has_work = threading.Condition(self._lock)
        self._jobs: dict[str, JobRecord] = {}
        self._queue: deque[str] = deque()
        self._process: WorkProcess | None = None  # of the job that runs
        self._running_since_s = 0.0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="loramux-jobs", daemon=True)

    def open(self) -> None:
        """Read the jobs. Those that a crash or a stop cut short are listed as interrupted."""
        for record in self._store.open():
            self._jobs[record.job_id] = record
            if not record.state.is_final:
                self._keep(replace(record, state=JobState.INTERRUPTED, finished_at=_now()))

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Stop; the job that runs is killed, and interrupted. Calling it again does nothing."""
        with self._lock:
            self._is_closing = True
            process = self._process
            self._has_work.notify_all()
        if process is not None:
            process.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, kind: str, options: Mapping[str, Any], owner: Mapping[str, Any] = ADMINISTRATOR) -> JobView:
        """Queue a job, durably; `owner` as in its record.

        Raises:
            ServerError: it cannot be done, or the queue is full.
        """
        inputs = tuple(self._handler.resolve(kind, options))
        record = JobRecord(uuid.uuid4().hex, kind, dict(options), inputs, created_at=_now(), owner=dict(owner))
        with self._writing:
            self._enqueue(record)
            self._forget_oldest()
        return self._view(record)

    def retry(self, job_id: str) -> JobView:
        """Queue a job again that did not succeed, with the inputs that it had.

        Raises:
            NotFoundError: there is no such job.
            ConflictError: it is on its way, or succeeded.
        """
        with self._writing:
            record = self._find(job_id)
            if not record.state.is_final or record.state is JobState.SUCCEEDED:
                raise ConflictError(f"the job is {record.state.value}", code="job_state_conflict")
            record = JobRecord(
                record.job_id,
                record.kind,
                record.options,
                record.inputs,
                created_at=record.created_at,
                attempt=record.attempt + 1,
                owner=record.owner,
            )
            self._enqueue(record)
        return self._view(record)

    def cancel(self, job_id: str) -> JobView:
        """End a job. One whose result is being published may still succeed.

        Raises:
            NotFoundError: there is no such job.
            ConflictError: it has ended.
        """
        with self._writing:
            record = self._find(job_id)
            if record.state.is_final:
                raise ConflictError(f"the job is {record.state.value}", code="job_state_conflict")
            if record.state is JobState.QUEUED:
                record = replace(record, state=JobState.CANCELLED, finished_at=_now())
                self._keep(record)
                with self._lock:
                    self._queue.remove(job_id)
            else:
                assert self._process is not None
                self._process.cancel()
        return self._view(record)

    def get(self, job_id: str) -> JobView:
        """One job; NotFoundError if there is none."""
        return self._view(self._find(job_id))

    def views(self) -> list[JobView]:
        """All jobs, newest first."""
        with self._lock:
            records = list(self._jobs.values())
        return [self._view(record) for record in sorted(records, key=lambda one: one.created_at, reverse=True)]

    def peek(self, job_id: str) -> JobView | None:
        """One job, if there is one."""
        with self._lock:
            record = self._jobs.get(job_id)
        return None if record is None else self._view(record)

    def _find(self, job_id: str) -> JobRecord:
        with self._lock:
            record = self._jobs.get(job_id)
        if record is None:
            raise no_such_job()
        return record

    def _view(self, record: JobRecord) -> JobView:
        is_under_way = record.state is JobState.RUNNING and record.fraction > 0
        elapsed_s = time.monotonic() - self._running_since_s
        return JobView(record, elapsed_s * (1 / record.fraction - 1) if is_under_way else None)

    def _enqueue(self, record: JobRecord) -> None:
        with self._lock:
            if len(self._queue) >= MAX_QUEUED:
                raise OverloadedError(f"{len(self._queue)} jobs are queued already", code="jobs_busy")
            tenant = record.owner.get("tenant")
            num_own = sum(self._jobs[job_id].owner.get("tenant") == tenant for job_id in self._queue)
            if tenant is not None and num_own >= MAX_QUEUED_OF_TENANT:
                raise OverloadedError(f"{num_own} of your jobs are queued already", code="jobs_busy")
        self._keep(record)
        with self._lock:
            self._queue.append(record.job_id)
            self._has_work.notify()

    def _keep(self, record: JobRecord) -> None:
        """First on the disk, then in the books."""
        self._store.write(record)
        with self._lock:
            self._jobs[record.job_id] = record

    def _forget_oldest(self) -> None:
        with self._lock:
            ended = sorted((r for r in self._jobs.values() if r.state.is_final), key=lambda one: one.created_at)
            forgotten = ended[: max(len(ended) - MAX_KEPT, 0)]
            for record in forgotten:
                del self._jobs[record.job_id]
        for record in forgotten:
            self._store.remove(record.job_id)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._is_closing:
                    self._has_work.wait()
                if self._is_closing:
                    return
            try:
                self._run_next()
            except ServerError as error:  # the disk: the job stays as it is, and is interrupted at the next start
                logger.error("a job's state cannot be kept: %s", error.message)

    def _run_next(self) -> None:
        with self._writing:
            with self._lock:
                if not self._queue:
                    return
                record = self._jobs[self._queue.popleft()]
                self._process = process = self._make_process()
                if self._is_closing:
                    process.cancel()
            record = replace(record, state=JobState.RUNNING, started_at=_now(), stage="starting")
            self._keep(record)
            self._running_since_s = time.monotonic()

        def report(stage: str, fraction: float) -> None:
            nonlocal record
            with self._lock:
                record = self._jobs[record.job_id] = replace(record, stage=stage, fraction=min(max(fraction, 0.0), 1.0))

        ended = self._attempt(record, process, report)
        with self._writing:
            self._keep(replace(record, finished_at=_now(), **ended))
            with self._lock:
                self._process = None

    def _attempt(self, record: JobRecord, process: WorkProcess, report: Callable[[str, float], None]) -> dict[str, Any]:
        """Do a job; returns what of its record is other than before."""
        try:
            result = self._handler.run(record, process, report)
        except JobCancelledError:
            return {"state": JobState.INTERRUPTED if self._is_closing else JobState.CANCELLED}
        except ServerError as error:
            return {"state": JobState.FAILED, "error": {**error.details, "code": error.code, "message": error.message}}
        except Exception as error:
            logger.exception("job %s (%s) failed", record.job_id, record.kind)
            message = f"the job failed: {type(error).__name__}"
            return {"state": JobState.FAILED, "error": {"code": "job_failed", "message": message}}
        return {"state": JobState.SUCCEEDED, "result": result, "fraction": 1.0, "stage": "done"}


def no_such_job() -> NotFoundError:
    """What is answered where there is no job, or none that the caller may know."""
    return NotFoundError("there is no such job", code="job_not_found", param="job_id")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
