"""Lease: a request's claim on some adapters, and what the registry asks of others and tells them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Protocol

from server.adapters.tiers import TierStats, Usage
from server.leases import LeaseState

__all__ = ["NO_GENERATIONS", "Lease", "LeaseOwner", "Priority", "RegistryStats", "StoreAccess"]

NO_GENERATIONS: Mapping[str, int] = MappingProxyType({})


class StoreAccess(Protocol):
    """What the registry needs of the store."""

    def hold(self, digest: str) -> None:
        """Keep an adapter's bytes."""

    def release(self, digest: str) -> None:
        """Undo one `hold`."""

    def folded_bytes(self, digest: str) -> int:
        """Size of the adapter's arrays in memory, as far as is known before it is read."""


class Priority(IntEnum):
    """Order of the work on the registry's threads."""

    COPY = 0  # into a slot; a request that is next waits for it
    READ = 1  # for a request that could start
    PREFETCH = 2  # for a request further back in the queue
    WARM = 3  # because an operator asked for it


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """Counters since the start, and what is where now.

    Attributes:
        slots: slot by digest, of adapters whose arrays are there.
        host: size by digest.
        leases: number of open leases by digest.
        pinned: digests that stay in their slots.
        slot_allocated_bytes: what the slots really take, used or not.
        usage: by digest; adapters that were never used are left out.
    """

    slots: Mapping[str, int]
    host: Mapping[str, int]
    leases: Mapping[str, int]
    pinned: Collection[str]
    slot_tier: TierStats
    host_tier: TierStats
    slot_allocated_bytes: int
    num_failures: int
    usage: Mapping[str, Usage] = field(default_factory=dict)


class LeaseOwner(Protocol):
    """Where leases come from and go to."""

    def activate(self, lease: "Lease") -> LeaseState: ...

    def deactivate(self, lease: "Lease") -> None: ...

    def release(self, lease: "Lease") -> None: ...


@dataclass(eq=False, slots=True)
class Lease:
    """A request's claim on some adapters; fits the engine's `AdapterLease`.

    Attributes:
        weights: weight by digest.
        generations: generation by name, as it was when the lease was opened; for the answer.
    """

    registry: "LeaseOwner"
    weights: Mapping[str, float]
    generations: Mapping[str, int] = field(default_factory=dict)
    priority: Priority = Priority.READ
    is_active: bool = False
    is_counted: bool = False  # as a request that was started
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
