"""Objects: immutable adapter folders under the digest of their contents, counted by who uses them.

Uses are the generations that point to an object, requests that hold it, and uploads on their way. With the last use it
goes: first out of the way in one rename, so that nobody can claim half of it, then its bytes.
"""

import hashlib
import logging
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from server.durable import rename, sync_folder
from server.errors import NotFoundError, ServerError, UnavailableError
from server.failpoints import failpoint

__all__ = [
    "CONFIG_NAME",
    "FILE_NAMES",
    "INITIAL_NAME",
    "PICKLE_NAME",
    "PICKLE_REFUSAL",
    "PIECE_BYTES",
    "WEIGHTS_NAME",
    "ObjectFolder",
    "digest_of",
    "remove",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

PIECE_BYTES = 8 << 20
# lora_core's names, repeated: what only moves files need not import torch.
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
PICKLE_NAME = "adapter_model.bin"
PICKLE_REFUSAL = "pickle files can run code and are not read; save the adapter with `safe_serialization=True`"
INITIAL_NAME = "initial"  # folder beside the two files: the same adapter as it was before its training


class ObjectFolder:
    """A folder of objects. Thread-safe.

    Args:
        root: where they are.
        staging: on the same file system; what is on its way in or out.
    """

    def __init__(self, root: Path, staging: Path) -> None:
        self.root = root
        self._staging = staging
        self._lock = threading.Lock()  # around the counts; never held while files are read or written
        self._holds: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()  # holds and all others; at 0 the object goes

    def open(self, used: Iterable[str], *, remove_others: bool) -> None:
        """Start counting: `used` has each object once for each generation that points to it."""
        self._uses, self._holds = Counter(used), Counter()
        if remove_others:
            for folder in self.root.iterdir():
                if folder.name not in self._uses:
                    remove(folder)

    def place(self, folder: Path, digest: str) -> None:
        """Move a staged folder to where its digest says, unless it is there; a damaged one makes room."""
        target = self.root / digest
        if not _is_intact(target, digest):
            remove(target)
            rename(folder, target)
            failpoint("object.renamed")
        sync_folder(self.root)
        failpoint("object.synced")

    def use(self, digests: Iterable[str]) -> None:
        with self._lock:
            self._uses.update(digests)

    def unuse(self, digests: Iterable[str]) -> None:
        """Give up one use of each; with the last one an object goes. A failure leaves its bytes to the next start."""
        for digest in digests:
            self._unuse(digest)

    @contextmanager
    def using(self, digest: str) -> Iterator[None]:
        """Keep an object that nothing points to yet."""
        self.use([digest])
        try:
            yield
        finally:
            self._unuse(digest)

    def hold(self, digest: str) -> None:
        """Keep an object's bytes until `release`, whatever becomes of those that point to it.

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

    def read(self, digest: str, use: Callable[[bytes, memoryview], T]) -> T:
        """What `use` makes of the configuration's and the weights' bytes, which it must leave as they are.

        They are compared with the digest meanwhile, on another core: that takes as long as reading them.

        Raises:
            UnavailableError: code `adapter_corrupt`, a file is damaged or missing, whatever `use` says of it.
        """
        config_hash, weights_hash = hashlib.sha256(), hashlib.sha256()
        folder = self.root / digest
        with ThreadPoolExecutor(1, "digest") as beside:
            try:
                config = (folder / CONFIG_NAME).read_bytes()
                config_hash.update(config)
                weights = _contents(folder / WEIGHTS_NAME, weights_hash.update, beside)
            except OSError as error:
                logger.error("the files of adapter %s cannot be read: %s", digest, error)
                raise UnavailableError("the adapter's files cannot be read", code="adapter_corrupt") from error
            found = beside.submit(lambda: _pair_digest(config_hash.digest(), weights_hash.digest()))  # the last one
            try:
                return use(config, weights)
            finally:
                if found.result() != digest:
                    logger.error("the files of adapter %s are damaged", digest)
                    raise UnavailableError("the adapter's files are damaged", code="adapter_corrupt")

    def check_integrity(self, pointed_to: Counter[str], *, has_strays: bool) -> None:
        """Assert that the counts are those of `pointed_to` and the holds, and the folders those of the counts."""
        with self._lock:
            assert min(self._holds.values(), default=0) >= 0, "negative holds"
            assert pointed_to + self._holds == +self._uses, "uses are miscounted"
            counted = set(+self._uses)
        found = {path.name for path in self.root.iterdir()}
        assert found >= counted, "an object is missing"
        assert has_strays or found == counted, "an object that nobody points to"
        assert all(set(os.listdir(self.root / digest)) == set(FILE_NAMES) for digest in counted)

    def _unuse(self, digest: str) -> None:
        with self._lock:
            self._uses[digest] -= 1
            if self._uses[digest]:
                return
            failpoint("lease.dropped")
            del self._uses[digest], self._holds[digest]
            doomed = self._staging / uuid.uuid4().hex
            # Out of the way while nobody can claim it; the slow part follows without the lock.
            with suppress(ServerError):
                rename(self.root / digest, doomed)
            failpoint("object.trashed")
        remove(doomed)
        failpoint("object.removed")


def digest_of(folder: Path) -> str:
    """The digest of an adapter folder: sha256 over the sha256 of its configuration and that of its weights."""
    hashes = []
    for name in FILE_NAMES:
        with (folder / name).open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").digest())
    return _pair_digest(*hashes)


def _contents(path: Path, update: Callable[[memoryview], None], beside: Executor) -> memoryview:
    """A file's bytes, each piece of which is given to `update` on the other thread as soon as it is there."""
    with path.open("rb", buffering=0) as file:
        contents, end = np.empty(os.fstat(file.fileno()).st_size, np.uint8).data, 0
        while num_read := file.readinto(contents[end : end + PIECE_BYTES]):
            beside.submit(update, contents[end : end + num_read])
            end += num_read
    return contents[:end]


def remove(path: Path) -> None:
    """Remove a file or a folder tree; what cannot be removed is left to the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _pair_digest(config_hash: bytes, weights_hash: bytes) -> str:
    return hashlib.sha256(config_hash + weights_hash).hexdigest()


def _is_intact(folder: Path, digest: str) -> bool:
    try:
        return digest_of(folder) == digest
    except OSError:
        return False
