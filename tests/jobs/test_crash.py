"""Jobs and what they publish survive kills and power cuts: whole or not at all, and interrupted ones can be retried."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import failpoints
from server.adapters.store import CONFIG_NAME
from server.failpoints import FAILPOINTS
from server.jobs.record import JobState
from tests.adapters.power_loss import PowerLoss
from tests.adapters.stores import read
from tests.jobs.churn import ended, opened, tour

REPOSITORY = Path(__file__).resolve().parents[2]
JOB_FAILPOINTS = [name for name in FAILPOINTS if name.startswith(("job.", "export."))]


def check(root: Path, said: list[str]) -> None:
    """Compare what is left with what was said; then retry what was interrupted."""
    store, queue = opened(root)
    if not list(store.records()):
        assert not said, "a job was queued, and its input is gone"
        store.close()
        return
    store.check_integrity()
    found = {view.record.job_id: view.record for view in queue.views()}
    for line in said:
        state, _, job_id = line.split()
        assert job_id in found, "a job that was acknowledged is gone"
        if state == "succeeded":
            assert found[job_id].state is JobState.SUCCEEDED
    for record in found.values():
        assert record.state in (JobState.SUCCEEDED, JobState.INTERRUPTED)
        if record.state is JobState.SUCCEEDED:
            published(root, store, record.kind, record.job_id)
    queue.start()
    for record in found.values():
        if record.state is JobState.INTERRUPTED:
            queue.retry(record.job_id)
            again = ended(queue, record.job_id).record
            assert (again.state, again.attempt) == (JobState.SUCCEEDED, 2), again.error
            published(root, store, record.kind, record.job_id)
    queue.close()
    store.check_integrity()
    store.close()


def published(root: Path, store: object, kind: str, job_id: str) -> None:
    if kind == "mix":
        config, _ = read(store, store.get("mixed").digest)
        assert config.decode() == f"mix {CONFIG_NAME}"
    else:
        folder = root / "exports" / job_id
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "config.json": "merge config.json",
            "model.safetensors": "merge model.safetensors",
        }


PASSES = [f"{name}:{nth}" for name in JOB_FAILPOINTS for nth in ((1, 2) if name.startswith("job.") else (1,))]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of processes of which each was to be killed at a failpoint, and what became of each."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.jobs.churn", str(folder), *PASSES]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return folder, {failpoint: int(status) for failpoint, status in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("failpoint", PASSES)
def test_sigkill_at_every_failpoint(killed: tuple[Path, dict[str, int]], failpoint: str) -> None:
    folder, statuses = killed
    assert statuses[failpoint] == -signal.SIGKILL, f"{failpoint} was not passed"
    check(folder / failpoint, (folder / f"{failpoint}.said").read_text().splitlines())


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PowerLoss]:
    root = tmp_path / "store"
    root.mkdir()
    disk = PowerLoss(root, monkeypatch)
    yield disk
    disk.close()


def test_power_cut_at_every_failpoint(power: PowerLoss, tmp_path: Path) -> None:
    """What was not fsynced is gone; the images are taken as it runs, and opened afterwards."""
    said: list[str] = []
    images: list[tuple[str, Path, list[str]]] = []

    def cut(name: str) -> None:
        image = tmp_path / f"cut{len(images)}"
        power.restore(image)
        images.append((name, image, list(said)))

    unwatch = failpoints.watch(cut)
    try:
        tour(power.root, said.append)
    finally:
        unwatch()
    assert {name for name, _, _ in images} >= set(JOB_FAILPOINTS)
    for _, image, lines in images:
        check(image, lines)
        shutil.rmtree(image)
