"""The registry: which adapters are in host memory, which are in slots, and who holds them.

    store (all, on disk)  ->  host memory (a budget of bytes)  ->  slots (a number, and a budget of bytes)

Plain bookkeeping without tensors. Everything slow — reading, folding, copying into a slot — runs on the registry's own
threads, the most urgent first; what the engine calls never waits for it. An adapter stays in its slot while a lease is
active on it, and its bytes stay in the store while a lease is open on it.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from server.adapters.host_tier import HostTier
from server.adapters.lease import NO_GENERATIONS, Lease, Priority, RegistryStats, StoreAccess
from server.adapters.priority_threads import PriorityThreads
from server.adapters.slot_tier import SlotStore, SlotTier
from server.adapters.tiers import Entry, HostAdapter, Usage
from server.errors import ConflictError, GenerationError, ServerError
from server.leases import LeaseState

__all__ = ["AdapterRegistry"]

logger = logging.getLogger(__name__)

NUM_THREADS = 2
COPIES_AT_ONCE = 64
UNUSED = Usage()


class AdapterRegistry:
    """Tiers of adapters by content digest.

    Args:
        store: keeps an adapter's bytes while a lease is open.
        read: digest -> adapter folded for the served model; slow, runs on the registry's threads.
        slots: where adapters are used.
        max_slot_bytes, max_host_bytes: budgets of the two tiers.
        on_change: called when a lease may have become ready, on any thread; must not wait.
        clock: seconds, for measuring.
    """

    def __init__(
        self,
        store: StoreAccess,
        read: Callable[[str], HostAdapter],
        slots: SlotStore,
        *,
        max_slot_bytes: int,
        max_host_bytes: int,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._read = read
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._slots = SlotTier(slots, max_slot_bytes, on_evict=self._tidy)
        self._host = HostTier(max_host_bytes, on_evict=self._tidy)
        self._entries: dict[str, Entry] = {}
        self._usage: dict[str, Usage] = {}
        self._warming: dict[Lease, Future[None]] = {}
        self._num_failures = 0
        self._num_asked = 0
        self._threads = PriorityThreads(NUM_THREADS, "loramux-adapters")

    @property
    def max_slot_bytes(self) -> int:
        return self._slots.max_bytes

    @property
    def max_slots(self) -> int:
        return self._slots.max_slots

    def close(self) -> None:
        """Stop the threads; work under way is finished, queued work dropped."""
        self._threads.close()

    def open_lease(
        self,
        weights: Mapping[str, float],
        generations: Mapping[str, int] = NO_GENERATIONS,
        priority: Priority = Priority.READ,
    ) -> Lease:
        """Claim adapters by digest; their bytes stay until the lease is released. Cold ones begin to be read.

        Raises:
            InvalidRequestError: they do not fit into the slots together.
            NotFoundError: the store has lost one of them in the meantime.
        """
        held: list[str] = []
        try:
            for digest in weights:
                self._store.hold(digest)
                held.append(digest)
            with self._lock:
                entries = [self._entry(digest) for digest in weights]
                self._slots.check_fits(entries)
                for entry in entries:
                    self._entries[entry.digest] = entry
                    entry.num_open += 1
                    entry.is_doomed = False
                    self._want(entry, max(priority, Priority.PREFETCH))
        except ServerError:
            for digest in held:
                self._store.release(digest)
            raise
        return Lease(self, weights, generations, priority)

    def activate(self, lease: Lease) -> LeaseState:
        """See `AdapterLease.activate`."""
        with self._lock:
            return self._activate(lease)

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
                    entry.asked = entry.asked_before = 0
                    entry.is_partner = False
                    self._tidy(entry)
        for digest in lease.weights:
            self._store.release(digest)
        self._changed()

    def evict(self, digest: str) -> None:
        """Free an adapter's memory, once its last lease is released, unless somebody asks for it again before."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                entry.is_doomed = True
                self._tidy(entry)

    def forget(self, digest: str) -> None:
        """The same, for one that nobody can ask for any more."""
        self.evict(digest)
        with self._lock:
            self._usage.pop(digest, None)

    def warm(self, digest: str) -> "Future[None]":
        """Bring an adapter into a slot, after all that requests wait for.

        Returns:
            Done when it is there; fails with ConflictError (`slots_in_use`) if every slot is in use, and with what
            reading it fails with.

        Raises:
            InvalidRequestError, NotFoundError: see `open_lease`.
        """
        lease = self.open_lease({digest: 1.0}, priority=Priority.WARM)
        done: Future[None] = Future()
        with self._lock:
            self._warming[lease] = done
        self._advance_warming()
        return done

    def set_pinned(self, digests: Collection[str]) -> None:
        """From now on these and no others stay in their slots once they are there."""
        with self._lock:
            self._slots.pinned = frozenset(digests)

    @property
    def pinned(self) -> Collection[str]:
        """Digests of those that stay in their slots."""
        return self._slots.pinned

    def stats(self, digests: Collection[str] | None = None) -> RegistryStats:
        """What is where at one moment.

        Args:
            digests: whose usage is wanted; by default everybody's. It is copied a few adapters at a time, each as it is
                then, so that the engine does not wait for thousands of copies.
        """
        with self._lock:
            wanted = list(self._usage) if digests is None else list(digests)
            stats = RegistryStats(
                slots={e.digest: e.slot for e in self._slots.owners if e.slot is not None and e.is_ready},
                host={e.digest: e.num_bytes for e in self._host.held},
                leases={e.digest: e.num_open for e in self._entries.values() if e.num_open},
                pinned=self._slots.pinned,
                slot_tier=self._slots.stats(),
                host_tier=self._host.stats(),
                slot_allocated_bytes=self._slots.allocated_bytes,
                num_failures=self._num_failures,
            )
        usage: dict[str, Usage] = {}
        for start in range(0, len(wanted), COPIES_AT_ONCE):
            with self._lock:
                found = ((digest, self._usage.get(digest)) for digest in wanted[start : start + COPIES_AT_ONCE])
                usage.update((digest, one.copy()) for digest, one in found if one is not None)
        return replace(stats, usage=usage)

    def usage(self, digest: str) -> Usage:
        """What became of one adapter since the start."""
        with self._lock:
            return self._usage.get(digest, UNUSED).copy()

    def check_integrity(self, *, is_idle: bool = False) -> None:
        """Assert that entries and tiers agree; with `is_idle`, that nobody holds anything."""
        with self._lock:
            self._slots.check_integrity()
            self._host.check_integrity()
            for entry in [*self._slots.owners, *self._host.held]:
                assert self._entries[entry.digest] is entry
            for entry in self._entries.values():
                assert 0 <= entry.num_active <= entry.num_open
                assert entry.slot is None or entry in self._slots.owners
                assert entry.slot is not None or not entry.is_ready
                assert not entry.num_active or entry.slot is not None or entry.error is not None
                assert not is_idle or not entry.num_open, f"{entry.digest} is still leased"

    def _activate(self, lease: Lease) -> LeaseState:
        entries = [self._entries[digest] for digest in lease.weights]
        failed = next((entry.error for entry in entries if entry.error is not None), None)
        if failed is not None:
            raise failed
        if not lease.is_active:
            cold = [entry for entry in entries if entry.slot is None and entry.host is None]
            if lease.priority is Priority.READ:
                self._num_asked += 1
                for entry in entries:
                    entry.asked, entry.asked_before = self._num_asked, entry.asked
            for entry in cold:
                entry.is_partner |= len(cold) < len(entries)
                self._want(entry, lease.priority)
            if cold:
                return LeaseState.LOADING
            self._slots.check_fits(entries)
            if not self._reserve(lease, entries):
                return LeaseState.NO_SLOT
            lease.is_active = True
        if not all(entry.is_ready for entry in entries):
            return LeaseState.LOADING
        if not lease.slots:
            lease.slots = {entry.slot: lease.weights[entry.digest] for entry in entries}
        return LeaseState.READY

    def _entry(self, digest: str) -> Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = Entry(digest, self._store.folded_bytes(digest), self._usage.setdefault(digest, Usage()))
        return entry

    def _want(self, entry: Entry, priority: Priority) -> None:
        """Queue a read, unless it is on its way at least as urgently."""
        if entry.host is not None or entry.slot is not None or entry.is_reading or entry.error is not None:
            return
        if entry.read_priority is None or priority < entry.read_priority:
            entry.read_priority = priority
            self._threads.submit(priority, partial(self._read_into_host, entry))

    def _reserve(self, lease: Lease, entries: list[Entry]) -> bool:
        """Slots for all or none; copying starts on the registry's threads."""
        in_slots = {entry for entry in entries if entry.slot is not None}
        missing = self._slots.reserve(entries)
        if missing is None:
            return False
        for entry in entries:
            entry.num_active += 1
            if lease.priority is Priority.READ and not lease.is_counted:
                self._count(entry, is_in_slot=entry in in_slots)
            self._slots.touch(entry)
            if entry.host is not None:
                self._host.touch(entry)
        lease.is_counted = True
        for entry in missing:
            assert entry.slot is not None
            assert entry.host is not None
            self._threads.submit(Priority.COPY, partial(self._copy_into_slot, entry, entry.slot, entry.host))
        return True

    def _count(self, entry: Entry, *, is_in_slot: bool) -> None:
        """A request starts with it."""
        entry.usage.num_requests += 1
        entry.usage.last_used_s = time.time()
        self._slots.count(is_hit=is_in_slot)
        if is_in_slot:
            entry.usage.num_slot_hits += 1
            entry.is_fresh = False
        elif self._host.count(entry):
            entry.usage.num_host_hits += 1

    def _deactivate(self, lease: Lease) -> None:
        if not lease.is_active:
            return
        lease.is_active = False
        lease.slots = {}
        for digest in lease.weights:
            entry = self._entries[digest]
            entry.num_active -= 1
            self._tidy(entry)

    def _tidy(self, entry: Entry) -> None:
        """Let go of an entry that is doomed, and of one that nobody wants and that is nowhere."""
        is_on_its_way = entry.is_reading or (entry.slot is not None and not entry.is_ready)
        if entry.num_open or is_on_its_way:
            return
        if entry.is_doomed:
            self._host.drop(entry)
            if entry.slot is not None:
                self._slots.give_up(entry)
                self._threads.submit(Priority.COPY, self._slots.clear)
        if entry.host is None and entry.slot is None and self._entries.get(entry.digest) is entry:
            del self._entries[entry.digest]

    def _read_into_host(self, entry: Entry) -> None:
        """On a registry thread."""
        with self._lock:
            entry.read_priority = None
            is_wanted = entry.num_open and entry.host is None and entry.slot is None and not entry.is_reading
            if not is_wanted or entry.error is not None or not self._host.begin_read(entry):
                return  # if there is no room, the lease asks again
        host, error = None, None
        started_s = self._clock()
        try:
            host = self._read(entry.digest)
        except Exception as caught:  # noqa: BLE001 - whatever it is, the lease must hear of it
            error = _load_error(caught)
        with self._lock:
            self._host.end_read(entry, host, self._clock() - started_s)
            self._settle(entry, error)
        self._changed()

    def _copy_into_slot(self, entry: Entry, slot: int, host: HostAdapter) -> None:
        """On a registry thread."""
        error = None
        started_s = self._clock()
        try:
            self._slots.copy(entry, slot, host)
        except Exception as caught:  # noqa: BLE001 - ditto
            error = _load_error(caught)
        with self._lock:
            if error is None:
                self._slots.loaded(entry, self._clock() - started_s)
            else:
                self._slots.give_up(entry)
            self._settle(entry, error)
        self._changed()

    def _settle(self, entry: Entry, error: ServerError | None) -> None:
        if error is not None:
            self._num_failures += 1
            entry.error = error if entry.num_open else None
        self._tidy(entry)

    def _changed(self) -> None:
        self._advance_warming()
        self._on_change()

    def _advance_warming(self) -> None:
        """See to the adapters that are brought in for their own sake."""
        ended: list[tuple[Lease, Future[None], ServerError | None]] = []
        with self._lock:
            for lease, done in list(self._warming.items()):
                error: ServerError | None = None
                try:
                    state = self._activate(lease)
                except ServerError as caught:
                    error = caught
                else:
                    if state is LeaseState.LOADING:
                        continue
                    if state is LeaseState.NO_SLOT:
                        error = ConflictError("every slot is in use", code="slots_in_use")
                del self._warming[lease]
                ended.append((lease, done, error))
        for lease, done, error in ended:
            self.release(lease)
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)


def _load_error(caught: Exception) -> ServerError:
    if isinstance(caught, ServerError):
        return caught
    logger.error("an adapter could not be loaded", exc_info=caught)
    return GenerationError(f"the adapter cannot be loaded: {type(caught).__name__}", code="adapter_load_failed")
