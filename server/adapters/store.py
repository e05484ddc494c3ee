"""The store: adapters on disk, durable, as plain PEFT folders under the digest of their contents.

    objects/<digest>/adapter_config.json, adapter_model.safetensors     immutable; copy one out with any tool
    names/<name>.json                                                   what the name points to; replaced atomically
    staging/                                                            uploads on their way; emptied at the start

An upload is safe against a crash at any moment because the name moves last: first the files are on the disk, then the
object is, then the name points to it, and only then is the caller told. `generation` counts what was published under a
name; it goes on counting after a delete, whose record stays behind with no digest.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.adapters.record import NAME_PATTERN, AdapterRecord, check_name, decode_record, encode_record
from server.durable import rename, rename_durably, storage_errors, sync_file, sync_folder, write_file
from server.errors import NotFoundError, ServerError, StorageFullError, UnavailableError

__all__ = ["CONFIG_NAME", "NAME_PATTERN", "WEIGHTS_NAME", "AdapterRecord", "AdapterStore", "check_name", "digest_of"]

logger = logging.getLogger(__name__)

# lora_core's names, repeated: what only moves files need not import torch.
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)


class AdapterStore:
    """A folder of adapters. Thread-safe; used by one process at a time, which a lock on the folder holds it to.

    Args:
        min_free_bytes: uploads are refused when the disk has less free space than this.
    """

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        self._objects = root / "objects"
        self._names = root / "names"
        self._staging = root / "staging"
        self._min_free_bytes = min_free_bytes
        self._publishing = threading.Lock()  # one change of a name at a time
        self._lock = threading.Lock()  # around the books below; never held while files are read or written
        self._records: dict[str, AdapterRecord] = {}
        # What failed writes may have left in a name's file, until the next one succeeds. A crash may bring it to
        # light, so its bytes stay.
        self._doubtful: dict[str, list[AdapterRecord]] = {}
        self._holds: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()  # by records, doubtful ones too, and holds; at 0 the object goes
        self._has_damage = False
        self._claim: int | None = None  # descriptor of the lock file while open

    def open(self) -> None:
        """Create what is missing, clear what a crash left behind, and read the names.

        Raises:
            StorageFullError, UnavailableError: the folder cannot be used; code `store_in_use` if another process does.
        """
        with storage_errors():
            self._make_folders()
            self._lock_folder()
            for leftover in self._staging.iterdir():
                _remove(leftover)
            found = [_read_record(path) for path in sorted(self._names.glob("*.json"))]
            self._records = {record.name: record for record in found if record is not None}
            self._uses = Counter(record.digest for record in self._records.values() if record.digest)
            self._has_damage = None in found
            if self._has_damage:
                return  # a damaged record may point to any object: remove none
            for folder in self._objects.iterdir():
                if folder.name not in self._uses:
                    _remove(folder)

    def close(self) -> None:
        """Let other processes have the folder. Nothing is pending: everything is on the disk already."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """A fresh folder for an upload on its way; gone at the end of the block.

        Raises:
            StorageFullError: the disk has less free space than it should keep.
        """
        with storage_errors():
            if shutil.disk_usage(self._staging).free < self._min_free_bytes:
                raise StorageFullError("the disk is too full for new adapters")
            folder = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            yield folder
        finally:
            _remove(folder)

    def publish(self, name: str, folder: Path, details: Mapping[str, Any]) -> AdapterRecord:
        """Publish the two files of a staging folder under a name; on the disk when this returns.

        The same contents under the same name are the same generation: the record stays as it is.

        Raises:
            InvalidRequestError: the name cannot be one.
            StorageFullError, UnavailableError: it cannot be written. The name means what it meant; after a crash, it
                may mean this.
        """
        check_name(name)
        with storage_errors():
            for file_name in FILE_NAMES:
                sync_file(folder / file_name)
            sync_folder(folder)
            digest = digest_of(folder)
            num_bytes = sum((folder / file_name).stat().st_size for file_name in FILE_NAMES)
            with self._using(digest), self._publishing:
                self._place_object(folder, digest)
                old = self._records.get(name)
                if old is not None and old.digest == digest:
                    if name in self._doubtful:
                        self._point(old)
                    return old
                before = [old] if old is not None else []
                generation = 1 + max((r.generation for r in [*before, *self._doubtful.get(name, ())]), default=0)
                as_stored = json.loads(json.dumps(dict(details)))
                record = AdapterRecord(name, digest, generation, _now(), num_bytes, as_stored)
                self._point(record)
                return record

    def get(self, name: str) -> AdapterRecord:
        """What a name points to; NotFoundError if it does not exist."""
        with self._lock:
            record = self._records.get(name)
        if record is None or not record.digest:
            shown = name[:128].encode("ascii", "backslashreplace").decode()
            raise NotFoundError(f"there is no adapter {shown!r}", code="adapter_not_found", param="adapter")
        return record

    def has_history(self, name: str) -> bool:
        """An adapter of this name exists, or did once."""
        with self._lock:
            return name in self._records

    def records(self) -> list[AdapterRecord]:
        """All adapters, by name."""
        with self._lock:
            return sorted((r for r in self._records.values() if r.digest), key=lambda record: record.name)

    def delete(self, name: str) -> AdapterRecord:
        """Hide a name, durably; its bytes go when nobody holds them. Returns what it pointed to.

        Raises:
            NotFoundError: there is no such adapter.
            StorageFullError, UnavailableError: it cannot be written; the name is still there.
        """
        with self._publishing:
            record = self.get(name)
            self._point(AdapterRecord(name, "", record.generation, _now(), 0))
        return record

    def hold(self, digest: str) -> None:
        """Keep an object's bytes until `release`, whatever happens to its names.

        Raises:
            NotFoundError: the object is gone already.
        """
        with self._lock:
            if not self._uses[digest]:
                raise NotFoundError("the adapter has just been deleted", code="adapter_not_found", param="adapter")
            self._uses[digest] += 1
            self._holds[digest] += 1

    def release(self, digest: str) -> None:
        """Undo one `hold`."""
        with self._lock:
            assert self._holds[digest] > 0, "released more often than held"
            self._holds[digest] -= 1
        self._unuse(digest)

    def read(self, digest: str) -> tuple[bytes, bytes]:
        """The configuration's and the weights' bytes, checked against the digest.

        Raises:
            UnavailableError: code `adapter_corrupt`, a file is damaged or missing.
        """
        try:
            config, weights = ((self._objects / digest / file_name).read_bytes() for file_name in FILE_NAMES)
        except OSError as error:
            logger.error("the files of adapter %s cannot be read: %s", digest, error)
            raise UnavailableError("the adapter's files cannot be read", code="adapter_corrupt") from error
        if _pair_digest(hashlib.sha256(config).digest(), hashlib.sha256(weights).digest()) != digest:
            logger.error("the files of adapter %s are damaged", digest)
            raise UnavailableError("the adapter's files are damaged", code="adapter_corrupt")
        return config, weights

    def check_integrity(self) -> None:
        """Assert that names, objects and holds agree; while nothing is under way."""
        with self._lock:
            pointing = [*self._records.values(), *(r for left in self._doubtful.values() for r in left)]
            assert min(self._holds.values(), default=0) >= 0, "negative holds"
            counted = Counter(record.digest for record in pointing if record.digest) + self._holds
            assert counted == +self._uses, "uses are miscounted"
        found = {path.name for path in self._objects.iterdir()}
        assert found >= set(counted), "an object is missing"
        assert self._has_damage or found == set(counted), "an object that nobody points to"
        assert not list(self._staging.iterdir()), "uploads left behind"
        assert all(set(os.listdir(self._objects / digest)) == set(FILE_NAMES) for digest in counted)

    def _lock_folder(self) -> None:
        """The kernel gives the lock back when the process ends, however it ends."""
        self.close()
        claim = os.open(self._names.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(claim)
            raise UnavailableError("another process uses this adapter store", code="store_in_use") from None
        self._claim = claim

    def _make_folders(self) -> None:
        root = self._names.parent
        if not root.is_dir():
            root.mkdir(parents=True)
            sync_folder(root.parent)
        for folder in (self._objects, self._names, self._staging):
            folder.mkdir(exist_ok=True)
        # A crash may have come before the fsync of what is here: a power cut must not undo it once it was seen.
        for folder in (root, self._objects, self._names):
            sync_folder(folder)

    def _place_object(self, folder: Path, digest: str) -> None:
        """Move a staged folder to where its digest says, unless it is there; a damaged one makes room."""
        target = self._objects / digest
        if not _is_intact(target, digest):
            _remove(target)
            rename(folder, target)
        sync_folder(self._objects)

    def _point(self, record: AdapterRecord) -> None:
        """Make the record what its name points to, first on the disk; then let go of what it pointed to."""
        name, temporary = record.name, self._staging / uuid.uuid4().hex
        try:
            write_file(temporary, encode_record(record))
            with self._lock:
                self._doubtful.setdefault(name, []).append(record)
                if record.digest:
                    self._uses[record.digest] += 1
            rename_durably(temporary, self._names / f"{name}.json")
        finally:
            _remove(temporary)
        with self._lock:
            outdated = self._doubtful.pop(name)[:-1]
            if name in self._records:
                outdated.append(self._records[name])
            self._records[name] = record
        for old in outdated:
            self._unuse(old.digest)

    @contextmanager
    def _using(self, digest: str) -> Iterator[None]:
        """Keep an object that no name points to yet."""
        with self._lock:
            self._uses[digest] += 1
        try:
            yield
        finally:
            self._unuse(digest)

    def _unuse(self, digest: str) -> None:
        """Give up one use of an object; with the last one it goes. A failure leaves its bytes to the next start."""
        if not digest:
            return
        with self._lock:
            self._uses[digest] -= 1
            if self._uses[digest]:
                return
            del self._uses[digest], self._holds[digest]
            doomed = self._staging / uuid.uuid4().hex
            # Out of the way while nobody can claim it; the slow part follows without the lock.
            with suppress(ServerError):
                rename(self._objects / digest, doomed)
        _remove(doomed)


def digest_of(folder: Path) -> str:
    """The digest of an adapter folder: sha256 over the sha256 of its configuration and that of its weights."""
    hashes = []
    for name in FILE_NAMES:
        with (folder / name).open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").digest())
    return _pair_digest(*hashes)


def _pair_digest(config_hash: bytes, weights_hash: bytes) -> str:
    return hashlib.sha256(config_hash + weights_hash).hexdigest()


def _is_intact(folder: Path, digest: str) -> bool:
    try:
        return digest_of(folder) == digest
    except OSError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_record(path: Path) -> AdapterRecord | None:
    """A name's record, or None if its file is damaged: the others must not suffer for it."""
    try:
        record = decode_record(path.read_bytes())
        if path.name != f"{record.name}.json":
            raise ValueError("the record is that of another name")
    except (OSError, ValueError) as error:
        logger.error("%s is left alone: %s", path.name, error)
        return None
    return record


def _remove(path: Path) -> None:
    """Remove a file or a folder tree; what cannot be removed is left to the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
