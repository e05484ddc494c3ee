"""Slots on an accelerator: an adapter is one piece of memory, and a table says where its arrays are.

    table [layers, slots, FIELDS]     (a, b, gain, bias: addresses, 0 for none; rank)
                     |
                     v
    one buffer per adapter   | a b | a b gain | a b | ...        every array begins at a multiple of ALIGNMENT

Kernels look up addresses in the table, which never moves: adapters come, go and have any rank without anything else
being moved, and a captured graph need not know. Adapters take the bytes that they need, and no more.
"""

from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_core.maths import Folded
from lora_core.routing import Route
from lora_core.slots import Extent, Layout
from lora_core.transfer import Copies

__all__ = ["FIELDS", "AdapterTable", "DeviceSlots", "LayerKernels", "flatten", "to_device"]

FIELDS = 8
COUNTERS = 1 << 14
ALIGNMENT = 256
# One core takes 40 ms for the 84 MB of rank 16 on all of an 8B model. Threads inherit the priority of their maker.
NUM_COPIERS = 4
LARGE_BYTES = 8 << 20


class AdapterTable:
    """Where the arrays of every layer's adapters are.

    Attributes:
        rows: [L, S, FIELDS] int64.
        counters: [COUNTERS] int32, zeros between launches: how many programs have done their part of a sum.
        gained: slots whose adapters have gains; another object when it changes.
        configs: launch parameters that were measured for the kernels (`lora_core.ops.tuning`).
    """

    def __init__(self, num_layers: int, max_slots: int, device: torch.device) -> None:
        self.configs: dict[Hashable, Any] = {}
        self.rows = torch.zeros(num_layers, max_slots, FIELDS, dtype=torch.int64, device=device)
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.gained: frozenset[int] = frozenset()

    def write(self, slot: int, folded: Mapping[int, Folded], copies: Copies) -> None:
        """Tell where a slot's arrays are now.

        Args:
            folded: on the device, by layer number; a layer that is not named is not touched by the adapter.
        """
        host = [[0] * FIELDS for _ in range(self.rows.shape[0])]
        for layer, part in folded.items():
            host[layer][:5] = *map(_address, (part.a, part.b, part.gain, part.bias)), part.rank
        copies.copy(self.rows[:, slot], torch.tensor(host, dtype=torch.int64))
        has_gain = any(part.gain is not None for part in folded.values())
        if has_gain != (slot in self.gained):
            self.gained ^= {slot}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class LayerKernels(Protocol):
    """The kernels of one or several layers (`lora_core.ops.kernels`)."""

    def apply(self, y: Tensor, x: Tensor, route: Route, base_bias: Tensor | None) -> None:
        """Add the adapters' part to y in place."""


class DeviceSlots:
    """The resident adapters of one layer, where kernels apply them.

    Attributes:
        table, layer: the table and the layer's number in it; None for a layer that kernels do not know.
        kernels: of the layer alone; None for such a layer.
        layout: what each slot's adapter has here; it has no rows of an arena.
    """

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype
        self.table: AdapterTable | None = None
        self.layer = 0
        self.kernels: LayerKernels | None = None
        self.layout = Layout({})
        self._folded: dict[int, Folded] = {}

    def folded(self, slot: object) -> Folded | None:
        """A slot's arrays, or None if its adapter does not touch this layer."""
        return self._folded.get(slot)  # type: ignore[call-overload]

    def write(self, slot: int, folded: Folded) -> Extent:
        """Keep arrays that are on the device already."""
        self._folded = self._folded | {slot: folded}
        return Extent(0, folded.rank, folded.gain is not None, folded.bias is not None)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for folded in self._folded.values() for t in folded.tensors())

    def trim(self) -> None:
        """Let go of what no slot has any more."""
        self._folded = {slot: folded for slot, folded in self._folded.items() if self.layout.get(slot) is not None}

    def check_integrity(self) -> None:
        """Assert that the layout says what the slots hold."""
        assert self._folded.keys() == self.layout.extents.keys(), "slots and layout differ"
        assert all(self._folded[slot].rank == extent.rank for slot, extent in self.layout.extents.items())


@dataclass(frozen=True, slots=True)
class _Places:
    """Where each array goes in a buffer of `num_bytes`."""

    offsets: list[int]
    num_bytes: int


def _arrays(modules: Mapping[str, Folded]) -> Iterator[Tensor]:
    return (tensor for folded in modules.values() for tensor in folded.tensors())


def _places(modules: Mapping[str, Folded]) -> _Places:
    offsets = []
    end = 0
    for tensor in _arrays(modules):
        offsets.append(end)
        end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return _Places(offsets, end)


def _views(modules: Mapping[str, Folded], buffer: Tensor, places: _Places) -> dict[str, Folded]:
    """The same arrays as views of a buffer [num_bytes] uint8."""
    offsets = iter(places.offsets)

    def view(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        start = next(offsets)
        raw = buffer[start : start + like.numel() * like.element_size()]
        return raw.view(like.dtype).view(like.shape)

    out = {}
    for name, folded in modules.items():
        a, b = view(folded.a), view(folded.b)
        assert a is not None
        assert b is not None
        out[name] = replace(folded, a=a, b=b, gain=view(folded.gain), bias=view(folded.bias))
    return out


def flatten(modules: Mapping[str, Folded], *, pin_memory: bool) -> dict[str, Folded]:
    """Copy an adapter's arrays into one piece of host memory, from which one copy brings them to the device."""
    places = _places(modules)
    views = _views(modules, torch.empty(places.num_bytes, dtype=torch.uint8, pin_memory=pin_memory), places)
    targets, sources = list(_arrays(views)), list(_arrays(modules))
    count = 1 if places.num_bytes < LARGE_BYTES else min(NUM_COPIERS, len(targets))

    def copy(number: int) -> None:
        # In one call: after each, a thread that is busy beside this one, the engine's, may have to be waited for.
        torch._foreach_copy_(targets[number::count], sources[number::count])

    if count > 1:
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(copy, range(count)))
    elif targets:
        copy(0)
    return views


def to_device(modules: Mapping[str, Folded], device: torch.device, copies: Copies) -> dict[str, Folded]:
    """Begin to copy an adapter's arrays into one new buffer on the device: at one stroke if they are flat already."""
    places = _places(modules)
    buffer = copies.allocate(places.num_bytes, device)
    views = _views(modules, buffer, places)
    sources = list(_arrays(modules))
    storages = {tensor.untyped_storage().data_ptr() for tensor in sources}
    offsets = [tensor.storage_offset() * tensor.element_size() for tensor in sources]
    is_flat = len(storages) == 1 and offsets == places.offsets
    if is_flat and sources[0].untyped_storage().nbytes() == places.num_bytes:
        flat = torch.empty(0, dtype=torch.uint8).set_(sources[0].untyped_storage())
        copies.copy(buffer, flat)
    else:
        for target, source in zip(_arrays(views), sources, strict=True):
            copies.copy(target, source)
    return views
