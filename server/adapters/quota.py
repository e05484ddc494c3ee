"""StorageQuota: how much may be kept for one owner of adapters, all generations of all of its names together."""

from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import QuotaExceededError

__all__ = ["NO_QUOTA", "StorageQuota", "StoredUsage"]


@dataclass(frozen=True, slots=True)
class StoredUsage:
    """What is kept: names, and the bytes of their generations, where equal contents count once."""

    num_adapters: int
    num_bytes: int

    @classmethod
    def of(cls, generations: Iterable[tuple[str, str, int]]) -> "StoredUsage":
        """From the name, digest and bytes of each kept generation."""
        names, num_bytes = set(), {}
        for name, digest, size in generations:
            names.add(name)
            num_bytes[digest] = size
        return cls(len(names), sum(num_bytes.values()))


@dataclass(frozen=True, slots=True)
class StorageQuota:
    """Limits of what is kept; None for no limit."""

    max_adapters: int | None = None
    max_bytes: int | None = None

    @property
    def is_none(self) -> bool:
        return self.max_adapters is None and self.max_bytes is None

    def check(self, before: StoredUsage, after: StoredUsage) -> None:
        """Let a change pass that keeps to the limits, or at least adds nothing to what is over them already.

        Raises:
            QuotaExceededError: it does not.
        """
        for what, limit, old, new in (
            ("adapters", self.max_adapters, before.num_adapters, after.num_adapters),
            ("bytes of adapters", self.max_bytes, before.num_bytes, after.num_bytes),
        ):
            if limit is not None and new > max(limit, old):
                raise QuotaExceededError(
                    f"this key's owner may have {limit} {what} kept, all generations together; it would be {new}",
                    details={"limit": limit, "would_be": new},
                )


NO_QUOTA = StorageQuota()
