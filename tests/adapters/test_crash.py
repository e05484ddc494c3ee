"""What was acknowledged survives a kill and a power cut; what was not is there whole or not at all."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.adapters.store import AdapterStore
from server.errors import NotFoundError, UnavailableError
from tests.adapters.churn import NAMES, contents_of, publish

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_KILLS = 15


def stored(store: AdapterStore, name: str) -> str:
    """The number that a name's files are made from, after comparing every byte; "-" if there is none."""
    try:
        record = store.get(name)
    except NotFoundError:
        return "-"
    assert store.read(record.digest) == contents_of(record.details["number"])
    return str(record.details["number"])


def reopen(root: Path) -> AdapterStore:
    store = AdapterStore(root)
    store.open()
    store.check_integrity()
    assert not list((root / "staging").iterdir())
    store.close()  # reading needs no claim, and the next child must get it
    return store


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(7)
    acknowledged = dict.fromkeys(NAMES, "-")
    num_changes = 0
    for seed in range(NUM_KILLS):
        lines = _churn_and_kill(tmp_path, seed, rng)
        num_changes += len(lines) // 2
        under_way: tuple[str, str] | None = None
        for verb, name, contents in lines:
            if verb == "begin":
                under_way = (name, contents)
            else:
                acknowledged[name], under_way = contents, None
        store = reopen(tmp_path)
        for name in NAMES:
            possible = {acknowledged[name]} | ({under_way[1]} if under_way and under_way[0] == name else set())
            found = stored(store, name)
            assert found in possible, f"round {seed}: {name} is {found}, not {possible}"
            acknowledged[name] = found
    assert num_changes > NUM_KILLS, "the child did not get to work"


def _churn_and_kill(root: Path, seed: int, rng: random.Random) -> list[list[str]]:
    """Let a child work for a moment and kill it; in every third round, perhaps while it still recovers."""
    command = [sys.executable, "-m", "tests.adapters.churn", str(root), str(seed)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        if seed % 3:
            assert child.stdout.readline() == b"open\n"
            time.sleep(rng.uniform(0.0, 0.15))
        else:
            time.sleep(rng.uniform(0.0, 0.4))
        child.kill()
        output = child.stdout.read().decode()
    whole = output[: output.rfind("\n") + 1].splitlines()
    return [line.split() for line in whole if line != "open"]


class PowerLoss:
    """A disk that keeps what was fsynced and nothing else: of a file its bytes, of a folder its entries.

    `on_step` runs before every rename and after every fsync.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {}
        self.on_step: Callable[[], None] = lambda: None
        self._open: list[int] = []
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, fd: int) -> None:
        self._open.append(os.dup(fd))  # keeps the inode's number from being given to another file
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        inode = os.fstat(fd).st_ino
        if path.is_dir():
            self.folders[inode] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            self.files[inode] = path.read_bytes()
        self.on_step()

    def replace(self, source: Path, target: Path) -> None:
        self.on_step()
        self._replace(source, target)

    def restore(self, target: Path) -> None:
        """Build what is on the disk after a power cut at this moment."""
        target.mkdir()
        self._restore(self.root.stat().st_ino, target)

    def _restore(self, inode: int, target: Path) -> None:
        for name, child in self.folders.get(inode, {}).items():
            if child in self.files:
                (target / name).write_bytes(self.files[child])
            else:  # a folder, or a file whose contents were lost, which an empty folder shows just as well
                (target / name).mkdir()
                self._restore(child, target / name)

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PowerLoss]:
    root = tmp_path / "store"
    root.mkdir()
    disk = PowerLoss(root, monkeypatch)
    yield disk
    disk.close()


def test_power_cut_at_every_step(power: PowerLoss, tmp_path: Path) -> None:
    store = AdapterStore(power.root)
    store.open()
    acknowledged = dict.fromkeys(NAMES, "-")
    allowed = dict(acknowledged)
    num_cuts = 0

    def cut() -> None:
        nonlocal num_cuts
        on_step, power.on_step = power.on_step, lambda: None
        num_cuts += 1
        copy = tmp_path / f"cut{num_cuts}"
        power.restore(copy)
        after = reopen(copy)
        for name in NAMES:
            assert stored(after, name) in (acknowledged[name], allowed[name])
        shutil.rmtree(copy)
        power.on_step = on_step

    power.on_step = cut
    for name, number in [("red", 1), ("red", 2), ("green", 2), ("red", None), ("red", 2), ("blue", 3), ("green", None)]:
        allowed[name] = "-" if number is None else str(number)
        if number is None:
            store.delete(name)
        else:
            publish(store, name, number)
        acknowledged[name] = allowed[name]
        cut()
    assert num_cuts > 40


@pytest.mark.parametrize("step", ["sync_file", "sync_folder", "rename_durably"])
def test_a_missing_fsync_would_be_seen(
    step: str, power: PowerLoss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(power.root)
    store.open()
    monkeypatch.setattr(f"server.adapters.store.{step}", lambda *paths: os.rename(*paths) if len(paths) > 1 else None)
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
