"""`apply_lora` for layers that share an input, in one call of C that reads adapters where they lie in the arenas.

Rows that want the same adapters are a group, whether they are one prompt's tokens or several requests' single ones.
Both products take each adapter's numbers once, for all the rows that want them (`lora_core/native/lora.c`); a row's
result depends on its own adapters alone.
"""

import ctypes
import operator
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.native import library
from lora_core.routing import Key, Route
from lora_core.slots import LayerSlots, Layout

__all__ = ["NativeGroup", "can_be_native"]


class _Layer(ctypes.Structure):
    """As in lora.c; the tensors are held by whoever fills it."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_columns", ctypes.c_int64),
        ("column", ctypes.c_int64),
    )


class _CPlan(ctypes.Structure):
    """As in lora.c, likewise."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("num_entries", ctypes.c_int64),
        ("num_adapters", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("extents", ctypes.c_void_p),
    )


class _Plan(NamedTuple):
    """What a route means for layers with certain layouts, and the tensors that it points to."""

    address: int
    held: tuple[_CPlan, tuple[Tensor, ...]]


def can_be_native(slots: Sequence[LayerSlots]) -> bool:
    """These layers' arenas are of a kind that there is a library for."""
    arenas = [member.a for member in slots]
    return all(a.device.type == "cpu" and a.dtype == arenas[0].dtype for a in arenas) and bool(library(arenas[0].dtype))


class NativeGroup:
    """The adapters of layers with one input.

    Args:
        slots: of each layer; see `can_be_native`.

    Attributes:
        layers: an array of C's structures, of which each knows a layer's arenas.
    """

    def __init__(self, slots: Sequence[LayerSlots]) -> None:
        found = library(slots[0].a.dtype)
        assert found is not None
        self._lora = found.lora
        self._slots = list(slots)
        self._dtype = slots[0].a.dtype
        self._tensors: list[Tensor | None] = []
        self.layers = (_Layer * len(slots))()
        column = 0
        for layer, member in zip(self.layers, slots, strict=True):
            layer.num_columns, layer.column = member.out_features, column
            column += member.out_features

    def apply(self, y: Tensor, x: Tensor, route: Route, base_bias: Tensor | None) -> None:
        """Add the adapters' part in place; see `lora_core.ops.apply_lora`.

        Args:
            y: [T, ΣO], the layers' outputs side by side, in the arenas' dtype.
            x: [T, I].
            base_bias: [ΣO] or None.

        Raises:
            MemoryError: there is no memory for the shrunk rows.
        """
        plan = self.plan(route, x.shape[0])
        if plan is None:
            return
        if x.stride(1) != 1 or x.dtype != self._dtype:
            x = x.to(self._dtype).contiguous()
        bias = None if base_bias is None else base_bias.data_ptr()
        addresses = y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), x.shape[1], bias
        if self._lora(*addresses, self.layers, len(self._slots), plan):
            raise MemoryError(f"no memory for the adapters of {len(x)} tokens")

    @property
    def layouts(self) -> list[Layout]:
        """Of the layers; a plan is right as long as they stay the same."""
        return [member.layout for member in self._slots]

    def plan(self, route: Route, num_tokens: int) -> int | None:
        """The address of what C has to know of a route, and `layers` is filled; None if no row wants anything.

        Both are right while the route and `layouts` stay what they are.
        """
        # Layouts first: rows of a layout stay where they are in whatever arena comes later.
        layouts = self.layouts
        key = (NativeGroup, num_tokens, *layouts)
        if key not in route.cache:
            route.cache[key] = _make_plan(route, layouts, num_tokens // route.num_rows)
        plan = route.cache[key]
        if plan is None:
            return None
        assert isinstance(plan, _Plan)
        tensors = [tensor for m in self._slots for tensor in (m.a, m.b, m.gain, m.bias)]
        if len(tensors) != len(self._tensors) or not all(map(operator.is_, tensors, self._tensors)):
            self._point_to(tensors)
        return plan.address

    def _point_to(self, tensors: list[Tensor | None]) -> None:
        self._tensors = tensors
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        for i, layer in enumerate(self.layers):
            layer.a, layer.b, layer.gain, layer.bias = addresses[4 * i : 4 * i + 4]


def _make_plan(route: Route, layouts: Sequence[Layout], tokens_per_row: int) -> _Plan | None:
    """None if no row wants anything that the layers have."""
    touched = [slot for slot in route.segments if any(layout.get(slot) is not None for layout in layouts)]
    place = {slot: i for i, slot in enumerate(touched)}
    ranges: dict[Hashable, list[Tensor]] = {}
    wanted: dict[Hashable, list[tuple[Key, float]]] = {}
    start = 0
    for weights, num_rows in route.runs:
        stop = start + num_rows * tokens_per_row
        own = [(slot, float(weight)) for slot, weight in weights.items() if weight and slot in place]
        if own and stop > start:
            ranges.setdefault(tuple(own), []).append(torch.arange(start, stop, dtype=torch.int32))
            wanted[tuple(own)] = own
        start = stop
    if not ranges:
        return None
    begins = [(0, 0)]
    for group, own in wanted.items():
        begins.append((begins[-1][0] + sum(map(len, ranges[group])), begins[-1][1] + len(own)))
    extents = [layout.get(slot) for layout in layouts for slot in touched]
    held = (
        torch.cat([rows for group in wanted for rows in ranges[group]]),
        torch.tensor(begins, dtype=torch.int32),
        torch.tensor([place[slot] for own in wanted.values() for slot, _ in own], dtype=torch.int32),
        torch.tensor([weight for own in wanted.values() for _, weight in own], dtype=torch.float32),
        torch.tensor(touched, dtype=torch.int32),
        torch.tensor(
            [(0, 0, 0, 0) if e is None else (e.start, e.rank, e.has_gain, e.has_bias) for e in extents],
            dtype=torch.int32,
        ),
    )
    sizes = len(held[0]), len(wanted), len(held[2]), len(touched)
    plan = _CPlan(*sizes, *(tensor.data_ptr() for tensor in held))
    return _Plan(ctypes.addressof(plan), (plan, held))
