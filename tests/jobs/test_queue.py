"""The queue: one job at a time, in order, whatever becomes of each."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConflictError, GenerationError, InvalidRequestError, NotFoundError, OverloadedError
from server.jobs.process import JobCancelledError, WorkProcess
from server.jobs.queue import MAX_QUEUED, JobQueue
from server.jobs.record import JobRecord, JobState, decode_job, encode_job
from server.jobs.store import JobStore

TIMEOUT_S = 10.0


class FakeProcess(WorkProcess):
    def __init__(self) -> None:
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()


class Handler:
    """Does what the job's options say; `gate` can hold all work up."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.done: list[Any] = []
        self.num_attempts = 0

    def resolve(self, kind: str, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if kind == "impossible":
            raise InvalidRequestError("no")
        return [{"name": "a", "generation": 1, "digest": "0"}]

    def run(self, record: JobRecord, process: FakeProcess, report: Callable[[str, float], None]) -> dict[str, Any]:
        self.num_attempts += 1
        report("half", 0.5)
        while not self.gate.wait(0.005):
            if process.is_cancelled.is_set():
                raise JobCancelledError
        if process.is_cancelled.is_set():
            raise JobCancelledError
        what = record.options.get("do")
        if what == "fail" and record.attempt == 1:
            raise InvalidRequestError("refused", code="not_supported")
        if what == "crash":
            raise RuntimeError("a bug")
        self.done.append(record.options.get("n"))
        return {"n": record.options.get("n")}


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def queue(tmp_path: Path, handler: Handler) -> Iterator[JobQueue]:
    queue = make(tmp_path, handler)
    queue.start()
    yield queue
    queue.close()
    queue.close()


def make(root: Path, handler: Handler) -> JobQueue:
    queue = JobQueue(JobStore(root / "jobs"), handler, make_process=FakeProcess)
    queue.open()
    return queue


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def end(queue: JobQueue, job_id: str) -> JobRecord:
    until(lambda: queue.get(job_id).record.state.is_final)
    return queue.get(job_id).record


def test_jobs_run_in_order_and_are_kept(queue: JobQueue, handler: Handler, tmp_path: Path) -> None:
    ids = [queue.submit("x", {"n": n}).record.job_id for n in range(5)]
    records = [end(queue, job_id) for job_id in ids]
    assert handler.done == [0, 1, 2, 3, 4]
    assert all(r.state is JobState.SUCCEEDED and r.fraction == 1 for r in records)
    assert records[3].result == {"n": 3}
    assert records[3].created_at < records[3].started_at < records[3].finished_at
    assert [view.record.job_id for view in queue.views()] == ids[::-1]
    again = make(tmp_path, handler)
    assert [again.get(job_id).record for job_id in ids] == records


def test_what_cannot_be_done_is_refused_at_once(queue: JobQueue) -> None:
    with pytest.raises(InvalidRequestError):
        queue.submit("impossible", {})
    assert not queue.views()
    for call in (queue.get, queue.cancel, queue.retry):
        with pytest.raises(NotFoundError):
            call("0" * 32)


@pytest.mark.parametrize(("what", "code"), [("fail", "not_supported"), ("crash", "job_failed")])
def test_a_job_that_fails_says_why_and_can_be_retried(queue: JobQueue, what: str, code: str) -> None:
    job_id = queue.submit("x", {"do": what}).record.job_id
    record = end(queue, job_id)
    assert (record.state, record.error["code"]) == (JobState.FAILED, code)
    queue.retry(job_id)
    again = end(queue, job_id)
    assert again.attempt == 2
    assert (again.state is JobState.SUCCEEDED) == (what == "fail")
    if what == "fail":
        with pytest.raises(ConflictError):
            queue.retry(job_id)


def test_progress_and_the_time_that_is_left(queue: JobQueue, handler: Handler) -> None:
    handler.gate.clear()
    job_id = queue.submit("x", {}).record.job_id
    until(lambda: queue.get(job_id).record.stage == "half")
    view = queue.get(job_id)
    assert (view.record.state, view.record.fraction) == (JobState.RUNNING, 0.5)
    assert view.eta_s is not None
    assert 0 <= view.eta_s < TIMEOUT_S
    handler.gate.set()
    end(queue, job_id)
    assert queue.get(job_id).eta_s is None


def test_cancelling_what_runs_and_what_waits(queue: JobQueue, handler: Handler) -> None:
    handler.gate.clear()
    running, waiting, last = (queue.submit("x", {"n": n}).record.job_id for n in range(3))
    until(lambda: queue.get(running).record.state is JobState.RUNNING)
    assert queue.cancel(waiting).record.state is JobState.CANCELLED
    queue.cancel(running)
    assert end(queue, running).state is JobState.CANCELLED
    with pytest.raises(ConflictError):
        queue.cancel(running)
    handler.gate.set()
    assert end(queue, last).state is JobState.SUCCEEDED
    assert handler.done == [2]
    queue.retry(waiting)
    assert end(queue, waiting).state is JobState.SUCCEEDED


def test_a_stop_interrupts_what_runs_and_what_waits(queue: JobQueue, handler: Handler, tmp_path: Path) -> None:
    handler.gate.clear()
    running, waiting = (queue.submit("x", {"n": n}).record.job_id for n in range(2))
    until(lambda: queue.get(running).record.state is JobState.RUNNING)
    queue.close()
    again = make(tmp_path, handler)
    assert {again.get(job_id).record.state for job_id in (running, waiting)} == {JobState.INTERRUPTED}
    handler.gate.set()
    again.start()
    again.retry(running)
    assert end(again, running).state is JobState.SUCCEEDED
    again.close()


def test_the_queue_is_bounded(queue: JobQueue, handler: Handler) -> None:
    handler.gate.clear()
    first = queue.submit("x", {}).record.job_id
    until(lambda: queue.get(first).record.state is JobState.RUNNING)
    for _ in range(MAX_QUEUED):
        queue.submit("x", {})
    with pytest.raises(OverloadedError) as caught:
        queue.submit("x", {})
    assert caught.value.code == "jobs_busy"


def test_a_flip_of_any_bit_of_a_record_is_seen() -> None:
    record = JobRecord("0" * 32, "mix", {"name": "a"}, ({"name": "b"},), created_at="2026-01-01T00:00:00+00:00")
    data = encode_job(record)
    assert decode_job(data) == record
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert decode_job(bytes(damaged)) == record
        except ValueError:
            continue


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"[" * 100_000, b"\xff"])
def test_a_damaged_record_stops_nothing(tmp_path: Path, handler: Handler, contents: bytes) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / ("1" * 32 + ".json")).write_bytes(contents)
    (tmp_path / "jobs" / ("1" * 32 + ".half")).write_bytes(contents)
    queue = make(tmp_path, handler)
    assert not queue.views()
    assert [path.suffix for path in (tmp_path / "jobs").iterdir()] == [".json"]


# Processes


def python(code: str) -> WorkProcess:

    return WorkProcess(
        (sys.executable, "-c", f"import json, os, sys, time\ntask = json.loads(sys.stdin.readline())\n{code}")
    )


def test_a_process_reports_and_answers() -> None:
    reports: list[tuple[str, float]] = []
    process = python(
        'print(json.dumps({"stage": "s", "fraction": 0.5}), flush=True)\n'
        'print(json.dumps({"result": task}), flush=True)'
    )
    assert process.run({"a": 1}, lambda *said: reports.append(said)) == {"a": 1}
    assert reports == [("s", 0.5)]


@pytest.mark.parametrize("code", ["os._exit(3)", "os.kill(os.getpid(), 9)", "print('nonsense')", ""])
def test_a_process_that_dies_is_an_error(code: str) -> None:
    with pytest.raises(GenerationError) as caught:
        python(code).run({}, lambda *_: None)
    assert caught.value.code == "job_crashed"


def test_a_process_is_killed_when_it_is_cancelled() -> None:
    process = python('print(json.dumps({"stage": "s", "fraction": 0}), flush=True); time.sleep(100)')
    with pytest.raises(JobCancelledError):
        process.run({}, lambda *_: process.cancel())
    with pytest.raises(JobCancelledError):
        process.run({}, lambda *_: None)


def test_the_worker_goes_with_its_parent() -> None:
    """Its input ends when the parent does, however that ends."""
    import sys

    child = subprocess.Popen(
        [sys.executable, "-m", "server.jobs.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        assert child.stdin is not None
        child.stdin.write(json.dumps({"kind": "none"}).encode() + b"\n")
        child.stdin.close()
        child.stdin = None
        assert child.wait(TIMEOUT_S * 6) != 0
