"""Bodies of `/admin`. These routes are our own: fields that they do not know are refused."""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.adapters.lease import RegistryStats
from server.adapters.service import AdapterView
from server.adapters.tiers import TierStats, Usage

__all__ = [
    "AdapterInfo",
    "AdapterList",
    "Annotation",
    "ExpectedGeneration",
    "GenerationList",
    "PromoteRequest",
    "Tiers",
]

Generation = Field(ge=1, le=10**18)
Expected = Field(None, ge=0, le=10**18, description="refuse unless this generation is current; 0: no such adapter")


class AdminBody(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, strict=True)


class ExpectedGeneration(AdminBody):
    """Makes a change depend on which generation is current."""

    expected_generation: int | None = Expected


class PromoteRequest(ExpectedGeneration):
    """Which generation becomes the current one."""

    generation: int = Generation


class Annotation(AdminBody):
    """What to remember about a generation; what is left out stays as it is."""

    generation: int | None = Field(None, ge=1, le=10**18, description="the current one by default")
    labels: dict[str, str] | None = None
    note: str | None = None


class AdapterUsage(BaseModel):
    """What became of an adapter since the start.

    Attributes:
        requests: that were started with it.
        slot_hits, host_hits: of these, those that found it in a slot, or else in host memory.
        reads, read_s: how often it was read from the store and folded, and how long that took in all.
        loads, load_s: how often it was copied into a slot, and how long that took in all.
        last_used_at: ISO 8601, UTC.
    """

    requests: int
    slot_hits: int
    host_hits: int
    reads: int
    read_s: float
    loads: int
    load_s: float
    last_used_at: str | None

    @classmethod
    def of(cls, usage: Usage) -> "AdapterUsage":
        last = usage.last_used_s
        return cls(
            requests=usage.num_requests,
            slot_hits=usage.num_slot_hits,
            host_hits=usage.num_host_hits,
            reads=usage.num_reads,
            read_s=round(usage.read_s, 6),
            loads=usage.num_loads,
            load_s=round(usage.load_s, 6),
            last_used_at=None if last is None else datetime.fromtimestamp(last, UTC).isoformat(timespec="milliseconds"),
        )


class Tier(BaseModel):
    """One tier: what it holds now, and its counters since the start.

    Attributes:
        hits, misses: adapters that a starting request found there, or did not.
        loads, load_s: how often one was brought there, and how long that took in all.
    """

    adapters: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    loads: int
    evictions: int
    load_s: float

    @classmethod
    def of(cls, stats: TierStats) -> "Tier":
        return cls(
            adapters=stats.num_adapters,
            bytes=stats.num_bytes,
            max_bytes=stats.max_bytes,
            hits=stats.num_hits,
            misses=stats.num_misses,
            loads=stats.num_loads,
            evictions=stats.num_evictions,
            load_s=round(stats.load_s, 6),
        )


class Tiers(BaseModel):
    """Where adapters are.

    Attributes:
        slot_allocated_bytes: what the slots really take, used or not.
        pinned: how many stay in their slots.
    """

    slots: Tier
    host: Tier
    max_slots: int
    slot_allocated_bytes: int
    pinned: int
    load_failures: int

    @classmethod
    def of(cls, stats: RegistryStats, max_slots: int) -> "Tiers":
        return cls(
            slots=Tier.of(stats.slot_tier),
            host=Tier.of(stats.host_tier),
            max_slots=max_slots,
            slot_allocated_bytes=stats.slot_allocated_bytes,
            pinned=len(stats.pinned),
            load_failures=stats.num_failures,
        )


class AdapterInfo(BaseModel):
    """One generation of an adapter.

    Attributes:
        digest: sha256 over its two files; equal digests are equal adapters.
        generation: counts what was published under the name, from 1.
        is_current: the bare name means this generation.
        is_pinned: it stays in a slot.
        source: where it came from.
        residency: where its arrays are now.
        usage: what became of it since the start.
    """

    name: str
    digest: str
    generation: int
    is_current: bool
    is_pinned: bool
    created_at: str
    num_bytes: int
    details: dict[str, Any]
    labels: dict[str, str]
    note: str
    source: dict[str, Any]
    residency: Literal["slot", "host", "store"]
    usage: AdapterUsage

    @classmethod
    def of(cls, view: AdapterView) -> "AdapterInfo":
        record = view.record
        return cls.model_validate(
            {
                "name": record.name,
                "digest": record.digest,
                "generation": record.generation,
                "is_current": view.is_current,
                "is_pinned": view.is_pinned,
                "created_at": record.created_at,
                "num_bytes": record.num_bytes,
                "details": dict(record.details),
                "labels": dict(record.labels),
                "note": record.note,
                "source": dict(record.source),
                "residency": view.residency,
                "usage": AdapterUsage.of(view.usage),
            }
        )


class AdapterList(BaseModel):
    """The current generation of every adapter, by name."""

    adapters: list[AdapterInfo]


class GenerationList(BaseModel):
    """All kept generations of an adapter, newest first."""

    name: str
    generations: list[AdapterInfo]
