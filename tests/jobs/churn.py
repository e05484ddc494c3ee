"""Processes that run a mix and a merge through the job queue and are killed at failpoints: see test_crash.

    python -m tests.jobs.churn FOLDER FAILPOINT...

forks one for each failpoint, which works in `FOLDER/<failpoint>` and says what it does in `FOLDER/<failpoint>.said`.
The work is a stand-in that writes files at once; queue, publication and export are the real ones.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from server.adapters.import_root import ImportRoot
from server.adapters.record import Publication
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME, AdapterRecord, AdapterStore
from server.failpoints import arm
from server.jobs.handlers import AdapterJobs, ServedWeights
from server.jobs.process import WorkProcess
from server.jobs.queue import JobQueue, JobView
from server.jobs.store import JobStore


class Writer(WorkProcess):
    """Writes what a mix or a merge would."""

    def run(self, task: Mapping[str, Any], report: Callable[[str, float], None]) -> dict[str, Any]:
        out = Path(task["out"])
        out.mkdir()
        report("working", 0.5)
        for name in (CONFIG_NAME, WEIGHTS_NAME) if task["kind"] == "mix" else ("config.json", "model.safetensors"):
            (out / name).write_text(f"{task['kind']} {name}")
        return {}


class Publisher:
    """An adapter service without a model."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def check_name(self, name: str) -> None: ...

    def import_folder(self, name: str, folder: Path, publication: Publication, *, converted: str = "") -> AdapterRecord:
        with self._store.staging_folder() as staged:
            for file_name in (CONFIG_NAME, WEIGHTS_NAME):
                (staged / file_name).write_bytes((folder / file_name).read_bytes())
            return self._store.publish(name, staged, {}, publication)


def opened(
    root: Path, make_process: Callable[[], WorkProcess] = Writer, base: Path | None = None
) -> tuple[AdapterStore, JobQueue]:
    store = AdapterStore(root)
    store.open()
    handler = AdapterJobs(
        Publisher(store),
        store,
        base=base or root,
        exports=root / "exports",
        imports=ImportRoot(None),
        allow_hub=False,
        served=ServedWeights("nf4"),
    )
    queue = JobQueue(JobStore(root / "jobs"), handler, make_process=make_process)
    queue.open()
    return store, queue


def ended(queue: JobQueue, job_id: str) -> JobView:
    while not (view := queue.get(job_id)).record.state.is_final:
        time.sleep(0.005)
    return view


def tour(root: Path, say: Callable[[str], None]) -> None:
    """Publish an adapter, mix it with itself, merge it."""
    store, queue = opened(root)
    with store.staging_folder() as folder:
        (folder / CONFIG_NAME).write_text("{}")
        (folder / WEIGHTS_NAME).write_text("x")
        store.publish("a", folder, {})
    queue.start()
    mix = {"name": "mixed", "adapters": [{"name": "a", "weight": 1.0}], "seed": 0}
    for kind, options in (("mix", mix), ("merge", {"adapters": [{"name": "a", "weight": 1.0}]})):
        view = queue.submit(kind, options)
        say(f"queued {kind} {view.record.job_id}")
        say(f"{ended(queue, view.record.job_id).record.state.value} {kind} {view.record.job_id}")
    queue.close()
    store.close()


def main(folder: Path, failpoints: list[str]) -> None:
    """Print each failpoint and what became of its process: its exit status, or the negated signal."""
    for failpoint in failpoints:
        if not os.fork():
            arm(failpoint)
            with (folder / f"{failpoint}.said").open("w", buffering=1) as said:
                tour(folder / failpoint, partial(print, file=said))
            os._exit(0)
        print(failpoint, os.waitstatus_to_exitcode(os.wait()[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
