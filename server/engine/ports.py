"""What the engine needs from others, as small interfaces; the parts that fit them live outside the engine."""

from collections.abc import Hashable, Mapping
from typing import Protocol

from lora_core import Key
from server.leases import LeaseState

__all__ = ["AdapterLease", "TokenConstraint", "TokenText"]


class AdapterLease(Protocol):
    """A request's claim on its adapters, from submission to its last event."""

    @property
    def key(self) -> Hashable:
        """Equal for requests that get the same output from the same tokens: content digests and weights."""

    @property
    def slots(self) -> Mapping[Key, float]:
        """Slot → weight; valid while READY."""

    def activate(self) -> LeaseState:
        """Ask for slots; cheap, never waits, called again until READY.

        Raises:
            ServerError: the adapter cannot be loaded; the request fails with it.
        """

    def deactivate(self) -> None:
        """Give the slots back but keep the claim; `activate` may be called again."""

    def release(self) -> None:
        """End the claim; further calls do nothing."""


class TokenText(Protocol):
    """Turns one request's tokens into text as they come."""

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that this token completes ("" inside a character), and whether a stop string ended there."""

    def finish(self) -> str:
        """Text that was held back, after the last token."""


class TokenConstraint(Protocol):
    """Which tokens one request may generate next: a grammar, a schema, a choice."""

    def forbidden(self) -> bytearray:
        """A byte per token of the vocabulary, 1 where it may not come next; waits until it is computed.

        All are 1 if there is no way on, as when a grammar needs more than it is allowed to; the request fails then.
        """

    def accept(self, token_id: int) -> bool:
        """Take the chosen token; true if nothing but the end may follow. The next `forbidden` is then under way."""
