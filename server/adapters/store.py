"""The store: adapters on disk, durable, as plain PEFT folders under the digest of their contents.

    layout                                                              which layout this is
    objects/<digest>/adapter_config.json, adapter_model.safetensors     immutable; copy one out with any tool
    names/<name>.json                                                   the name's history; replaced atomically
    staging/                                                            uploads on their way; emptied at the start

An upload is safe against a crash at any moment because the name moves last: first the files are on the disk, then the
object is, then the name's history has it, and only then is the caller told. A name has generations, each immutable;
one of them is current. Every change can be made to depend on which one that is (`expected_generation`).
"""

import json
import logging
import shutil
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from server.adapters.digest_index import DigestIndex
from server.adapters.objects import CONFIG_NAME, FILE_NAMES, WEIGHTS_NAME, ObjectFolder, digest_of, remove
from server.adapters.record import (
    AT_ONCE,
    AdapterRecord,
    History,
    Publication,
    check_labels,
    check_name,
    decode_history,
    encode_history,
    split_reference,
    within_quota,
)
from server.adapters.store_folder import StoreFolder
from server.durable import rename, storage_errors, sync_file, sync_folder, write_file
from server.errors import ConflictError, NotFoundError, StorageFullError
from server.failpoints import failpoint

__all__ = ["CONFIG_NAME", "FILE_NAMES", "WEIGHTS_NAME", "AdapterRecord", "AdapterStore", "History", "check_name"]

logger = logging.getLogger(__name__)


class AdapterStore:
    """A folder of adapters. Thread-safe; used by one process at a time, which a lock on the folder holds it to.

    Args:
        min_free_bytes: uploads are refused when the disk has less free space than this.
        max_generations: kept under a name, at least 2; publishing one more drops the oldest that is not current.
    """

    def __init__(self, root: Path, *, min_free_bytes: int = 0, max_generations: int = 10) -> None:
        self._folder = StoreFolder(root)
        self._names, self._staging = self._folder.names, self._folder.staging
        self._min_free_bytes = min_free_bytes
        self._max_generations = max_generations
        self._objects = ObjectFolder(self._folder.objects, self._staging)
        self._changing = threading.Lock()  # one change of a name at a time
        self._lock = threading.Lock()  # around the books below; never held while files are read or written
        self._histories: dict[str, History] = {}
        self._index = DigestIndex()
        # What failed writes may have left in a name's file, until the next one succeeds. A crash may bring it to
        # light, so its bytes stay.
        self._doubtful: dict[str, list[History]] = {}
        self._has_damage = False
        self.hold = self._objects.hold
        self.release = self._objects.release
        self.read = self._objects.read

    def open(self) -> None:
        """Create what is missing, clear what a crash left behind, and read the names.

        Raises:
            StorageFullError, UnavailableError: the folder cannot be used; code `store_in_use` if another process does,
                `store_layout_unknown` if another version wrote it.
        """
        with storage_errors():
            self._folder.open()
            for leftover in self._staging.iterdir():
                remove(leftover)
            found = [_read_history(path) for path in sorted(self._names.glob("*.json"))]
            self._histories = {history.name: history for history in found if history is not None}
            self._has_damage = None in found  # a damaged record may point to any object: remove none
            self._index = DigestIndex()
            for history in self._histories.values():
                self._index.add(history)
            self._objects.open(self._index.elements(), remove_others=not self._has_damage)

    def close(self) -> None:
        """Let other processes have the folder. Nothing is pending: everything is on the disk already."""
        self._folder.close()

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
            remove(folder)

    def publish(
        self, name: str, folder: Path, details: Mapping[str, Any], publication: Publication = AT_ONCE
    ) -> AdapterRecord:
        """Publish the two files of a staging folder under a name; on the disk when this returns.

        Contents that a kept generation of the name has already are that generation, which becomes the current one.

        Raises:
            InvalidRequestError: the name, the labels or the note cannot be used.
            ConflictError: another generation is current than expected.
            QuotaExceededError: more would be kept for its owner than the quota allows.
            StorageFullError, UnavailableError: it cannot be written. The name means what it meant; after a crash, it
                may mean this.
        """
        check_name(name)
        check_labels(publication.labels or {}, publication.note or "")
        digest, num_bytes = _make_durable(folder)
        kept_details = json.loads(json.dumps(dict(details)))
        published: list[AdapterRecord] = []

        def change(old: History) -> History:
            record = next((one for one in old.generations if one.digest == digest), None)
            if record is None:
                record = AdapterRecord(name, digest, old.num_published + 1, _now(), num_bytes, kept_details)
                record = replace(record, source=dict(publication.source))
            if publication.labels is not None:
                record = replace(record, labels=dict(publication.labels))
            if publication.note is not None:
                record = replace(record, note=publication.note)
            published.append(record)
            new = old.with_record(record)
            if publication.promote:
                new = replace(new, current=record.generation)
            new = new.pruned(self._max_generations)
            return within_quota(publication.quota, self.histories(), old, new)

        with self._objects.using(digest):
            place = partial(self._objects.place, folder, digest)
            self._change(name, publication.expected_generation, change, before=place)
        return published[0]

    def promote(self, name: str, generation: int, *, expected_generation: int | None = None) -> AdapterRecord:
        """Make a kept generation the current one.

        Raises:
            NotFoundError: there is no such generation.
            ConflictError: another generation is current than expected.
        """

        def change(old: History) -> History:
            self._record(old, generation)
            return replace(old, current=generation)

        return self._record(self._change(name, expected_generation, change), generation)

    def rollback(self, name: str, *, expected_generation: int | None = None) -> AdapterRecord:
        """Make the newest generation that is older than the current one current.

        Raises:
            NotFoundError: there is no such adapter.
            ConflictError: another generation is current than expected, or no older one is kept.
        """

        def change(old: History) -> History:
            self._record(old, None)
            older = [record.generation for record in old.generations if record.generation < old.current]
            if not older:
                raise ConflictError(
                    f"no generation older than {old.current} is kept",
                    code="generation_conflict",
                    details={"current_generation": old.current},
                )
            return replace(old, current=older[-1])

        return self._record(self._change(name, expected_generation, change), None)

    def annotate(
        self, name: str, generation: int | None, labels: Mapping[str, str] | None, note: str | None
    ) -> AdapterRecord:
        """Replace a generation's labels and note, those that are given; NotFoundError if there is none."""
        check_labels(labels or {}, note or "")

        def change(old: History) -> History:
            record = self._record(old, generation)
            with_labels = record if labels is None else replace(record, labels=dict(labels))
            return old.with_record(with_labels if note is None else replace(with_labels, note=note))

        return self._record(self._change(name, None, change), generation)

    def set_pinned(self, name: str, is_pinned: bool) -> AdapterRecord:
        """Remember that the name's current generation is to stay in a slot; NotFoundError if there is none."""

        def change(old: History) -> History:
            self._record(old, None)
            return replace(old, is_pinned=is_pinned)

        return self._record(self._change(name, None, change), None)

    def delete(self, name: str, *, expected_generation: int | None = None) -> History:
        """Hide a name with all of its generations, durably; bytes go when nobody holds them. Returns what there was.

        Raises:
            NotFoundError: there is no such adapter.
            ConflictError: another generation is current than expected.
            StorageFullError, UnavailableError: it cannot be written; the name is still there.
        """
        gone: list[History] = []

        def change(old: History) -> History:
            if not old.generations:
                raise _not_found(name)
            gone.append(old)
            return History(name, num_published=old.num_published)

        self._change(name, expected_generation, change)
        return gone[0]

    def delete_generation(self, name: str, generation: int) -> AdapterRecord:
        """Drop one generation that is not current.

        Raises:
            NotFoundError: there is no such generation.
            ConflictError: it is the current one.
        """
        gone: list[AdapterRecord] = []

        def change(old: History) -> History:
            gone.append(self._record(old, generation))
            if generation == old.current:
                raise ConflictError(
                    f"generation {generation} of {name!r} is the current one",
                    code="generation_conflict",
                    details={"current_generation": old.current},
                )
            return replace(old, generations=tuple(one for one in old.generations if one.generation != generation))

        self._change(name, None, change)
        return gone[0]

    def get(self, reference: str) -> AdapterRecord:
        """What `name` or `name@generation` means; NotFoundError if it does not exist."""
        name, generation = split_reference(reference)
        return self._record(self.peek(name), generation)

    def history(self, name: str) -> History:
        """All that is kept under a name; NotFoundError if that is nothing."""
        history = self.peek(name)
        if not history.generations:
            raise _not_found(name)
        return history

    def has_history(self, name: str) -> bool:
        """An adapter of this name exists, or did once."""
        with self._lock:
            return name in self._histories

    def peek(self, name: str) -> History:
        """All that is kept under a name, which may be nothing."""
        with self._lock:
            return self._histories.get(name, History(name))

    def records(self) -> list[AdapterRecord]:
        """The current generation of every adapter, by name."""
        current = [history.current_record for history in self.histories()]
        return [record for record in current if record is not None]

    def histories(self) -> list[History]:
        """All adapters, by name."""
        with self._lock:
            found = [history for history in self._histories.values() if history.generations]
        return sorted(found, key=lambda history: history.name)

    def folder_of(self, digest: str) -> Path:
        """Where an object is; only for who holds it."""
        return self._folder.objects / digest

    def is_pointed_to(self, digest: str) -> bool:
        """Some generation of some name has these contents."""
        with self._lock:
            return digest in self._index

    def folded_bytes(self, digest: str) -> int:
        """Size of an adapter's arrays in memory, as far as its check at upload tells; 0 if it is gone."""
        with self._lock:
            return self._index.folded_bytes(digest)

    def check_integrity(self) -> None:
        """Assert that names, objects and holds agree; while nothing is under way."""
        with self._lock:
            pointing = [*self._histories.values(), *(h for left in self._doubtful.values() for h in left)]
        counted = Counter(digest for history in pointing for digest in history.digests)
        self._objects.check_integrity(counted, has_strays=self._has_damage)
        assert not list(self._staging.iterdir()), "uploads left behind"

    @staticmethod
    def _record(history: History, generation: int | None) -> AdapterRecord:
        record = history.get(history.current if generation is None else generation)
        if record is None:
            raise _not_found(history.name if generation is None else f"{history.name}@{generation}")
        return record

    def _change(
        self,
        name: str,
        expected_generation: int | None,
        change: Callable[[History], History],
        *,
        before: Callable[[], None] = lambda: None,
    ) -> History:
        """Replace a name's history, durably, if the expected generation is current; nobody else comes between."""
        with self._changing:
            old = self._histories.get(name, History(name))
            if expected_generation is not None and expected_generation != old.current:
                raise ConflictError(
                    f"generation {old.current} of {name[:128]!r} is current, not {expected_generation}",
                    code="generation_conflict",
                    param="expected_generation",
                    details={"current_generation": old.current},
                )
            doubtful = self._doubtful.get(name, ())
            old = replace(old, num_published=max(one.num_published for one in (old, *doubtful)))
            new = change(old)
            before()
            if new != old or doubtful:
                self._point(new)
            return new

    def _point(self, history: History) -> None:
        """Make this the name's history, first on the disk; then let go of what only the former ones pointed to."""
        name, temporary = history.name, self._staging / uuid.uuid4().hex
        try:
            write_file(temporary, encode_history(history))
            failpoint("record.written")
            with self._lock:
                self._doubtful.setdefault(name, []).append(history)
            self._objects.use(history.digests)
            rename(temporary, self._names / f"{name}.json")
            failpoint("record.renamed")
            sync_folder(self._names)
            failpoint("record.synced")
        finally:
            remove(temporary)
        with self._lock:
            outdated = self._doubtful.pop(name)[:-1]
            if name in self._histories:
                outdated.append(self._histories[name])
                self._index.remove(self._histories[name])
            self._histories[name] = history
            self._index.add(history)
        for old in outdated:
            self._objects.unuse(old.digests)


def _make_durable(folder: Path) -> tuple[str, int]:
    """Force a staged folder to the disk; returns its digest and its size in bytes."""
    with storage_errors():
        failpoint("upload.staged")
        for file_name in FILE_NAMES:
            sync_file(folder / file_name)
        failpoint("upload.files_synced")
        sync_folder(folder)
        failpoint("upload.folder_synced")
        return digest_of(folder), sum((folder / file_name).stat().st_size for file_name in FILE_NAMES)


def _not_found(reference: str) -> NotFoundError:
    shown = reference[:128].encode("ascii", "backslashreplace").decode()
    return NotFoundError(f"there is no adapter {shown!r}", code="adapter_not_found", param="adapter")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_history(path: Path) -> History | None:
    """A name's history, or None if its file is damaged: the others must not suffer for it."""
    try:
        history = decode_history(path.read_bytes())
        if path.name != f"{history.name}.json":
            raise ValueError("the record is that of another name")
    except (OSError, ValueError) as error:
        logger.error("%s is left alone: %s", path.name, error)
        return None
    return history
