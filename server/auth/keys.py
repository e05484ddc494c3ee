"""API keys as they are kept: never the secret, only its hash.

A secret has 256 random bits, so a plain sha256 is as good as a slow hash, and a look-up by it gives nothing away.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["TENANT_PATTERN", "KeyLimits", "KeyRecord", "Scope", "find_key", "hash_secret", "new_key"]

PREFIX = "lmx_"  # so that a key is known for one wherever it turns up
TENANT_PATTERN = r"[a-z0-9][a-z0-9-]{0,31}"
PATTERN = r"[A-Za-z0-9._*?\[\]!-]{1,128}"


class Scope(Enum):
    """What a key may do. `admin` includes all others."""

    GENERATE = "generate"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    ADMIN = "admin"


class KeyLimits(BaseModel):
    """How much a key may ask for; None for no limit.

    Attributes:
        weight: its tenant's share of the engine when all are busy; a tenant's highest counts, 1 by default.
        tokens_per_minute: of prompts and outputs together. The request that crosses the limit is still answered; the
            next ones wait until it is paid off.
        max_concurrent: requests at once.
        max_adapters, max_adapter_bytes: what its tenant may have kept, all generations included; the lowest of its
            tenant's keys counts for all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    requests_per_minute: int | None = Field(None, ge=1, le=10**9)
    tokens_per_minute: int | None = Field(None, ge=1, le=10**12)
    max_concurrent: int | None = Field(None, ge=1, le=10**6)
    max_adapters: int | None = Field(None, ge=0, le=10**9)
    max_adapter_bytes: int | None = Field(None, ge=0, le=10**15)


class KeyRecord(BaseModel):
    """One key.

    Attributes:
        key_id: names the key in lists and logs; no secret.
        sha256: of the secret, in hexadecimal.
        tenant: it sees this tenant's adapters and the public ones; None for the public ones only, or for all of them
            with the scope `admin`.
        adapters: names, or patterns like `team-*`, to which the key is confined besides; None for no such list.
        expires_at: from then on the key is not valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_id: str = Field(pattern=r"^[a-z0-9]{8,32}$")
    name: str = Field(max_length=128)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    tenant: str | None = Field(None, pattern=f"^{TENANT_PATTERN}$")
    adapters: tuple[Annotated[str, Field(pattern=f"^{PATTERN}$")], ...] | None = Field(None, max_length=1000)
    limits: KeyLimits = KeyLimits()
    created_at: datetime
    expires_at: datetime | None = None

    @model_validator(mode="after")
    def _check(self) -> "KeyRecord":
        if Scope.ADMIN in self.scopes and (self.tenant is not None or self.adapters is not None):
            raise ValueError(
                "a key with the scope `admin` reaches everything: it has no tenant and no list of adapters"
            )
        if self.expires_at is not None and self.expires_at.tzinfo is None:
            raise ValueError("`expires_at` needs a time zone")
        return self

    @property
    def is_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


def hash_secret(secret: bytes) -> str:
    """How a secret is kept and looked up. Of the bytes as they were presented, whatever they are."""
    return hashlib.sha256(secret).hexdigest()


def new_key(
    name: str,
    scopes: Iterable[Scope],
    *,
    tenant: str | None = None,
    adapters: Iterable[str] | None = None,
    limits: KeyLimits = KeyLimits(),  # noqa: B008 - frozen
    expires_at: datetime | None = None,
) -> tuple[KeyRecord, str]:
    """A new key and its secret, which is shown once and kept nowhere.

    Raises:
        ValueError: a value cannot be one (pydantic's ValidationError).
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    record = KeyRecord(
        key_id=secrets.token_hex(6),
        name=name,
        sha256=hash_secret(secret.encode()),
        scopes=frozenset(scopes),
        tenant=tenant,
        adapters=None if adapters is None else tuple(adapters),
        limits=limits,
        created_at=datetime.now(UTC),
        expires_at=expires_at,
    )
    return record, secret


def find_key(records: dict[str, KeyRecord], secret: bytes) -> KeyRecord | None:
    """The valid key with this secret; `records` are by their hash."""
    presented = hash_secret(secret)
    record = records.get(presented)
    # The look-up alone has compared hashes already, which nobody can choose; this one takes the same time for all.
    is_same = hmac.compare_digest(presented.encode(), (record.sha256 if record else "0" * 64).encode())
    return record if record is not None and is_same and not record.is_expired else None
