"""AuditLog: what was changed, by whom; one JSON object a line, appended and on the disk before it goes on.

An action has two lines: `begun` before it and `ended` with its status after it. If the first cannot be written, the
action does not happen; one that has no second line was cut off by a crash.
"""

import errno
import json
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from server.durable import storage_errors, sync_folder

__all__ = ["AuditLog"]


class AuditLog:
    """An append-only file. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._is_torn = False

    def open(self) -> None:
        """Open or create the file, readable by its owner only.

        Raises:
            StorageFullError, UnavailableError: it cannot be written.
        """
        with storage_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # a crash cut the last line
                self._is_torn = True
        sync_folder(self._path.parent)

    def close(self) -> None:
        """Calling it again does nothing."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def write(self, facts: Mapping[str, object]) -> None:
        """Append a line with these facts and the time; on the disk when this returns.

        Raises:
            StorageFullError, UnavailableError: it cannot be written.
        """
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | dict(facts)
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with self._lock, storage_errors():
            if self._descriptor is None:
                raise OSError("the audit log is closed")
            if self._is_torn:
                line = b"\n" + line
            self._is_torn = True
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, "the audit log took a part of a line only")
            self._is_torn = False
            os.fsync(self._descriptor)
