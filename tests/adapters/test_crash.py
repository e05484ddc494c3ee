"""What was acknowledged survives a kill and a power cut; what was not is there whole or not at all."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import failpoints
from server.adapters.store import AdapterStore
from server.errors import InvalidRequestError, NotFoundError, UnavailableError
from server.failpoints import ENVIRONMENT_VARIABLE, FAILPOINTS
from tests.adapters.churn import NAMES, TOUR, apply, contents_of, outcome, publish, random_change
from tests.adapters.power_loss import PowerLoss
from tests.adapters.stores import read

REPOSITORY = Path(__file__).resolve().parents[2]
STORE_FAILPOINTS = [name for name in FAILPOINTS if not name.startswith(("job.", "export."))]


def stored(store: AdapterStore, name: str) -> str:
    """The number that a name's files are made from, after comparing every byte of all generations; "-" for none."""
    for record in store.peek(name).generations:
        assert read(store, record.digest) == contents_of(record.details["number"])
    try:
        return str(store.get(name).details["number"])
    except NotFoundError:
        return "-"


def reopen(root: Path) -> AdapterStore:
    store = AdapterStore(root)
    store.open()
    store.check_integrity()
    assert not list((root / "staging").iterdir())
    store.close()  # reading needs no claim, and the next child must get it
    return store


class Ledger:
    """What a child said that it did, and what may be stored therefore."""

    def __init__(self) -> None:
        self.acknowledged = dict.fromkeys(NAMES, "-")
        self.num_changes = 0

    def check(self, output: str, root: Path, what: str) -> None:
        """Compare a killed child's output with what it left behind, which is acknowledged from here on."""
        whole = output[: output.rfind("\n") + 1].splitlines()
        under_way: tuple[str, str] | None = None
        for line in whole:
            if line == "open":
                continue
            verb, name, contents = line.split()
            if verb == "begin":
                under_way = (name, contents)
            else:
                self.acknowledged[name], under_way = contents, None
                self.num_changes += 1
        store = reopen(root)
        for name in NAMES:
            possible = {self.acknowledged[name]} | ({under_way[1]} if under_way and under_way[0] == name else set())
            found = stored(store, name)
            assert found in possible, f"{what}: {name} is {found}, not {possible}"
            self.acknowledged[name] = found


@pytest.mark.parametrize("num_kills", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(tmp_path: Path, num_kills: int) -> None:
    rng = random.Random(7)
    ledger = Ledger()
    for seed in range(num_kills):
        ledger.check(_churn_and_kill(tmp_path, seed, rng), tmp_path, f"round {seed}")
    assert ledger.num_changes > num_kills, "the child did not get to work"


def _command(root: Path, what: object) -> list[str]:
    return [sys.executable, "-m", "tests.adapters.churn", str(root), str(what)]


def _churn_and_kill(root: Path, seed: int, rng: random.Random) -> str:
    """Let a child make a few changes and kill it; in every third round, perhaps while it still recovers."""
    return work_and_kill(_command(root, seed), rng, num_done=rng.randint(4, 16) if seed % 3 else 0)


def work_and_kill(command: list[str], rng: random.Random, *, num_done: int) -> str:
    """Run a child until it has said `done` so many times, and kill it a moment later; returns all that it said."""
    said: list[str] = []
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        while sum(line.startswith("done") for line in said) < num_done:
            said.append(child.stdout.readline().decode())
            assert said[-1], "the child ended by itself"
        time.sleep(rng.uniform(0.0, 0.05 if num_done else 0.4))
        child.kill()
        return "".join(said) + child.stdout.read().decode()


@pytest.mark.parametrize("name", STORE_FAILPOINTS)
def test_sigkill_at_every_failpoint(tmp_path: Path, name: str) -> None:
    ledger = Ledger()
    for nth in (1, 2):
        root = tmp_path / str(nth)
        environment = os.environ | {ENVIRONMENT_VARIABLE: f"{name}:{nth}"}
        child = subprocess.run(
            _command(root, "tour"), cwd=REPOSITORY, stdout=subprocess.PIPE, env=environment, check=False
        )
        if name.startswith("layout.") and nth > 1:
            assert child.returncode == 0, "a folder is new only once"
            continue
        assert child.returncode == -signal.SIGKILL, f"{name}:{nth} was not passed"
        ledger.acknowledged = dict.fromkeys(NAMES, "-")
        ledger.check(child.stdout.decode(), root, name)


def test_every_failpoint_stands_in_the_source_once_and_is_documented() -> None:
    source = "".join(path.read_text() for path in sorted((REPOSITORY / "server").rglob("*.py")))
    assert sorted(re.findall(r'\bfailpoint\("([\w.]+)"\)', source)) == sorted(FAILPOINTS)
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text()
    assert all(f"`{name}`" in contributing for name in FAILPOINTS)


@pytest.mark.parametrize("text", ["", "x", "record.written:0", "record.written:x", "record.written:-1", ":1"])
def test_failpoints_that_there_are_not(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        failpoints.arm(text)
    assert caught.value.code == "failpoint_unknown"


# Power cuts


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PowerLoss]:
    root = tmp_path / "store"
    root.mkdir()
    disk = PowerLoss(root, monkeypatch)
    yield disk
    disk.close()


def test_power_cut_at_every_step_and_every_failpoint(power: PowerLoss, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    acknowledged = dict.fromkeys(NAMES, "-")
    allowed = dict(acknowledged)
    cuts: list[str] = []

    def cut(where: str = "step") -> None:
        on_step, power.on_step = power.on_step, lambda: None
        unwatch()
        cuts.append(where)
        copy = tmp_path / f"cut{len(cuts)}"
        power.restore(copy)
        after = reopen(copy)
        for name in NAMES:
            assert stored(after, name) in (acknowledged[name], allowed[name]), where
        shutil.rmtree(copy)
        power.on_step = on_step
        watch()

    def watch() -> None:
        nonlocal unwatch
        unwatch = failpoints.watch(cut)

    unwatch = lambda: None  # noqa: E731
    watch()
    store = AdapterStore(power.root, max_generations=4)
    store.open()
    power.on_step = cut
    try:
        for change in TOUR + [random_change(rng) for _ in range(12)]:
            contents = outcome(store, change)
            if contents is None:
                continue
            allowed[change[1]] = contents
            apply(store, change)
            acknowledged[change[1]] = contents
            cut()
    finally:
        unwatch()
    assert set(cuts) == {"step", *STORE_FAILPOINTS}
    assert len(cuts) > 100


@pytest.mark.parametrize("step", ["sync_file", "sync_folder", "rename"])
def test_a_missing_fsync_would_be_seen(
    step: str, power: PowerLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(power.root)
    store.open()
    monkeypatch.setattr(f"server.adapters.store.{step}", lambda *paths: None)
    publish(store, "red", 1)
    power.restore(tmp_path / "cut")
    with pytest.raises((AssertionError, UnavailableError)):
        assert stored(reopen(tmp_path / "cut"), "red") == "1"


def test_steps_of_a_publish_come_in_the_safe_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path)
    store.open()
    steps: list[tuple[str, str]] = []
    real_replace, real_fsync = os.replace, os.fsync

    def replace(source: Path, target: Path) -> None:
        steps.append(("rename", target.parent.name))
        real_replace(source, target)

    def fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        is_object = path.parent.name == "staging" and path.is_dir()
        is_pointer = path.parent.name == "staging" and path.is_file()
        steps.append(("fsync", "folder" if is_object else "pointer" if is_pointer else path.name))
        real_fsync(fd)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    publish(store, "red", 1)
    assert steps == [
        ("fsync", "adapter_config.json"),
        ("fsync", "adapter_model.safetensors"),
        ("fsync", "folder"),
        ("rename", "objects"),
        ("fsync", "objects"),
        ("fsync", "pointer"),
        ("rename", "names"),
        ("fsync", "names"),
    ]
