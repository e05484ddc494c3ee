"""Kill -9 at random moments of uploads, deletes, rollbacks and mixes: nothing acknowledged is lost, nothing is half."""

import json
import random
import sys
from pathlib import Path

import pytest

from server.jobs.record import JobState
from tests.adapters.stores import read
from tests.adapters.test_crash import Ledger, work_and_kill
from tests.jobs.churn import opened
from tests.jobs.random_churn import MIXED, Mixer

COUNTED = ("open", "begin", "done")


class Mixes:
    """What was said about mixes, over all rounds."""

    def __init__(self) -> None:
        self.num_queued = self.num_published = self.num_interrupted = 0
        self._said: dict[str, str] = {}

    def check(self, output: str, root: Path) -> None:
        """Compare what was said with the jobs and the generations that are left."""
        for line in output[: output.rfind("\n") + 1].splitlines():
            verb, *rest = line.split()
            if verb not in COUNTED:
                self._said[rest[0]] = verb
        store, queue = opened(root, Mixer)
        jobs = {view.record.job_id: view.record for view in queue.views()}
        assert jobs.keys() >= self._said.keys(), "a job that was acknowledged is gone"
        generations = {record.generation: record for record in store.peek(MIXED).generations}
        for record in generations.values():
            config, weights = read(store, record.digest)  # compares the digest
            inputs = [one["digest"] for one in record.source["inputs"]]
            assert json.loads(config) == inputs
            assert weights, "half a mix was published"
            assert jobs[record.source["job_id"]].kind == "mix"
        for job_id, job in jobs.items():
            assert job.state.is_final, "nothing runs after a kill"
            assert self._said.get(job_id, "queued") in ("queued", job.state.value)
            if job.state is JobState.SUCCEEDED:
                assert job.result["adapter"]["generation"] <= store.peek(MIXED).num_published
                kept = generations.get(job.result["adapter"]["generation"])
                assert kept is None or kept.digest == job.result["adapter"]["digest"]
            if job.state is JobState.FAILED:
                assert job.error["code"] == "adapter_not_found"  # its input was deleted before it began
        self.num_queued = len(self._said)
        self.num_published = store.peek(MIXED).num_published
        self.num_interrupted = sum(job.state is JobState.INTERRUPTED for job in jobs.values())
        store.close()


@pytest.mark.parametrize("num_kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_beside_mixes(tmp_path: Path, num_kills: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    ledger, mixes = Ledger(), Mixes()
    for i in range(num_kills):
        command = [sys.executable, "-m", "tests.jobs.random_churn", str(tmp_path), str(seed + i)]
        output = work_and_kill(command, rng, num_done=rng.randint(4, 16))
        changes = [line for line in output.splitlines(keepends=True) if line.startswith(COUNTED)]
        ledger.check("".join(changes), tmp_path, f"round {i}")
        mixes.check(output, tmp_path)
    assert ledger.num_changes > num_kills
    assert mixes.num_queued >= num_kills // 2
    assert num_kills < 100 or (mixes.num_published > 10 and mixes.num_interrupted > 10)
