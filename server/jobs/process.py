"""A job's work in a process of its own: it can be killed at any moment, and what it breaks is its own.

The process reads one JSON line, its task, from its standard input, and writes JSON lines to its standard output:
`{"stage", "fraction"}` as it gets on, and at the end `{"result"}` or `{"error"}`. When its input ends, which it does
with this process too, it exits at once.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.errors import GenerationError, ServerError

__all__ = ["JobCancelledError", "JobFailedError", "WorkProcess"]

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "server.jobs.worker")


class JobCancelledError(Exception):
    """The work was cancelled."""


class JobFailedError(ServerError):
    """The work failed for a reason that the caller should know."""

    kind = "unprocessable"
    code = "job_failed"


class WorkProcess:
    """Runs one task.

    Args:
        command: of the process.
        environment: variables in addition to this process's.
    """

    def __init__(self, command: Sequence[str] = WORKER, environment: Mapping[str, str] | None = None) -> None:
        self._command = command
        self._environment = environment or {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Kill the process, or do not start it. Calling it again does nothing."""
        with self._lock:
            self._is_cancelled = True
            if self._process is not None:
                self._process.kill()

    def run(self, task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
        """Run the task to its end.

        Args:
            report: called with stage and fraction as the work gets on.

        Returns:
            The task's result.

        Raises:
            JobCancelledError: `cancel` was called.
            JobFailedError: the task failed.
            GenerationError: code `job_crashed`, the process ended without an answer.
        """
        with self._lock:
            if self._is_cancelled:
                raise JobCancelledError
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self._environment},
            )
        process = self._process
        answer: dict[str, Any] | None = None
        try:
            with process:  # closing it writes what is left, which a process that was cancelled does not take
                try:
                    assert process.stdin is not None
                    assert process.stdout is not None
                    process.stdin.write(json.dumps(task).encode() + b"\n")
                    process.stdin.flush()
                    for line in process.stdout:
                        said = json.loads(line)
                        if "stage" in said:
                            report(said["stage"], said["fraction"])
                        else:
                            answer = said
                finally:
                    process.kill()
        except (BrokenPipeError, ValueError) as error:
            logger.log(logging.DEBUG if self._is_cancelled else logging.ERROR, "a job's process broke off: %s", error)
        if self._is_cancelled:
            raise JobCancelledError
        if answer is None:
            raise GenerationError(f"the job's process ended with status {process.returncode}", code="job_crashed")
        if "error" in answer:
            said = answer["error"]
            raise JobFailedError(said["message"], code=said["code"], details=said.get("details"))
        result: dict[str, Any] = answer["result"]
        return result
