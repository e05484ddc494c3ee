"""The tensors of one adapter as its file holds them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_core.config import LoraConfig

__all__ = ["AdapterWeights", "LoraTensors"]


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """One linear module's part of an adapter.

    Attributes:
        lora_A: [R, I].
        lora_B: [O, R].
        bias: [O] or None; `lora_B.bias`, before scaling.
        magnitude: [O] or None; DoRA's `lora_magnitude_vector`.
    """

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.lora_A, self.lora_B, self.bias, self.magnitude) if t is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> "LoraTensors":
        """The same parts with `change` applied to every tensor."""
        bias = None if self.bias is None else change(self.bias)
        magnitude = None if self.magnitude is None else change(self.magnitude)
        return LoraTensors(change(self.lora_A), change(self.lora_B), bias, magnitude)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A whole adapter.

    Attributes:
        config: its configuration.
        modules: its LoRA tensors by the module's dotted name in the base model; those of parameters by PEFT's nesting.
        base_weights: weights of the base model itself, by module: PEFT writes those of targeted embeddings.
        full: the rest, by key: whole modules' parameters, biases, embedding rows.
        embeddings: names among `modules` that are embedding tables.
    """

    config: LoraConfig
    modules: Mapping[str, LoraTensors]
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    full: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with the name of their module or key."""
        for name, part in self.modules.items():
            yield from ((name, tensor) for tensor in part.tensors())
        yield from self.base_weights.items()
        yield from self.full.items()

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.tensors())
