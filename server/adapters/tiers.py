"""What the registry knows about one adapter, and which one goes when memory is short.

Eviction is GreedyDual-Size (Cao and Irani 1997): an adapter's worth is what bringing it back would cost, per byte, on
top of a level that rises with every eviction. At equal costs that is least recently used; a cheap or large one goes
before an expensive or small one that was used at about the same time.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from server.errors import ServerError

__all__ = ["Entry", "GreedyDual", "HostAdapter", "TierStats", "Usage", "total_bytes"]

# Costs are compared in powers of this: what differs by less is a matter of chance, and recency decides.
COST_STEP = 4.0


class HostAdapter(Protocol):
    """A folded adapter in host memory."""

    @property
    def num_bytes(self) -> int: ...


@dataclass(slots=True)
class Usage:
    """What became of one adapter since the start.

    Attributes:
        num_requests: requests that were started with it.
        num_slot_hits, num_host_hits: of these, those that found it in a slot, or else in host memory.
        num_reads, read_s: how often it was read from the store and folded, and how long that took in all.
        num_loads, load_s: how often it was copied into a slot, and how long that took in all.
        last_used_s: wall-clock time of the last request, seconds since 1970; None if there was none.
    """

    num_requests: int = 0
    num_slot_hits: int = 0
    num_host_hits: int = 0
    num_reads: int = 0
    read_s: float = 0.0
    num_loads: int = 0
    load_s: float = 0.0
    last_used_s: float | None = None

    def copy(self) -> "Usage":
        return replace(self)


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier's counters since the start, and what it holds now.

    Attributes:
        num_hits, num_misses: adapters that a starting request found there, or did not.
        num_loads, load_s: how often one was brought there, and how long that took in all.
    """

    num_adapters: int
    num_bytes: int
    max_bytes: int
    num_hits: int
    num_misses: int
    num_loads: int
    num_evictions: int
    load_s: float


@dataclass(eq=False, slots=True)
class Entry:
    """One adapter by digest, while somebody wants it or it is in memory.

    Attributes:
        num_bytes: its size when folded; expected until it was read.
        host: its arrays in host memory.
        read_priority: of a read that is queued; None if there is none.
        is_reading: it is being read.
        is_fresh: it was read since the last request that was started with it.
        slot: its slot, from the moment it is reserved.
        is_ready: its arrays are in the slot.
        num_active: leases that rely on the slot.
        num_open: leases.
        asked, asked_before: when a lease on it was last activated, and when before; counts, 0 for never.
        is_partner: the rest of a mix is in memory and waits for it.
        slot_worth, host_worth: see GreedyDual.
        is_doomed: gone with its last lease.
    """

    digest: str
    num_bytes: int
    usage: Usage = field(default_factory=Usage)
    host: HostAdapter | None = None
    read_priority: int | None = None
    is_reading: bool = False
    is_fresh: bool = False
    slot: int | None = None
    is_ready: bool = False
    error: ServerError | None = None
    num_active: int = 0
    num_open: int = 0
    asked: int = 0
    asked_before: int = 0
    is_partner: bool = False
    slot_worth: tuple[float, int] = (0.0, 0)
    host_worth: tuple[float, int] = (0.0, 0)
    is_doomed: bool = False

    @property
    def is_awaited(self) -> bool:
        """Somebody wants it in a slot, where it is not yet."""
        return self.num_open > 0 and not self.is_ready

    def is_staler_than(self, other: "Entry") -> bool:
        """Nobody asked for it while the other one was asked for twice: it is not its turn, or was never yet."""
        return self.asked < other.asked_before or self.asked == 0 < other.asked

    @property
    def read_cost_s(self) -> float:
        """Seconds that reading and folding it takes, as far as is known."""
        return self.usage.read_s / self.usage.num_reads if self.usage.num_reads else 0.0

    @property
    def load_cost_s(self) -> float:
        """Seconds that copying it into a slot takes, as far as is known."""
        return self.usage.load_s / self.usage.num_loads if self.usage.num_loads else 0.0


class GreedyDual:
    """Worths of one tier's adapters; comparable, higher ones stay longer."""

    def __init__(self) -> None:
        self._level = 0.0
        self._clock = 0

    def worth(self, cost_s: float, num_bytes: int) -> tuple[float, int]:
        """The worth of an adapter that was used just now.

        Args:
            cost_s: seconds that it takes to bring it back.
        """
        self._clock += 1
        per_mebibyte = cost_s / max(num_bytes, 1) * (1 << 20)
        step = COST_STEP ** round(math.log(per_mebibyte, COST_STEP)) if per_mebibyte > 0 else 0.0
        return self._level + step, self._clock

    def evicted(self, worth: tuple[float, int]) -> None:
        """One of this worth had to go: what is used from now on is worth more than what was not used since."""
        self._level = max(self._level, worth[0])


def total_bytes(entries: Iterable[Entry]) -> int:
    """Their folded sizes together."""
    return sum(entry.num_bytes for entry in entries)
