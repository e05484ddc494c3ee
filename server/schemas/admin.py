"""Bodies of `/admin`. These routes are our own: fields that they do not know are refused."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.adapters.service import AdapterView

__all__ = ["AdapterInfo", "AdapterList", "Annotation", "ExpectedGeneration", "GenerationList", "PromoteRequest"]

Generation = Field(ge=1, le=10**18)
Expected = Field(None, ge=0, le=10**18, description="refuse unless this generation is current; 0: no such adapter")


class AdminBody(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


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


class AdapterInfo(BaseModel):
    """One generation of an adapter.

    Attributes:
        digest: sha256 over its two files; equal digests are equal adapters.
        generation: counts what was published under the name, from 1.
        is_current: the bare name means this generation.
        is_pinned: it stays in a slot.
        source: where it came from.
        residency: where its arrays are now.
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
            }
        )


class AdapterList(BaseModel):
    """The current generation of every adapter, by name."""

    adapters: list[AdapterInfo]


class GenerationList(BaseModel):
    """All kept generations of an adapter, newest first."""

    name: str
    generations: list[AdapterInfo]
