"""The registry: which adapters are in host memory, which are in slots, and who holds them.

    store (all, on disk)  ->  host memory (least recently used go, by bytes)  ->  slots (least recently used go)

Plain bookkeeping without tensors. Everything slow — reading, folding, copying into a slot — runs on the registry's own
threads; what the engine calls never waits for it. An adapter stays in its slot while a lease is active on it, and its
bytes stay in the store while a lease is open on it.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from server.errors import GenerationError, InvalidRequestError, ServerError
from server.leases import LeaseState

__all__ = ["AdapterRegistry", "HostAdapter", "Lease", "RegistryStats", "SlotStore", "StoreHolds"]

logger = logging.getLogger(__name__)

NUM_THREADS = 2
EMPTY: Mapping[str, int] = MappingProxyType({})


class HostAdapter(Protocol):
    """A folded adapter in host memory."""

    @property
    def num_bytes(self) -> int: ...


class SlotStore(Protocol):
    """The engine's slots."""

    @property
    def max_slots(self) -> int: ...

    def load(self, slot: int, adapter: HostAdapter) -> None: ...

    def free(self, slot: int) -> None: ...


class StoreHolds(Protocol):
    """Keeps the bytes of an adapter in the store."""

    def hold(self, digest: str) -> None: ...

    def release(self, digest: str) -> None: ...


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """Counters since the start, and what is where now."""

    slots: Mapping[str, int]
    host: Mapping[str, int]
    num_loads: int
    num_slot_hits: int
    num_slot_misses: int
    num_failures: int


@dataclass(eq=False, slots=True)
class _Entry:
    """One adapter by digest.

    Attributes:
        slot: its slot, from the moment it is reserved.
        is_ready: its arrays are in the slot.
        num_active: leases that rely on the slot.
        last_used: a count, not a clock.
        is_doomed: nobody can ask for it by name any more; gone with its last lease.
    """

    digest: str
    host: HostAdapter | None = None
    slot: int | None = None
    is_ready: bool = False
    error: ServerError | None = None
    num_active: int = 0
    num_open: int = 0
    last_used: int = 0
    is_doomed: bool = False


@dataclass(eq=False, slots=True)
class Lease:
    """A request's claim on some adapters; fits the engine's `AdapterLease`.

    Attributes:
        weights: weight by digest.
        generations: generation by name, as it was when the lease was opened; for the answer.
    """

    registry: "AdapterRegistry"
    weights: Mapping[str, float]
    generations: Mapping[str, int] = field(default_factory=dict)
    is_active: bool = False
    is_open: bool = True
    slots: dict[object, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        return tuple(sorted(self.weights.items()))

    def activate(self) -> LeaseState:
        return self.registry.activate(self)

    def deactivate(self) -> None:
        self.registry.deactivate(self)

    def release(self) -> None:
        self.registry.release(self)


class AdapterRegistry:
    """Tiers of adapters by content digest.

    Args:
        store: keeps an adapter's bytes while a lease is open.
        read: digest -> adapter folded for the served model; slow, runs on the registry's threads.
        slots: where adapters are used.
        max_host_bytes: budget of the host tier; the adapter being loaded may exceed it for a moment.
        on_change: called when a lease may have become ready, on any thread; must not wait.
    """

    def __init__(
        self,
        store: StoreHolds,
        read: Callable[[str], HostAdapter],
        slots: SlotStore,
        *,
        max_host_bytes: int,
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._read = read
        self._slots = slots
        self._max_host_bytes = max_host_bytes
        self._on_change = on_change
        self._lock = threading.Lock()
        self._slots_lock = threading.Lock()  # around freeing and loading: a slot changes hands in one piece
        self._entries: dict[str, _Entry] = {}
        self._owners: list[_Entry | None] = [None] * slots.max_slots
        self._occupied = [False] * slots.max_slots  # a former owner's arrays are still in the slot
        self._clock = 0
        self._num_loads = self._num_hits = self._num_misses = self._num_failures = 0
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="loramux-adapters")

    def close(self) -> None:
        """Stop the threads; loads under way are finished, queued ones dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def open_lease(self, weights: Mapping[str, float], generations: Mapping[str, int] = EMPTY) -> Lease:
        """Claim adapters by digest; their bytes stay until the lease is released.

        Raises:
            InvalidRequestError: more adapters than there are slots.
            NotFoundError: the store has lost one of them in the meantime.
        """
        if len(weights) > self._slots.max_slots:
            raise InvalidRequestError(
                f"a request can mix {self._slots.max_slots} adapters at most, not {len(weights)}",
                code="too_many_adapters",
                param="adapters",
            )
        held: list[str] = []
        try:
            for digest in weights:
                self._store.hold(digest)
                held.append(digest)
        except ServerError:
            for digest in held:
                self._store.release(digest)
            raise
        with self._lock:
            for digest in weights:
                entry = self._entries.setdefault(digest, _Entry(digest))
                entry.num_open += 1
                entry.is_doomed = False
        return Lease(self, weights, generations)

    def activate(self, lease: Lease) -> LeaseState:
        """See `AdapterLease.activate`."""
        with self._lock:
            entries = [self._entries[digest] for digest in lease.weights]
            failed = next((entry.error for entry in entries if entry.error is not None), None)
            if failed is not None:
                raise failed
            if not lease.is_active and not self._reserve(entries):
                return LeaseState.NO_SLOT
            if not lease.is_active:
                lease.is_active = True
                for entry in entries:
                    entry.num_active += 1
                    entry.last_used = self._clock = self._clock + 1
            if not all(entry.is_ready for entry in entries):
                return LeaseState.LOADING
            if not lease.slots:
                lease.slots = {entry.slot: lease.weights[entry.digest] for entry in entries}
            return LeaseState.READY

    def deactivate(self, lease: Lease) -> None:
        """See `AdapterLease.deactivate`."""
        with self._lock:
            self._deactivate(lease)

    def release(self, lease: Lease) -> None:
        """See `AdapterLease.release`."""
        with self._lock:
            if not lease.is_open:
                return
            lease.is_open = False
            self._deactivate(lease)
            for digest in lease.weights:
                entry = self._entries[digest]
                entry.num_open -= 1
                if not entry.num_open:
                    entry.error = None  # the next request tries again
                    self._drop_if_doomed(entry)
        for digest in lease.weights:
            self._store.release(digest)
        self._on_change()

    def forget(self, digest: str) -> None:
        """Nobody can ask for this adapter any more: free its memory once its last lease is released."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                entry.is_doomed = True
                self._drop_if_doomed(entry)

    def stats(self) -> RegistryStats:
        with self._lock:
            return RegistryStats(
                slots={e.digest: e.slot for e in self._entries.values() if e.slot is not None and e.is_ready},
                host={e.digest: e.host.num_bytes for e in self._entries.values() if e.host is not None},
                num_loads=self._num_loads,
                num_slot_hits=self._num_hits,
                num_slot_misses=self._num_misses,
                num_failures=self._num_failures,
            )

    def check_integrity(self, *, is_idle: bool = False) -> None:
        """Assert that entries and slots agree; with `is_idle`, that nobody holds anything."""
        with self._lock:
            for slot, owner in enumerate(self._owners):
                assert owner is None or (owner.slot == slot and self._entries[owner.digest] is owner)
            for entry in self._entries.values():
                assert 0 <= entry.num_active <= entry.num_open
                assert entry.slot is None or self._owners[entry.slot] is entry
                assert entry.slot is not None or not entry.is_ready
                assert not entry.num_active or entry.slot is not None or entry.error is not None
                assert not is_idle or not entry.num_open, f"{entry.digest} is still leased"

    def _reserve(self, entries: list[_Entry]) -> bool:
        """Give a slot to every entry that has none, all or nothing; loading starts on the registry's threads."""
        missing = [entry for entry in entries if entry.slot is None]
        free = [slot for slot, owner in enumerate(self._owners) if owner is None]
        idle = sorted(
            (e for e in self._owners if e is not None and not e.num_active and e.is_ready and e not in entries),
            key=lambda entry: entry.last_used,
        )
        if len(missing) > len(free) + len(idle):
            return False
        self._num_hits += len(entries) - len(missing)
        self._num_misses += len(missing)
        for entry in missing:
            if not free:
                free.append(self._evict(idle.pop(0)))
            slot = free.pop(0)
            entry.slot = slot
            self._owners[slot] = entry
            self._threads.submit(self._load, entry, slot)
        return True

    def _evict(self, entry: _Entry) -> int:
        """Take an idle entry's slot away. Its arrays stay there until the next owner's are loaded."""
        slot = entry.slot
        assert slot is not None
        entry.slot, entry.is_ready = None, False
        self._owners[slot] = None
        if entry.host is None and not entry.num_open:
            del self._entries[entry.digest]
        return slot

    def _deactivate(self, lease: Lease) -> None:
        if not lease.is_active:
            return
        lease.is_active = False
        lease.slots = {}
        for digest in lease.weights:
            entry = self._entries[digest]
            entry.num_active -= 1
            self._drop_if_doomed(entry)

    def _drop_if_doomed(self, entry: _Entry) -> None:
        if not entry.is_doomed or entry.num_open or (entry.slot is not None and not entry.is_ready):
            return
        entry.host = None
        if entry.slot is not None:
            slot = self._evict(entry)
            self._threads.submit(self._clear, slot)
        self._entries.pop(entry.digest, None)

    def _load(self, entry: _Entry, slot: int) -> None:
        """On a registry thread: bring an adapter from wherever it is into its slot."""
        error: ServerError | None = None
        try:
            host = entry.host or self._read(entry.digest)
            with self._slots_lock:
                self._empty(slot)
                self._slots.load(slot, host)
                self._occupied[slot] = True
        except ServerError as caught:
            error = caught
        except Exception as caught:
            logger.exception("an adapter could not be loaded")
            error = GenerationError(
                f"the adapter cannot be loaded: {type(caught).__name__}", code="adapter_load_failed"
            )
        with self._lock:
            if error is None:
                self._num_loads += 1
                entry.is_ready = True
                entry.host = host
                entry.last_used = self._clock = self._clock + 1
                self._shrink_host()
            else:
                self._num_failures += 1
                entry.error = error if entry.num_open else None
                entry.slot = None
                self._owners[slot] = None
            self._drop_if_doomed(entry)
        self._on_change()

    def _clear(self, slot: int) -> None:
        """On a registry thread: empty a slot that nobody has taken since."""
        with self._slots_lock:
            if self._owners[slot] is None:
                self._empty(slot)

    def _empty(self, slot: int) -> None:
        if self._occupied[slot]:
            self._occupied[slot] = False
            self._slots.free(slot)

    def _shrink_host(self) -> None:
        """Drop host copies, least recently used first, until the budget holds."""
        held = sorted((e for e in self._entries.values() if e.host is not None), key=lambda entry: entry.last_used)
        total = sum(entry.host.num_bytes for entry in held if entry.host is not None)
        for entry in held:
            if total <= self._max_host_bytes:
                return
            assert entry.host is not None
            total -= entry.host.num_bytes
            entry.host = None
            if entry.slot is None and not entry.num_open:
                del self._entries[entry.digest]
