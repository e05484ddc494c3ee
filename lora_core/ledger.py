"""What becomes of each tensor of an adapter's file on its way into a model.

Whoever uses a tensor notes it, with what it did and why, and at the end nothing may be left: so the report cannot say
anything else than what happened, and no tensor can be read over.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from lora_core.errors import LoraError, TargetError
from lora_core.weights import AdapterWeights

__all__ = ["FACTORS", "NOT_REACHED", "Outcome", "TensorGroup", "TensorLedger"]

Outcome = Literal["used", "folded", "converted", "refused"]
FACTORS = ("lora_A", "lora_B")
NOT_REACHED = "the adapter is refused as a whole"


class TensorGroup(NamedTuple):
    """Tensors of one kind that had the same fate.

    Attributes:
        tensors: the kind: PEFT's name of a part ("lora_A", ...), or "base weight", or "full weight". In a file that was
            refused as it was read also "other", for keys of no known kind, and "file", if none can be read of it.
        outcome: "used" as it is, "folded" with others into what serving needs, "converted" first, or "refused".
        names: modules, or keys of full weights, in the file's order.
    """

    tensors: str
    outcome: Outcome
    reason: str
    names: tuple[str, ...]


class TensorLedger:
    """Fates of one adapter's tensors.

    Args:
        converted: how A and B came to be, if they are not those of the file that was sent.
    """

    def __init__(self, adapter: AdapterWeights, *, converted: str = "") -> None:
        self._converted = converted
        self._fates: dict[tuple[str, str], tuple[Outcome, str] | None] = dict.fromkeys(_tensors(adapter))
        self._first_error: LoraError | None = None

    def note(self, name: str, tensors: Iterable[str], outcome: Outcome, reason: str) -> None:
        """Write down what became of a module's tensors, or of a full weight; those that it has not are left out."""
        for tensor in tensors:
            if (name, tensor) in self._fates:
                is_new = bool(self._converted) and tensor in FACTORS and outcome != "refused"
                self._fates[name, tensor] = (
                    ("converted", f"{self._converted}; {reason}") if is_new else (outcome, reason)
                )

    def refuse(self, name: str, error: LoraError) -> None:
        """Refuse all of a module, or a full weight; `settle` raises the first such error."""
        self._first_error = self._first_error or error
        for own, tensor in self._fates:
            if own == name:
                self._fates[own, tensor] = ("refused", str(error))

    def settle(self) -> None:
        """Refuse what nobody has noted.

        Raises:
            LoraError: the first error of all, if anything was refused.
        """
        for (name, _), fate in list(self._fates.items()):
            if fate is None:
                self.refuse(name, TargetError(f"the adapter's file and configuration disagree about {name!r}"))
        if self._first_error is not None:
            raise self._first_error

    def groups(self) -> list[TensorGroup]:
        """The report; what was not reached, because an error came before, is refused with it."""
        found: dict[tuple[str, Outcome, str], list[str]] = {}
        not_reached: tuple[Outcome, str] = ("refused", NOT_REACHED)
        for (name, tensor), fate in self._fates.items():
            found.setdefault((tensor, *(fate or not_reached)), []).append(name)
        return [TensorGroup(*key, tuple(names)) for key, names in found.items()]


def _tensors(adapter: AdapterWeights) -> Iterable[tuple[str, str]]:
    for name, part in adapter.modules.items():
        values = {"lora_A": part.lora_A, "lora_B": part.lora_B, "lora_B.bias": part.bias}
        values["lora_magnitude_vector"] = part.magnitude
        yield from ((name, tensor) for tensor, value in values.items() if value is not None)
    yield from ((name, "base weight") for name in adapter.base_weights)
    yield from ((key, "full weight") for key in adapter.full)
