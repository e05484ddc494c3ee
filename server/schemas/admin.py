"""Bodies of `/admin`."""

from typing import Any, Literal

from pydantic import BaseModel

from server.adapters.store import AdapterRecord

__all__ = ["AdapterInfo", "AdapterList"]


class AdapterInfo(BaseModel):
    """One adapter.

    Attributes:
        digest: sha256 over its two files; equal digests are equal adapters.
        generation: counts what was uploaded under the name, from 1.
        residency: where its arrays are now.
    """

    name: str
    digest: str
    generation: int
    created_at: str
    num_bytes: int
    details: dict[str, Any]
    residency: Literal["slot", "host", "store"]

    @classmethod
    def of(cls, record: AdapterRecord, residency: str) -> "AdapterInfo":
        return cls.model_validate(
            {
                "name": record.name,
                "digest": record.digest,
                "generation": record.generation,
                "created_at": record.created_at,
                "num_bytes": record.num_bytes,
                "details": dict(record.details),
                "residency": residency,
            }
        )


class AdapterList(BaseModel):
    """All adapters, by name."""

    adapters: list[AdapterInfo]
