"""The folder that a store lives in: claimed by one process, and of a layout that this version can read."""

import fcntl
import os
import uuid
from pathlib import Path

from server.durable import rename, sync_folder, write_file
from server.errors import UnavailableError
from server.failpoints import failpoint

__all__ = ["LAYOUT", "StoreFolder"]

LAYOUT = 2


class StoreFolder:
    """The parts of a store's folder, and the claim on it.

    Attributes:
        objects, names, staging: its folders; `staging` is for what is not durable yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.names = root / "names"
        self.staging = root / "staging"
        self._claim: int | None = None  # descriptor of the lock file while open

    def open(self) -> None:
        """Claim the folder and create what is missing.

        Raises:
            UnavailableError: code `store_in_use` if another process has it, `store_layout_unknown` if another version
                wrote it.
            OSError: it cannot be used.
        """
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            sync_folder(self.root.parent)
        self._lock()
        self.staging.mkdir(exist_ok=True)
        self._check_layout()
        for folder in (self.objects, self.names):
            folder.mkdir(exist_ok=True)
        # A crash may have come before the fsync of what is here: a power cut must not undo it once it was seen.
        for folder in (self.root, self.objects, self.names):
            sync_folder(folder)

    def close(self) -> None:
        """Let other processes have it."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _lock(self) -> None:
        """The kernel gives the lock back when the process ends, however it ends."""
        self.close()
        claim = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(claim)
            raise UnavailableError("another process uses this adapter store", code="store_in_use") from None
        self._claim = claim

    def _check_layout(self) -> None:
        """Refuse a folder that another version wrote; mark a new one."""
        path = self.root / "layout"
        if not path.is_file() and not self.names.exists() and not self.objects.exists():
            temporary = self.staging / uuid.uuid4().hex
            write_file(temporary, f"{LAYOUT}\n".encode())
            failpoint("layout.written")
            rename(temporary, path)
            sync_folder(self.root)
            failpoint("layout.synced")
        found = path.read_text(errors="replace").strip()[:16] if path.is_file() else "1"
        if found != str(LAYOUT):
            raise UnavailableError(
                f"the adapter store has layout {found!a}, this version reads layout {LAYOUT}: give it another folder",
                code="store_layout_unknown",
            )
