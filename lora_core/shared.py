"""Linear layers that read the same input, computed as one.

A transformer's query, key and value projections read one tensor, and so do the gate and up projections of its MLP.
Unmodified model code calls them one after the other; here the first call computes all of them in one product of the
concatenated weights, adapters included, and the others find their part ready. Which layers belong together is not
guessed from names but seen in a trial run (`find_shared_inputs`), and checked at every call: another input tensor is
another computation.

    x ──► [ W_q ; W_k ; W_v ] ──► q | k | v          one product instead of three
    x ──► [ A_q ; A_k ; A_v ] ──► h_q | h_k | h_v    and one for all adapters in use (`lora_core.ops.native`)

For inference only; a layer's own weight is then held inside the group, and read back on demand.
"""

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lora_core.device_slots import DeviceSlots, LayerKernels
from lora_core.layer import LoraLinear, is_conv1d, linear_shape, linear_weight
from lora_core.native.linear import NativeInt4Weight, NativeWeight
from lora_core.ops.cpu import SplitGroup
from lora_core.ops.kernels import KernelGroup
from lora_core.ops.native import NativeGroup, can_be_native
from lora_core.ops.plan import MANY_TOKENS
from lora_core.packing import Int4Weight, PackedWeight, can_be_int4
from lora_core.quant import is_quantized
from lora_core.quant_product import joined_weight, quantized_form
from lora_core.slots import LayerSlots, SlotsOfLayer

if TYPE_CHECKING:
    from lora_core.ops.triton import Delta

__all__ = ["JoinedWeight", "PackedLinear", "SharedLinears", "find_shared_inputs", "share_inputs"]


class JoinedWeight(Protocol):
    """The weights W [ΣO, I] of layers with one input."""

    def __call__(self, x: Tensor, bias: Tensor | None = None, /) -> Tensor:
        """x·Wᵀ + b: x [..., I], bias [ΣO] -> [..., ΣO], new."""

    def unpack(self, rows: slice, /) -> Tensor:
        """The rows [rows, I] in floating point."""


class SharedLinears:
    """Some layers with one input, in the order in which the model calls them.

    Args:
        members: their slots are attached already; each base layer is replaced by a `PackedLinear`.
        weight: theirs [ΣO, I], one after the other.

    Attributes:
        sizes: output features of each member; their sum is ΣO.
    """

    def __init__(self, members: Sequence[LoraLinear], weight: JoinedWeight) -> None:
        self.members = list(members)
        self.sizes = [member.out_features for member in members]
        self.router = members[0].router
        self.is_head = members[0].is_head
        self.adapters = _group_adapters([member.slots for member in members])
        self._packed = weight
        biases = [member.bias.detach() for member in members if member.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self._x: Tensor | None = None
        self._parts: list[Tensor | None] = []
        for index, member in enumerate(self.members):
            member.base_layer = PackedLinear(self, index, member.base_layer)
            member.shared = self

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedLinears":
        """Itself: a copy of a module that calls it has other layers, and calls those (`side_by_side`)."""
        return self

    def output(self, member: LoraLinear, x: Tensor) -> Tensor:
        """One member's output [..., O], adapters included; the others' are kept until they ask for them."""
        if len(self.members) == 1:
            return self(x)
        index = self.members.index(member)
        if x is not self._x or self._parts[index] is None:
            self._x, self._parts = x, list(self(x).split(self.sizes, -1))
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None  # whoever takes it may overwrite it
        if index == len(self.members) - 1:
            self._x = None
        return part

    def side_by_side(self, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
        """[..., ΣO] from the modules in the members' places: an adapter's own copy may have come between one."""
        if all(map(operator.is_, modules, self.members)):
            return self(x)
        return torch.cat([module(x) for module in modules], dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        """All members' outputs side by side: x [..., I] -> [..., ΣO], new."""
        y = self.multiply(x)
        route = self.router.head_route if self.is_head else self.router.route
        if route is not None and not route.is_base:
            self.adapters.apply(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), route, self.bias)
        return y

    def apart(self, x: Tensor) -> "tuple[Tensor, Delta | None]":
        """Outputs [T, ΣO] of x [T, I], and what adapters add to them if that is not in them already.

        For layers whose adapters kernels apply, and whoever adds it as `lora_core.ops.triton.Delta` says.
        """
        route = self.router.route
        if route is None or route.is_base:
            return self.multiply(x), None
        assert isinstance(self.adapters, KernelGroup)
        if len(x) >= MANY_TOKENS:
            return self(x), None
        return self.adapters.beside(x, route, self.multiply)

    def multiply(self, x: Tensor) -> Tensor:
        """The same without adapters."""
        return self._packed(x, self.bias)

    @property
    def native(self) -> NativeWeight | NativeInt4Weight | None:
        """The weights as C multiplies by them, whatever the number of rows; None if something else does."""
        return self._packed.native if isinstance(self._packed, PackedWeight | Int4Weight) else None

    def base(self, x: Tensor, index: int) -> Tensor:
        """One member's output without adapters."""
        start = sum(self.sizes[:index])
        return self.multiply(x)[..., start : start + self.sizes[index]]

    def weight(self, index: int) -> Tensor:
        """One member's weight [O, I], bit for bit, or in float32 if it is quantized."""
        start = sum(self.sizes[:index])
        return self._packed.unpack(slice(start, start + self.sizes[index]))


def _group_adapters(slots: Sequence[SlotsOfLayer | None]) -> LayerKernels:
    """What applies the members' adapters: kernels if they are on a device, C or PyTorch if they are in arenas."""
    on_device = [member for member in slots if isinstance(member, DeviceSlots)]
    if on_device:
        return KernelGroup(on_device)
    arenas = [member for member in slots if isinstance(member, LayerSlots)]
    return NativeGroup(arenas) if can_be_native(arenas) else SplitGroup(arenas)


class PackedLinear(nn.Module):
    """In the place of a base layer whose weight is held by a group."""

    def __init__(self, group: SharedLinears, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._group = [group]  # in a list: not a submodule, and no cycle for `named_modules`
        self._index = index
        self.out_features, self.in_features = linear_shape(layer)
        self.bias = getattr(layer, "bias", None)
        self.is_quantized = is_quantized(layer)
        self.is_transposed = is_conv1d(layer)  # as files hold the weight; here it is [O, I]

    @property
    def weight(self) -> Tensor:
        """[O, I], read back from the packed form, or in float32: a copy, so keep it no longer than needed."""
        return self._group[0].weight(self._index)

    def forward(self, x: Tensor) -> Tensor:
        return self._group[0].base(x, self._index)


def find_shared_inputs(layers: Mapping[str, LoraLinear], trial: Callable[[], object]) -> list[list[str]]:
    """Names of layers that were given the same tensor one after the other in a run of the model, in call order.

    Layers that a run does not call, or calls more than once, are left out.

    Args:
        trial: runs the model once.
    """
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: calls.append((name, args[0]))

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        trial()
    finally:
        for hook in hooks:
            hook.remove()
    called = [name for name, _ in calls]
    groups: list[list[str]] = []
    previous: Tensor | None = None
    for name, x in calls:
        if called.count(name) > 1:
            previous = None
            continue
        if x is not previous:
            groups.append([])
        groups[-1].append(name)
        previous = x
    return groups


def share_inputs(
    layers: Mapping[str, LoraLinear], groups: Sequence[Sequence[str]], *, as_int4: bool = False
) -> list[SharedLinears]:
    """Compute each group of layers as one, in place; layers of unknown kinds stay as they are.

    Args:
        as_int4: few rows read weights in 4 bits, where the weights allow it; the output embedding does not.
    """
    out: list[SharedLinears] = []
    for names in groups:
        members = [layers[name] for name in names]
        forms = [_form(member) for member in members]
        if None in forms:
            continue
        parts = [members] if len(set(forms)) == 1 else [[member] for member in members]
        out += [SharedLinears(part, _joined_weight(part, as_int4=as_int4)) for part in parts]
    return out


def _form(member: LoraLinear) -> Hashable | None:
    """Layers of equal form can be one product; None for a kind of layer that only computes in its own way."""
    layer = member.base_layer
    if member.slots is None:
        return None
    if is_quantized(layer):
        form = quantized_form(layer)
        return None if form is None else (member.bias is None, form)
    is_plain = type(layer) is nn.Linear or is_conv1d(layer)
    return (member.bias is None, member.weight.dtype) if is_plain else None


def _joined_weight(members: Sequence[LoraLinear], *, as_int4: bool) -> JoinedWeight:
    layers = [member.base_layer for member in members]
    if is_quantized(layers[0]):
        return joined_weight(layers)
    weights = [linear_weight(layer).detach() for layer in layers]
    is_int4 = as_int4 and all(can_be_int4(w) and not m.is_head for w, m in zip(weights, members, strict=True))
    return (Int4Weight if is_int4 else PackedWeight)(weights[0] if len(weights) == 1 else torch.cat(weights))
