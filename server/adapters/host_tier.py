"""The tier of host memory: folded adapters under a budget of bytes, those that are being read included."""

from collections.abc import Callable, Iterable

from server.adapters.tiers import Entry, GreedyDual, HostAdapter, TierStats

__all__ = ["HostTier"]


class HostTier:
    """Books of the folded adapters in host memory. All methods are called under the registry's lock.

    Args:
        max_bytes: budget. One adapter alone, or the missing parts of a mix, are let through even if they exceed it.
        on_evict: told who had to make room.
    """

    def __init__(self, max_bytes: int, on_evict: Callable[[Entry], None]) -> None:
        self.max_bytes = max_bytes
        self._on_evict = on_evict
        self._held: set[Entry] = set()
        self._reading: dict[Entry, int] = {}
        self._worths = GreedyDual()
        self._num_hits = self._num_misses = self._num_loads = self._num_evictions = 0
        self._load_s = 0.0

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._held) + sum(self._reading.values())

    @property
    def held(self) -> Iterable[Entry]:
        return self._held

    def begin_read(self, entry: Entry) -> bool:
        """Make room for an adapter that is about to be read; False if it has to wait."""
        if self._make_room(entry.num_bytes, entry) or (not self._reading and self._is_alone(entry)):
            self._reading[entry] = entry.num_bytes
            entry.is_reading = True
        return entry.is_reading

    def end_read(self, entry: Entry, host: HostAdapter | None, read_s: float) -> None:
        """It has been read, or could not be."""
        del self._reading[entry]
        entry.is_reading = False
        if host is None:
            return
        entry.host, entry.num_bytes, entry.is_fresh = host, host.num_bytes, True
        entry.usage.num_reads += 1
        entry.usage.read_s += read_s
        self._num_loads += 1
        self._load_s += read_s
        self._held.add(entry)
        self.touch(entry)
        self._make_room(0, entry)

    def count(self, entry: Entry) -> bool:
        """A request starts with it, out of host memory or after a read; True for a hit."""
        is_hit = not entry.is_fresh
        entry.is_fresh = False
        self._num_hits += is_hit
        self._num_misses += not is_hit
        return is_hit

    def touch(self, entry: Entry) -> None:
        """It is used."""
        entry.host_worth = self._worths.worth(entry.read_cost_s, entry.num_bytes)

    def drop(self, entry: Entry) -> None:
        self._held.discard(entry)
        entry.host = None

    def stats(self) -> TierStats:
        return TierStats(
            num_adapters=len(self._held),
            num_bytes=self.num_bytes,
            max_bytes=self.max_bytes,
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            num_loads=self._num_loads,
            num_evictions=self._num_evictions,
            load_s=self._load_s,
        )

    def check_integrity(self) -> None:
        assert all(entry.host is not None for entry in self._held)
        assert all(entry.is_reading and entry.host is None for entry in self._reading)

    def _is_alone(self, entry: Entry) -> bool:
        """Nothing here will ever make room for it: waiting is of no use."""
        return entry.is_partner or not any(one.is_awaited for one in self._held)

    def _make_room(self, num_bytes: int, wanted: Entry) -> bool:
        """Drop the least worthy until so many more bytes fit; False if they do not.

        Those that somebody waits for stay, unless it is not their turn and it is that of the wanted one.
        """
        excess = self.num_bytes + num_bytes - self.max_bytes
        if excess <= 0:
            return True
        droppable = [one for one in self._held if not one.is_awaited or one.is_staler_than(wanted)]
        for entry in sorted(droppable, key=lambda one: (one.is_awaited, one.host_worth)):
            if excess <= 0:
                break
            excess -= entry.num_bytes
            self._num_evictions += 1
            self._worths.evicted(entry.host_worth)
            self.drop(entry)
            self._on_evict(entry)
        return excess <= 0
