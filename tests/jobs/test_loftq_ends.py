"""LoftQ and compensation that end before their end: cancelled, or with a killed server. By their real processes.

Run as a program it is that server: `python -m tests.jobs.test_loftq_ends ROOT BASE KIND` says when work is under way
and then waits to be killed.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.adapters.store import AdapterStore
from server.jobs.process import WorkProcess
from server.jobs.queue import JobQueue
from server.jobs.record import JobState
from tests.jobs.churn import ended, opened
from tests.tiny_folder import write_tiny_folder

REPOSITORY = Path(__file__).resolve().parents[2]
UNDER_WAY = {"loftq": "replacing", "loftq-compensation": "compensating"}
OPTIONS: dict[str, Any] = {"name": "made", "rank": 4, "prompts": ["The quick brown fox."], "judge": True}
TIMEOUT_S = 300


class Held(WorkProcess):
    """Goes on until a module is done, says so, and waits."""

    def __init__(self, stage: str, say: Callable[[int], None], go_on: threading.Event) -> None:
        super().__init__()
        self._stage, self._say, self._go_on = stage, say, go_on

    def run(self, task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
        def held(stage: str, fraction: float) -> None:
            report(stage, fraction)
            if stage == self._stage and not self._go_on.is_set():
                assert self._process is not None
                self._say(self._process.pid)
                self._go_on.wait()

        return super().run(task, held)


def submitted(queue: JobQueue, kind: str) -> str:
    options = {key: value for key, value in OPTIONS.items() if kind == "loftq" or key != "judge"}
    return queue.submit(kind, options).record.job_id


def check_nothing_is_left(store: AdapterStore, root: Path) -> None:
    assert store.records() == []
    assert list((root / "staging").iterdir()) == []
    store.check_integrity()


def check_retry(store: AdapterStore, queue: JobQueue, job_id: str) -> None:
    queue.retry(job_id)
    record = ended(queue, job_id).record
    assert (record.state, record.attempt) == (JobState.SUCCEEDED, 2), record.error
    assert record.result["adapter"]["digest"] == store.get("made").digest
    queue.close()
    store.check_integrity()
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNDER_WAY)
def test_cancelled_while_it_works(seed: int, tmp_path: Path, kind: str) -> None:
    write_tiny_folder(tmp_path / "base", "llama", seed)
    is_under_way, go_on = threading.Event(), threading.Event()
    root = tmp_path / "store"
    store, queue = opened(root, lambda: Held(UNDER_WAY[kind], lambda pid: is_under_way.set(), go_on), tmp_path / "base")
    queue.start()
    job_id = submitted(queue, kind)
    assert is_under_way.wait(TIMEOUT_S)
    assert queue.get(job_id).record.stage == UNDER_WAY[kind]
    queue.cancel(job_id)
    go_on.set()
    assert ended(queue, job_id).record.state is JobState.CANCELLED
    check_nothing_is_left(store, root)
    check_retry(store, queue, job_id)


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNDER_WAY)
def test_the_server_is_killed_while_it_works(seed: int, tmp_path: Path, kind: str) -> None:
    write_tiny_folder(tmp_path / "base", "llama", seed)
    root = tmp_path / "store"
    command = [sys.executable, "-m", "tests.jobs.test_loftq_ends", str(root), str(tmp_path / "base"), kind]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        job_id, worker = server.stdout.readline().split()
        server.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT_S
    while Path("/proc", worker, "cmdline").exists() and Path("/proc", worker, "cmdline").read_bytes():
        assert time.monotonic() < deadline, "the work goes on without its server"
        time.sleep(0.02)
    store, queue = opened(root, base=tmp_path / "base", make_process=WorkProcess)
    assert queue.get(job_id).record.state is JobState.INTERRUPTED
    check_nothing_is_left(store, root)
    queue.start()
    check_retry(store, queue, job_id)


def main(root: Path, base: Path, kind: str) -> None:
    pids: list[int] = []
    is_under_way = threading.Event()
    go_on = threading.Event()

    def say(pid: int) -> None:
        pids.append(pid)
        is_under_way.set()

    _, queue = opened(root, lambda: Held(UNDER_WAY[kind], say, go_on), base)
    queue.start()
    job_id = submitted(queue, kind)
    is_under_way.wait()
    os.write(1, f"{job_id} {pids[0]}\n".encode())
    go_on.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
