"""The tier of slots: who has one, who has to go for whom, and what really is in them."""

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from server.adapters.tiers import Entry, GreedyDual, HostAdapter, TierStats, total_bytes
from server.errors import InvalidRequestError

__all__ = ["SlotStore", "SlotTier"]


class SlotStore(Protocol):
    """The engine's slots."""

    @property
    def max_slots(self) -> int: ...

    @property
    def allocated_bytes(self) -> int:
        """What they take, used or not."""

    def load(self, slot: int, adapter: HostAdapter) -> None: ...

    def free(self, slot: int) -> None: ...


class SlotTier:
    """Books of the slots. All methods but `copy` and `clear` are called under the registry's lock.

    Args:
        max_bytes: budget of the arrays in all slots together.
        on_evict: told who had to make room.
    """

    def __init__(self, slots: SlotStore, max_bytes: int, on_evict: Callable[[Entry], None]) -> None:
        self.max_bytes = max_bytes
        self._on_evict = on_evict
        self.pinned: Collection[str] = frozenset()
        self._slots = slots
        self._owners: list[Entry | None] = [None] * slots.max_slots
        self._copying = threading.Lock()  # around freeing and loading: a slot changes hands in one piece
        self._inside: list[Entry | None] = [None] * slots.max_slots  # whose arrays are in the slot
        self._worths = GreedyDual()
        self._num_hits = self._num_misses = self._num_loads = self._num_evictions = 0
        self._load_s = 0.0

    @property
    def max_slots(self) -> int:
        return self._slots.max_slots

    @property
    def allocated_bytes(self) -> int:
        return self._slots.allocated_bytes

    @property
    def owners(self) -> list[Entry]:
        return [owner for owner in self._owners if owner is not None]

    def check_fits(self, entries: Sequence[Entry]) -> None:
        """Refuse what cannot be in the slots together, however long it waits.

        Raises:
            InvalidRequestError: code `too_many_adapters`.
        """
        pinned = [owner for owner in self.owners if owner.digest in self.pinned and owner not in entries]
        num_slots, num_bytes = self.max_slots - len(pinned), self.max_bytes - total_bytes(pinned)
        if len(entries) > num_slots or total_bytes(entries) > num_bytes:
            raise InvalidRequestError(
                f"these {len(entries)} adapters need {total_bytes(entries)} bytes together; "
                f"{num_slots} slots and {num_bytes} bytes are not pinned",
                code="too_many_adapters",
                param="adapters",
            )

    def reserve(self, entries: Sequence[Entry]) -> list[Entry] | None:
        """Give a slot to every entry that has none, all or nothing.

        Returns:
            Those that must be copied now; None if there is no room.
        """
        missing = [entry for entry in entries if entry.slot is None]
        free = [slot for slot, owner in enumerate(self._owners) if owner is None]
        idle = sorted(
            (one for one in self.owners if self._is_idle(one) and one not in entries),
            key=lambda one: (one.num_open > 0, one.slot_worth),
        )
        victims: list[Entry] = []
        num_bytes = total_bytes(self.owners) + total_bytes(missing)
        while missing and (len(missing) > len(free) + len(victims) or num_bytes > self.max_bytes):
            if len(victims) == len(idle):
                return None
            victims.append(idle[len(victims)])
            num_bytes -= victims[-1].num_bytes
        for victim in victims:
            self._num_evictions += 1
            self._worths.evicted(victim.slot_worth)
            free.append(self.give_up(victim))
            self._on_evict(victim)
        for entry in missing:
            entry.slot = free.pop(0)
            self._owners[entry.slot] = entry
        return missing

    def count(self, *, is_hit: bool) -> None:
        """A request starts with an adapter that was in a slot, or not."""
        self._num_hits += is_hit
        self._num_misses += not is_hit

    def touch(self, entry: Entry) -> None:
        """It is used."""
        cost_s = entry.load_cost_s + (entry.read_cost_s if entry.host is None else 0.0)
        entry.slot_worth = self._worths.worth(cost_s, entry.num_bytes)

    def give_up(self, entry: Entry) -> int:
        """Take an entry's slot away and return it. Its arrays stay inside until the next `copy` or `clear`."""
        slot = entry.slot
        assert slot is not None
        entry.slot, entry.is_ready = None, False
        self._owners[slot] = None
        return slot

    def loaded(self, entry: Entry, load_s: float) -> None:
        """It has been copied."""
        entry.is_ready = True
        entry.usage.num_loads += 1
        entry.usage.load_s += load_s
        self._num_loads += 1
        self._load_s += load_s
        self.touch(entry)

    def copy(self, entry: Entry, slot: int, host: HostAdapter) -> None:
        """On a registry thread: put an adapter into its slot, after everything that has no slot any more has left."""
        with self._copying:
            self._clear()
            self._slots.load(slot, host)
            self._inside[slot] = entry

    def clear(self) -> None:
        """On a registry thread: empty the slots of those that gave theirs up."""
        with self._copying:
            self._clear()

    def stats(self) -> TierStats:
        ready = [owner for owner in self.owners if owner.is_ready]
        return TierStats(
            num_adapters=len(ready),
            num_bytes=total_bytes(ready),
            max_bytes=self.max_bytes,
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            num_loads=self._num_loads,
            num_evictions=self._num_evictions,
            load_s=self._load_s,
        )

    def check_integrity(self) -> None:
        for slot, owner in enumerate(self._owners):
            assert owner is None or owner.slot == slot
        assert total_bytes(self.owners) <= self.max_bytes, "more bytes than the budget"

    def _is_idle(self, entry: Entry) -> bool:
        return not entry.num_active and entry.is_ready and entry.digest not in self.pinned

    def _clear(self) -> None:
        for slot, inside in enumerate(self._inside):
            if inside is not None and inside is not self._owners[slot]:
                self._inside[slot] = None
                self._slots.free(slot)
