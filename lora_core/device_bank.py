"""The slots of a model, in host memory or, for kernels, on a device."""

import threading
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lora_core.device_slots import AdapterTable, DeviceSlots, flatten, to_device
from lora_core.layer import LoraLayer, LoraLinear
from lora_core.maths import Folded
from lora_core.ops.kernels import KernelGroup
from lora_core.routing import Key
from lora_core.serving import ModelSlots, Part
from lora_core.slots import SlotsOfLayer
from lora_core.transfer import Copies, copies_for

__all__ = ["DeviceModelSlots", "attach_slots", "flatten_parts"]


def attach_slots(
    layers: Mapping[str, LoraLinear],
    max_slots: int,
    *,
    dtype: torch.dtype,
    model: nn.Module | None = None,
    use_kernels: bool | None = None,
) -> ModelSlots:
    """Give every layer slots for `max_slots` adapters, held in `dtype`; memory is taken as adapters come.

    Args:
        model: where the layers are; needed for adapters that have more than these layers.
        use_kernels: apply adapters with Triton kernels; by default where the layers are on CUDA.
    """
    if use_kernels is None:
        use_kernels = all(layer.device.type == "cuda" for layer in layers.values())
    kind = DeviceModelSlots if use_kernels else ModelSlots
    return kind(layers, max_slots, dtype=dtype, model=model)


class DeviceModelSlots(ModelSlots):
    """The slots of a model whose adapters kernels apply: an adapter's arrays are one buffer on the device.

    Args:
        copies: how arrays come to the device.
    """

    def __init__(
        self,
        layers: Mapping[str, LoraLinear],
        max_slots: int,
        *,
        dtype: torch.dtype,
        model: nn.Module | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._device = next(iter(layers.values())).device
        self._table = AdapterTable(len(layers), max_slots, self._device)
        self._copies = copies_for(self._device) if copies is None else copies  # behind the table's zeros
        self._copying = threading.Lock()
        self._highest_ranks: dict[Key, int] = {}
        self._numbers = {name: number for number, name in enumerate(layers)}
        super().__init__(layers, max_slots, dtype=dtype, model=model)
        for name, number in self._numbers.items():
            slots = self.layers[name]
            assert isinstance(slots, DeviceSlots)
            slots.table, slots.layer = self._table, number
            slots.kernels = KernelGroup([slots])

    def load(self, slot: int, modules: Mapping[str, Part]) -> None:
        folded = {name: part for name, part in modules.items() if isinstance(part, Folded)}
        with self._copying:
            resident = to_device(folded, self._device, self._copies)
            rows = {number: resident[name] for name, number in self._numbers.items() if name in resident}
            self._copies.finish()  # before the slot is anybody's: no step waits, and none reads half an adapter
            super().load(slot, {**modules, **resident})
            self._table.write(slot, rows, self._copies)
            self._copies.finish()
            if len(rows) == len(modules):
                self._highest_ranks[slot] = max((part.rank for part in resident.values()), default=0)
            else:
                self._highest_ranks.pop(slot, None)

    @property
    def table(self) -> AdapterTable:
        """Where the kernels find adapters, and their launch parameters."""
        return self._table

    def can_plan(self, slots: Iterable[Key], max_rank: int) -> bool:
        """Whether adapters can follow a `PlannedRoute`: they touch linear layers only, with ranks up to `max_rank`."""
        return all(self._highest_ranks.get(slot, max_rank + 1) <= max_rank for slot in slots)

    def _make_slots(self, layer: LoraLayer) -> SlotsOfLayer:
        layer.slots = DeviceSlots(layer.in_features, layer.out_features, dtype=self._dtype)
        return layer.slots


def flatten_parts(modules: Mapping[str, Part], device: torch.device) -> dict[str, Part]:
    """The same adapter with its folded arrays in one piece of host memory, pinned for a CUDA device."""
    folded = {name: part for name, part in modules.items() if isinstance(part, Folded)}
    return {**modules, **flatten(folded, pin_memory=device.type == "cuda")}
