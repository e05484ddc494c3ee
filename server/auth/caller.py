"""Caller: who sent a request, and what that lets it see."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from server.auth.keys import KeyLimits, KeyRecord, Scope

__all__ = ["ANYBODY", "Caller"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        key_id: "" where keys are off.
        tenant: "" for none.
        adapters: patterns of the only names that it may use; None for no such list.
    """

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] | None = None
    limits: KeyLimits = KeyLimits()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, record: KeyRecord, limits: KeyLimits) -> "Caller":
        return cls(record.key_id, record.tenant or "", record.scopes, record.adapters, limits)

    @property
    def sees_all(self) -> bool:
        """All tenants' adapters, by `tenant~name`."""
        return Scope.ADMIN in self.scopes

    def has_any(self, scopes: frozenset[Scope]) -> bool:
        """One of these scopes, or `admin`."""
        return Scope.ADMIN in self.scopes or bool(self.scopes & scopes)

    def may_use(self, name: str) -> bool:
        """The key's own list allows this adapter name."""
        return self.adapters is None or any(fnmatchcase(name, pattern) for pattern in self.adapters)


ANYBODY = Caller("", "", frozenset(Scope))
"""The caller where keys are off."""
