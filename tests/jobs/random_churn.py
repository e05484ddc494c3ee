"""A process that uploads, deletes, rolls back and mixes at random until it is killed: see test_random_kills.

It says `begin` and `done` around each change of a name, as tests.adapters.churn does, and `queued` and `succeeded` of
each mix. A mix runs beside the changes; its work is a stand-in that writes what it was made from.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterStore
from server.jobs.process import WorkProcess
from server.jobs.queue import JobQueue
from server.jobs.record import JobState
from tests.adapters.churn import NAMES, apply, outcome, random_change
from tests.jobs.churn import opened

MIXED = "mixed"


class Mixer(WorkProcess):
    """Writes which contents it was made from, and those one behind the other."""

    def run(self, task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
        out = Path(task["out"])
        out.mkdir()
        config, weights = mixed_files(task["inputs"], [Path(one) for one in task["adapters"]])
        (out / CONFIG_NAME).write_bytes(config)
        report("working", 0.5)
        time.sleep(random.uniform(0.0, 0.01))
        (out / WEIGHTS_NAME).write_bytes(weights)
        return {}


def mixed_files(inputs: list[dict[str, Any]], folders: list[Path]) -> tuple[bytes, bytes]:
    """The two files of a mix of adapters."""
    digests = [one["digest"] for one in inputs]
    return json.dumps(digests).encode(), b"".join((folder / WEIGHTS_NAME).read_bytes() for folder in folders)


def _say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def _mix(store: AdapterStore, queue: JobQueue, rng: random.Random) -> str | None:
    """Queue a mix of two adapters, if there are two."""
    names = [record.name for record in store.records() if record.name in NAMES]
    if len(names) < 2:
        return None
    adapters = [{"name": name, "weight": 1.0} for name in rng.sample(names, 2)]
    job_id = queue.submit("mix", {"name": MIXED, "adapters": adapters, "seed": 0}).record.job_id
    _say("queued", job_id)
    return job_id


def main(root: Path, seed: int) -> None:
    rng = random.Random(seed)
    store, queue = opened(root, Mixer)
    queue.start()
    _say("open")
    job_id: str | None = None
    while True:
        if job_id is None:
            job_id = _mix(store, queue, rng)
        elif (state := queue.get(job_id).record.state).is_final:
            assert state is JobState.SUCCEEDED or state is JobState.FAILED, state
            _say(state.value, job_id)
            job_id = None
        change = random_change(rng)
        contents = outcome(store, change)
        if contents is not None:
            _say("begin", change[1], contents)
            apply(store, change)
            _say("done", change[1], contents)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
