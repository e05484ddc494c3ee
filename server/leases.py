"""The word that the engine and the adapter registry share."""

from enum import Enum

__all__ = ["LeaseState"]


class LeaseState(Enum):
    """How far a request's adapters are."""

    READY = "ready"  # every one is in a slot and stays there
    LOADING = "loading"  # on their way; the engine is woken when they are there
    NO_SLOT = "no slot"  # every slot is held by somebody else
