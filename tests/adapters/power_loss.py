"""A disk that forgets what was not fsynced: a kill alone keeps the page cache and cannot show a missing fsync."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


class PowerLoss:
    """Keeps what was fsynced below a folder and nothing else: of a file its bytes, of a folder its entries.

    `on_step` runs before every rename and after every fsync.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, tuple[int, bool]]] = {}  # inode, and whether it is a folder
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
            self.folders[inode] = {one.name: (one.stat().st_ino, one.is_dir()) for one in path.iterdir()}
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
        for name, (child, is_folder) in self.folders.get(inode, {}).items():
            if is_folder:
                (target / name).mkdir()
                self._restore(child, target / name)
            else:
                (target / name).write_bytes(self.files.get(child, b""))

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)
