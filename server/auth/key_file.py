"""KeyFile: the keys on disk, shared by the server and the command line.

One JSON file, replaced atomically and durably. Whoever changes it holds a lock on the file beside it and reads it
again first, so that `loramux keys` and a running server do not undo each other's changes; the server notices others'
changes within a second.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from server.auth.keys import KeyLimits, KeyRecord, Scope, find_key
from server.durable import rename, storage_errors, sync_folder, write_file
from server.errors import InvalidRequestError, NotFoundError

__all__ = ["KeyFile"]

REREAD_S = 1.0
DEFAULT_WEIGHT = 1.0
FORMAT = 1
STORED_LIMITS = ("max_adapters", "max_adapter_bytes")


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    keys: list[KeyRecord] = []


class KeyFile:
    """The keys of a file. Thread-safe."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._by_hash: dict[str, KeyRecord] = {}
        self._weights: dict[str, float] = {}
        self._stored: dict[str, dict[str, int]] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._looked_s = float("-inf")

    def load(self) -> None:
        """Read the file.

        Raises:
            InvalidRequestError: code `keys_invalid`: there is none, or it cannot be read.
        """
        if not self.path.is_file():
            raise InvalidRequestError(
                f"there is no file of keys at {self.path}; make the first key with "
                f"`loramux keys create NAME --scope admin --file {self.path}`",
                code="keys_invalid",
            )
        self._read()

    def find(self, secret: bytes) -> KeyRecord | None:
        """The valid key with this secret. Keeps what it knew if the file has become unreadable."""
        now = self._clock()
        if now - self._looked_s >= REREAD_S:
            self._looked_s = now
            with suppress(InvalidRequestError):
                if self._file_stamp() != self._stamp:
                    self._read()
        return find_key(self._by_hash, secret)

    def records(self) -> list[KeyRecord]:
        """All keys, oldest first."""
        return sorted(self._by_hash.values(), key=lambda record: (record.created_at, record.key_id))

    def weight_of(self, tenant: str) -> float:
        """A tenant's share of the engine, "" for callers without one: the highest weight of its keys."""
        return self._weights.get(tenant, DEFAULT_WEIGHT)

    def limits_of(self, record: KeyRecord) -> KeyLimits:
        """A key's limits, where those of what is kept are its tenant's: the lowest that any of the tenant's keys has.

        Administrators publish for all tenants, and have their own.
        """
        if Scope.ADMIN in record.scopes:
            return record.limits
        return record.limits.model_copy(update=self._stored.get(record.tenant or "", {}))

    def add(self, record: KeyRecord) -> None:
        """Add a key; on the disk when this returns.

        Raises:
            StorageFullError, UnavailableError: it cannot be written.
        """
        with self._changing() as records:
            records.append(record)

    def remove(self, key_id: str) -> KeyRecord:
        """Remove a key: from now on it is not valid.

        Raises:
            NotFoundError: there is no such key.
            StorageFullError, UnavailableError: it cannot be written; the key is still valid.
        """
        with self._changing() as records:
            for record in records:
                if record.key_id == key_id:
                    records.remove(record)
                    return record
            raise NotFoundError("there is no such key", code="key_not_found", param="key_id")

    @contextmanager
    def _changing(self) -> Iterator[list[KeyRecord]]:
        with self._lock, self._file_lock():
            if self.path.exists():
                self._read()
            records = self.records()
            yield records
            temporary = self.path.with_name(f".{self.path.name}.new")
            with storage_errors():
                temporary.unlink(missing_ok=True)  # of a crash
            contents = _Contents(keys=records)
            text = json.dumps(contents.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
            mask = os.umask(0o077)
            try:
                write_file(temporary, text.encode())
            finally:
                os.umask(mask)
            rename(temporary, self.path)
            sync_folder(self.path.parent)
            self._read()

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        with storage_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> None:
        stamp = self._file_stamp()  # before the contents: a change in between is noticed later
        try:
            contents = _Contents.model_validate_json(self.path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it cannot be read"
            raise InvalidRequestError(f"{self.path} holds no keys: {reason}", code="keys_invalid") from error
        if contents.format != FORMAT:
            raise InvalidRequestError(f"{self.path} has the unknown format {contents.format}", code="keys_invalid")
        self._by_hash = {record.sha256: record for record in contents.keys}
        self._weights = _weights(contents.keys)
        self._stored = _stored_limits(contents.keys)
        self._stamp = stamp


def _weights(records: Iterable[KeyRecord]) -> dict[str, float]:
    """The highest weight of each tenant that has one."""
    weights: dict[str, float] = {}
    for record in records:
        if record.limits.weight is not None:
            tenant = record.tenant or ""
            weights[tenant] = max(weights.get(tenant, 0.0), record.limits.weight)
    return weights


def _stored_limits(records: Iterable[KeyRecord]) -> dict[str, dict[str, int]]:
    """The lowest limits of what each tenant may have kept, by the fields of KeyLimits that say so."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        if Scope.ADMIN in record.scopes:
            continue
        own = found.setdefault(record.tenant or "", {})
        for field in STORED_LIMITS:
            limit = getattr(record.limits, field)
            if limit is not None:
                own[field] = min(limit, own.get(field, limit))
    return found
