"""Decoder layers as most models have them, found in a model, and a stack of them put in their place.

The model's code stays as it is and calls its layers one after the other: the first one's call computes those behind it
too, whose own calls then find it done. A stack takes the place of a layer's `forward` only where both are seen to give
the same, and of several at once only where each was seen to be given what the one before it returned. Whatever it is
not made for goes to the model's own code: another kind of attention step, autograd, a layer in which an adapter has put
a module of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_core.shared import SharedLinears
from server.engine.attention import RotaryAttention
from server.engine.attention.interface import STEP_ARGUMENT
from server.engine.norm import RmsNorm
from server.engine.replace import GatedMlp

__all__ = [
    "CHILDREN",
    "LayerParts",
    "LayerStack",
    "Places",
    "Seen",
    "StackKind",
    "StackedForward",
    "calls_of",
    "replace_layers",
]

CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer is made of.

    Attributes:
        groups: its four products: q, k and v; the output; gate and up; down.
    """

    layer: nn.Module
    attention: RotaryAttention
    mlp: GatedMlp
    norms: tuple[RmsNorm, RmsNorm]
    groups: list[SharedLinears]

    @property
    def dtype(self) -> torch.dtype:
        return self.norms[0].weight.dtype

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Input and output features of each product."""
        return tuple((group.members[0].in_features, sum(group.sizes)) for group in self.groups)

    @property
    def places(self) -> list[tuple[dict[str, Any], str, nn.Module]]:
        """Where modules are, by which it is seen whether they still are; `getattr` takes longer than a layer's sums."""
        parents = self.layer, self.attention, self.mlp
        return [(parent._modules, name, child) for parent in parents for name, child in parent.named_children()]


class Places:
    """Where the modules of some layers are, and whether they still are there."""

    def __init__(self, parts: Sequence[LayerParts]) -> None:
        self._places = [part.places for part in parts]

    def end(self, first: int) -> int:
        """The first layer from `first` on in which a module is another than it was, or their number."""
        for index in range(first, len(self._places)):
            if not all(modules[name] is child for modules, name, child in self._places[index]):
                return index
        return len(self._places)


class LayerStack(Protocol):
    """Layers that follow each other: x + attention(norm(x)), then that + mlp(norm(that)), [1, T, D] -> [1, T, D]."""

    def end(self, first: int) -> int:
        """The first layer from `first` on that it cannot compute now, or their number."""

    def can_take(self, x: Tensor, step: object) -> bool:
        """It computes with this input under this attention step."""

    def run(self, first: int, stop: int, x: Tensor, step: Any, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Through the layers [first, stop)."""


class StackKind(Protocol):
    """A way to compute such layers."""

    def can_hold(self, parts: LayerParts) -> bool:
        """It is made for layers of these parts."""

    def make(self, parts: Sequence[LayerParts]) -> LayerStack:
        """A stack of them."""

    def is_equal(self, theirs: Callable[..., Any], ours: Callable[..., Any], call: "Seen") -> bool:
        """Two ways to compute a layer give the same, called in this way."""


class StackedForward:
    """In the place of a layer's `forward`."""

    def __init__(self, stack: LayerStack, done: "Done", index: int, forward: Callable[..., Any]) -> None:
        self._stack = stack
        self._done = done
        self._index = index
        self._forward = forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        done, index = self._done, self._index
        if hidden_states is done.output and 0 < index < done.stop:
            return hidden_states
        step = kwargs.get(STEP_ARGUMENT)
        stop = index if args or not self._stack.can_take(hidden_states, step) else self._stack.end(index)
        if stop == index:
            return self._forward(hidden_states, *args, **kwargs)
        done.stop = stop
        done.output = self._stack.run(index, stop, hidden_states, step, kwargs["position_embeddings"])
        return done.output


@dataclass(slots=True)
class Done:
    """What came of a stack's last run, and the layer that it stopped before."""

    output: Tensor | None = None
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """A call of a layer in a run of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def x(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    @property
    def others(self) -> dict[str, Any]:
        """The named arguments beside x."""
        return {name: value for name, value in self.kwargs.items() if name != "hidden_states"}

    def is_followed_by(self, other: "Seen") -> bool:
        """The other was given what this returned, and otherwise the same."""
        names = self.kwargs.keys() | other.kwargs.keys()
        are_same = all(self.kwargs.get(name) is other.kwargs.get(name) for name in names - {"hidden_states"})
        return other.x is self.output and are_same and len(self.args) == len(other.args) <= 1


def replace_layers(
    model: nn.Module, trial: Callable[[], object], kind: StackKind
) -> list[tuple[LayerStack, list[LayerParts]]]:
    """Let stacks compute the layers that they equal; returns them.

    Args:
        trial: runs the model once, with no route in use.
    """
    found = [parts for module in model.modules() if (parts := _parts(module)) is not None and kind.can_hold(parts)]
    seen = calls_of([parts.layer for parts in found], trial)
    equal = [parts for parts in found if parts.layer in seen and _is_equal(parts, kind, seen[parts.layer])]
    runs: list[list[LayerParts]] = []
    for parts in equal:
        follows = runs and seen[runs[-1][-1].layer].is_followed_by(seen[parts.layer])
        if follows and runs[-1][-1].dtype == parts.dtype:
            runs[-1].append(parts)
        else:
            runs.append([parts])
    stacks = [kind.make(run) for run in runs]
    for stack, run in zip(stacks, runs, strict=True):
        done = Done()
        for index, parts in enumerate(run):
            own = StackedForward(stack, done, index, parts.layer.forward)
            setattr(parts.layer, "forward", own)  # noqa: B010 - to type checkers a method stays what it is
    return list(zip(stacks, runs, strict=True))


def _is_equal(parts: LayerParts, kind: StackKind, call: Seen) -> bool:
    own = StackedForward(kind.make([parts]), Done(), 0, parts.layer.forward)
    return kind.is_equal(parts.layer.forward, own, call)


def _parts(layer: nn.Module) -> LayerParts | None:
    """A layer's parts, if it has those that stacks know and no others, all in one dtype."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    children = dict(layer.named_children())
    attention, mlp, first, second = (children.pop(name, None) for name in CHILDREN)
    if children or not isinstance(attention, RotaryAttention) or not isinstance(mlp, GatedMlp) or not mlp.is_silu:
        return None
    if not isinstance(first, RmsNorm) or not isinstance(second, RmsNorm) or attention.call.sinks is not None:
        return None
    products = [attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj]
    groups = [group for m in products if isinstance(group := getattr(m, "shared", None), SharedLinears)]
    if len(groups) < len(products) or len(groups[1].members) > 1 or len(groups[3].members) > 1:
        return None
    norms = [first, second, *(attention.norms or ())]
    tensors = [*(norm.weight for norm in norms), *(group.bias for group in groups if group.bias is not None)]
    if len({tensor.dtype for tensor in tensors}) > 1:
        return None
    return LayerParts(layer, attention, mlp, (first, second), groups)


def calls_of(modules: Iterable[nn.Module], trial: Callable[[], object]) -> Mapping[nn.Module, Seen]:
    """The last call of each module in a run of the model."""
    seen: dict[nn.Module, Seen] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[module] = Seen(args, kwargs, output)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        trial()
    finally:
        for hook in hooks:
            hook.remove()
    return seen
