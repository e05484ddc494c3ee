"""The process that does one job's work; see `server.jobs.process`."""

import json
import os
import sys
import threading
from typing import Any, BinaryIO

from lora_core import LoraError
from server.allocator import return_freed
from server.errors import ServerError

__all__ = ["main"]

NICENESS = 19  # serving comes first


def main() -> None:
    """Read a task from standard input, do it, and say what came of it."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(NICENESS)
    return_freed()

    import torch  # noqa: PLC0415 - after the niceness, as it makes threads

    from server.jobs.tasks import TASKS  # noqa: PLC0415 - ditto

    torch.set_num_threads(1)

    def report(stage: str, fraction: float) -> None:
        _say(out, {"stage": stage, "fraction": fraction})

    try:
        with torch.no_grad():
            answer: dict[str, Any] = {"result": TASKS[task["kind"]](task, report)}
    except LoraError as error:
        answer = {"error": {"code": error.code, "message": str(error)}}
    except ServerError as error:
        answer = {"error": {"code": error.code, "message": error.message}}
    _say(out, answer)


def _say(out: BinaryIO, what: dict[str, Any]) -> None:
    out.write(json.dumps(what).encode() + b"\n")


def _die_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        continue
    os._exit(1)


if __name__ == "__main__":
    main()
