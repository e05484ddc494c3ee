"""AdapterService: what can be done with adapters by name."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from server.adapters.intake import AdapterIntake, Fill
from server.adapters.lease import Lease, RegistryStats
from server.adapters.record import AT_ONCE, Publication
from server.adapters.registry import AdapterRegistry
from server.adapters.store import AdapterRecord, AdapterStore, History, check_name
from server.adapters.tiers import Usage
from server.errors import ConflictError, InvalidRequestError, ServerError

__all__ = ["AdapterService", "AdapterView"]

logger = logging.getLogger(__name__)

UNUSED = Usage()


@dataclass(frozen=True, slots=True)
class AdapterView:
    """One generation as it is at this moment.

    Attributes:
        is_current: the bare name means it.
        is_pinned: the name's current generation stays in a slot.
        residency: "slot", "host" or "store".
        usage: since the start; shared by all names that have the same contents.
    """

    record: AdapterRecord
    is_current: bool
    is_pinned: bool
    residency: str
    usage: Usage


class AdapterService:
    """Adapters by name: upload, list, delete, and leases for requests. All methods may be called from any thread.

    Wherever a name is read, `name@generation` is too.

    Args:
        base_names: names that mean the base model and cannot be given to an adapter.
    """

    def __init__(
        self,
        store: AdapterStore,
        registry: AdapterRegistry,
        intake: AdapterIntake,
        *,
        base_names: frozenset[str],
        max_rank: int,
    ) -> None:
        self._store = store
        self._registry = registry
        self._intake = intake
        self._max_rank = max_rank
        self._base_names = base_names
        self.started_at = int(time.time())

    def open_lease(self, weights: Mapping[str, float]) -> Lease | None:
        """Claim adapters by name for a request; None if only the base model is wanted.

        Raises:
            NotFoundError: one does not exist.
            InvalidRequestError: more adapters than there are slots.
        """
        by_digest: dict[str, float] = {}
        generations: dict[str, int] = {}
        for name, weight in weights.items():
            record = self._store.get(name)
            generations[name] = record.generation
            by_digest[record.digest] = by_digest.get(record.digest, 0.0) + weight
        by_digest = {digest: weight for digest, weight in by_digest.items() if weight}
        return self._registry.open_lease(by_digest, generations) if by_digest else None

    def records(self) -> list[AdapterRecord]:
        """The current generation of every adapter, by name."""
        return self._store.records()

    def get(self, name: str) -> AdapterRecord:
        """One adapter; NotFoundError if there is none."""
        return self._store.get(name)

    def views(self) -> list[AdapterView]:
        """The current generation of every adapter, by name, as they are now."""
        stats = self._registry.stats()
        shown = [(history, history.current_record) for history in self._store.histories()]
        return [_view(history, record, stats) for history, record in shown if record is not None]

    def view(self, record: AdapterRecord) -> AdapterView:
        """A generation as it is now; it may have been deleted since."""
        return _view(self._store.peek(record.name), record, self._registry.stats([record.digest]))

    def generations(self, name: str) -> list[AdapterView]:
        """All kept generations of a name, newest first; NotFoundError if there are none."""
        history = self._store.history(name)
        stats = self._registry.stats(history.digests)
        return [_view(history, record, stats) for record in reversed(history.generations)]

    def names_by_digest(self) -> dict[str, str]:
        """Names of current generations by digest."""
        return {record.digest: record.name for record in self._store.records()}

    def upload_files(
        self, name: str, files: Mapping[str, BinaryIO], publication: Publication = AT_ONCE
    ) -> AdapterRecord:
        """Check and publish an adapter from its files by their names; durable when this returns.

        Raises:
            InvalidAdapterError, InvalidRequestError, TooLargeError: it is refused.
            ConflictError: another generation is current than expected.
            StorageFullError, UnavailableError: it cannot be kept.
        """
        return self._upload(name, self._intake.from_files(files), publication)

    def upload_archive(self, name: str, archive: BinaryIO, publication: Publication = AT_ONCE) -> AdapterRecord:
        """The same from a zip, tar or tar.gz of the adapter's folder."""
        return self._upload(name, self._intake.from_archive(archive), publication)

    def import_folder(
        self, name: str, source: Path, publication: Publication = AT_ONCE, *, converted: str = ""
    ) -> AdapterRecord:
        """The same from a folder of this machine, named by whoever runs the server; waits for its turn.

        Args:
            converted: how it was made plain before it came here.
        """
        return self._upload(name, self._intake.from_folder(source), publication, converted=converted, waits=True)

    def delete(self, name: str, *, expected_generation: int | None = None) -> AdapterRecord:
        """Hide an adapter at once; its bytes go when the last request that uses them has ended."""
        gone = self._store.delete(name, expected_generation=expected_generation)
        self._forget(gone.digests)
        self.apply_pins()
        return gone.current_record or gone.generations[-1]

    def delete_generation(self, name: str, generation: int) -> AdapterRecord:
        """Drop a generation that is not current."""
        record = self._store.delete_generation(name, generation)
        self._forget({record.digest})
        return record

    def promote(self, name: str, generation: int, *, expected_generation: int | None = None) -> AdapterRecord:
        """Make a kept generation the current one, for requests that begin from now on."""
        record = self._store.promote(name, generation, expected_generation=expected_generation)
        self.apply_pins()
        return record

    def rollback(self, name: str, *, expected_generation: int | None = None) -> AdapterRecord:
        """Make the next older kept generation the current one."""
        record = self._store.rollback(name, expected_generation=expected_generation)
        self.apply_pins()
        return record

    def annotate(
        self, name: str, generation: int | None, labels: Mapping[str, str] | None, note: str | None
    ) -> AdapterRecord:
        """Replace a generation's labels and note, those that are given."""
        return self._store.annotate(name, generation, labels, note)

    @property
    def max_slots(self) -> int:
        return self._registry.max_slots

    @property
    def max_rank(self) -> int:
        return self._max_rank

    def peek(self, name: str) -> History:
        """All that is kept under a name, which may be nothing."""
        return self._store.peek(name)

    def existed(self, name: str) -> bool:
        """An adapter of this name exists, or did once."""
        return self._store.has_history(name)

    def folded_bytes(self, digest: str) -> int:
        """Size of an adapter's arrays in memory, as far as its check at upload tells; 0 if it is gone."""
        return self._store.folded_bytes(digest)

    def tiers(self) -> RegistryStats:
        """What is where, and how often adapters were found there."""
        return self._registry.stats()

    def warm(self, name: str) -> "Future[None]":
        """Bring an adapter into a slot, after what requests wait for; see `AdapterRegistry.warm`."""
        return self._registry.warm(self._store.get(name).digest)

    def evict(self, name: str) -> AdapterRecord:
        """Free an adapter's memory, once the requests that use it have ended.

        Raises:
            ConflictError: it is pinned.
        """
        record = self._store.get(name)
        if record.digest in self._registry.pinned:
            raise ConflictError(f"{name!r} is pinned", code="adapter_pinned")
        self._registry.evict(record.digest)
        return record

    def pin(self, name: str) -> AdapterRecord:
        """Keep the name's current generation, whichever it is, in a slot; it is brought there.

        Raises:
            ConflictError: code `pin_limit`, more than half of the slots or of their bytes would be pinned.
        """
        record = self._store.get(name)
        pinned = self._pinned_digests() | {record.digest}
        num_bytes = sum(map(self._store.folded_bytes, pinned))
        if len(pinned) > self._registry.max_slots // 2 or num_bytes > self._registry.max_slot_bytes // 2:
            raise ConflictError("at most half of the slots and of their memory can be pinned", code="pin_limit")
        record = self._store.set_pinned(name, True)
        self.apply_pins()
        return record

    def unpin(self, name: str) -> AdapterRecord:
        """Let the name's generations come and go again."""
        record = self._store.set_pinned(name, False)
        self.apply_pins()
        return record

    def apply_pins(self) -> None:
        """Pin what the names that are pinned mean now, as far as half of the slots and their bytes go; warm it."""
        old = self._registry.pinned
        new: set[str] = set()
        num_bytes = 0
        for digest in sorted(self._pinned_digests(), key=lambda one: one not in old):
            num_bytes += self._store.folded_bytes(digest)
            if len(new) < self._registry.max_slots // 2 and num_bytes <= self._registry.max_slot_bytes // 2:
                new.add(digest)
            else:
                logger.warning("adapter %s stays unpinned: half of the slots' memory is pinned", digest)
        if new != old:
            self._registry.set_pinned(new)
        for digest in new - set(old):
            with suppress(ServerError):  # it is read when it is asked for, and fails then
                self._registry.warm(digest)

    def _pinned_digests(self) -> set[str]:
        pinned = (history.current_record for history in self._store.histories() if history.is_pinned)
        return {record.digest for record in pinned if record is not None}

    def _forget(self, digests: set[str]) -> None:
        for digest in digests:
            if not self._store.is_pointed_to(digest):
                self._registry.forget(digest)

    def check_name(self, name: str) -> None:
        """Raises InvalidRequestError unless an adapter can have this name."""
        check_name(name)
        if name in self._base_names:
            raise InvalidRequestError(f"{name!r} names the base model", code="adapter_name_invalid", param="name")

    def _upload(
        self, name: str, fill: Fill, publication: Publication, *, converted: str = "", waits: bool = False
    ) -> AdapterRecord:
        self.check_name(name)
        with self._store.staging_folder() as staged:
            fill(staged)
            folder, details = self._intake.check(
                staged, max_folded_bytes=self._registry.max_slot_bytes, converted=converted, waits=waits
            )
            before = self._store.peek(name).digests
            record = self._store.publish(name, folder, details, publication)
        self._forget(before - self._store.peek(name).digests)  # those that the new generation pushed out
        self.apply_pins()
        return record


def _view(history: History, record: AdapterRecord, stats: RegistryStats) -> AdapterView:
    is_current = history.current == record.generation
    digest = record.digest
    residency = "slot" if digest in stats.slots else "host" if digest in stats.host else "store"
    usage = stats.usage.get(digest, UNUSED)
    return AdapterView(record, is_current, is_current and history.is_pinned, residency, usage)
