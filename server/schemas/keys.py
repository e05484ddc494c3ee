"""Bodies of `/admin/keys`."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from server.auth.keys import KeyLimits, KeyRecord, Scope

__all__ = ["KeyCreated", "KeyInfo", "KeyList", "KeyRequest"]


class KeyRequest(BaseModel):
    """A key to make. What is not known is refused."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"name": "app", "scopes": ["generate"], "tenant": "acme", "limits": {"requests_per_minute": 600}}
            ]
        },
    )

    name: str = Field(max_length=128)
    scopes: list[Scope] = Field(min_length=1, max_length=8)
    tenant: str | None = None
    adapters: list[str] | None = Field(None, max_length=1000)
    limits: KeyLimits = KeyLimits()
    expires_at: datetime | None = None


class KeyInfo(BaseModel):
    """A key, without its secret or hash."""

    key_id: str
    name: str
    scopes: list[Scope]
    tenant: str | None
    adapters: list[str] | None
    limits: KeyLimits
    created_at: datetime
    expires_at: datetime | None

    @classmethod
    def of(cls, record: KeyRecord) -> "KeyInfo":
        values = record.model_dump(exclude={"sha256"})
        return cls(**values | {"scopes": sorted(record.scopes, key=lambda scope: scope.value)})


class KeyCreated(KeyInfo):
    """A new key, with its secret: this is the only time that it is shown."""

    secret: str


class KeyList(BaseModel):
    """All keys, oldest first."""

    keys: list[KeyInfo]
