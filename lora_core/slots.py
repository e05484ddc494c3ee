"""Slots: where folded adapters live while they serve.

Each layer keeps all of its resident adapters in one pair of arenas, rank rows after rank rows, so that any set of
them is one slice of memory and an adapter of rank 8 takes an eighth of the rows of one of rank 64:

    rows  0          8              24   28
          |--slot 0--|----slot 2----|free|--slot 1-- …        a [rows, I]   b [rows, O]

Loading writes rows that no route uses yet and then replaces the layer's `layout`, so it may run beside a forward
pass. Freeing and loading are serialised by the bank's lock; whoever frees a slot has made sure that no route uses it.
"""

import threading
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_core.errors import AdapterNotFoundError
from lora_core.maths import Folded

__all__ = ["Extent", "LayerSlots", "Layout", "SlotBank", "SlotsOfLayer"]

ROW_QUANTUM = 16
# An arena that is full grows by so much: rarely, for all of it is copied, and not far beyond what is needed.
GROWTH = 1.25


class Extent(NamedTuple):
    """Arena rows [start, start + rank) of one slot, and whether its adapter has a gain (DoRA) or a bias here.

    `serial` tells loads apart: what was derived from these rows is not mistaken for a later owner's.
    """

    start: int
    rank: int
    has_gain: bool = False
    has_bias: bool = False
    serial: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.rank


class Layout:
    """Which slot owns which rows of a layer's arenas: immutable, and compared by identity, which makes it a cheap key.

    A bank keeps one object for all layers whose extents are equal.
    """

    def __init__(self, extents: Mapping[int, Extent]) -> None:
        self.extents = dict(extents)

    def get(self, slot: object) -> Extent | None:
        return self.extents.get(slot)  # type: ignore[call-overload]

    def find_gap(self, rank: int) -> int:
        """First row of the first free stretch of `rank` rows; the last stretch is endless."""
        position = 0
        for extent in sorted(self.extents.values()):
            if extent.start - position >= rank:
                break
            position = extent.stop
        return position


class SlotsOfLayer(Protocol):
    """What a bank asks of a layer's slots, wherever they are."""

    layout: Layout

    def folded(self, slot: object, /) -> Folded | None: ...

    def write(self, slot: int, folded: Folded) -> Extent: ...

    def trim(self) -> None: ...

    def check_integrity(self) -> None: ...

    @property
    def num_bytes(self) -> int: ...


class LayerSlots:
    """The resident adapters of one linear layer.

    Attributes:
        a: [rows, I] arena.
        b: [rows, O] arena, scaled and transposed as in `Folded`.
        gain: [slots, O] DoRA gain minus one; None until a DoRA adapter was loaded.
        bias: [slots, O]; None until an adapter with a bias was loaded.
        layout: owner of each row.
    """

    def __init__(
        self, in_features: int, out_features: int, max_slots: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.max_slots = max_slots
        self.out_features = out_features
        self.a = torch.zeros(0, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(0, out_features, dtype=dtype, device=device)
        self.gain: Tensor | None = None
        self.bias: Tensor | None = None
        self.layout = Layout({})

    def folded(self, slot: object) -> Folded | None:
        """Views of one slot's rows, or None if the slot's adapter does not touch this layer."""
        extent = self.layout.get(slot)
        if extent is None or not isinstance(slot, int):
            return None
        rows = slice(extent.start, extent.stop)
        gain = self.gain[slot] if extent.has_gain and self.gain is not None else None
        bias = self.bias[slot] if extent.has_bias and self.bias is not None else None
        return Folded(self.a[rows], self.b[rows], gain, bias)

    def write(self, slot: int, folded: Folded) -> Extent:
        """Copy an adapter's arrays into free rows; they count once the layout says so."""
        start = self.layout.find_gap(folded.rank)
        extent = Extent(start, folded.rank, folded.gain is not None, folded.bias is not None)
        if extent.stop > self.a.shape[0]:
            self._resize(max(extent.stop, round(GROWTH * self.a.shape[0])))
        self.a[extent.start : extent.stop].copy_(folded.a)
        self.b[extent.start : extent.stop].copy_(folded.b)
        self.gain = self._write_vector(self.gain, slot, folded.gain)
        self.bias = self._write_vector(self.bias, slot, folded.bias)
        return extent

    @property
    def num_bytes(self) -> int:
        """Bytes that the arenas and tables take, used or not."""
        held = [t for t in (self.a, self.b, self.gain, self.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    def trim(self) -> None:
        """Give back what no slot needs any more, where it is half of an arena or a whole table."""
        extents = self.layout.extents.values()
        end = max((extent.stop for extent in extents), default=0)
        if 2 * end <= self.a.shape[0]:
            self._resize(end)
        if not any(extent.has_gain for extent in extents):
            self.gain = None
        if not any(extent.has_bias for extent in extents):
            self.bias = None

    def check_integrity(self) -> None:
        """Assert that extents are disjoint and inside the arenas."""
        end = 0
        for extent in sorted(self.layout.extents.values()):
            assert extent.start >= end, "slots overlap"
            end = extent.stop
        assert end <= self.a.shape[0], "rows outside the arena"

    def _resize(self, rows: int) -> None:
        rows = -(-rows // ROW_QUANTUM) * ROW_QUANTUM
        for name in ("a", "b"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1])
            num_kept = min(rows, old.shape[0])
            new[:num_kept].copy_(old[:num_kept])
            setattr(self, name, new)

    def _write_vector(self, table: Tensor | None, slot: int, value: Tensor | None) -> Tensor | None:
        if value is None:
            return table
        if table is None:
            table = self.b.new_zeros(self.max_slots, self.out_features)
        table[slot].copy_(value)
        return table


class SlotBank:
    """All layers' slots: adapters are loaded and freed in all of them at once.

    Args:
        layers: the slots of each layer, by the layer's dotted name.
    """

    def __init__(self, layers: Mapping[str, SlotsOfLayer], max_slots: int) -> None:
        self.layers = layers
        self.max_slots = max_slots
        self._lock = threading.Lock()
        self._layouts: dict[tuple[tuple[int, Extent], ...], Layout] = {}
        self._loaded: dict[int, tuple[str, ...]] = {}
        self._num_loads = 0
        for layer in layers.values():
            layer.layout = self._layout(layer.layout.extents)

    @property
    def loaded_slots(self) -> frozenset[int]:
        return frozenset(self._loaded)

    @property
    def num_bytes(self) -> int:
        """Bytes that all layers' arenas and tables take, used or not."""
        return sum(layer.num_bytes for layer in self.layers.values())

    def load(self, slot: int, modules: Mapping[str, Folded]) -> None:
        """Put an adapter into an empty slot.

        Args:
            modules: its folded arrays by layer name; each name must be one of `layers`.

        Raises:
            ValueError: the slot is taken or out of range.
        """
        with self._lock:
            if slot in self._loaded or not 0 <= slot < self.max_slots:
                raise ValueError(f"slot {slot} is taken or out of range")
            self._num_loads += 1
            extents = {
                name: self.layers[name].write(slot, folded)._replace(serial=self._num_loads)
                for name, folded in modules.items()
            }
            for name, extent in extents.items():
                self.layers[name].layout = self._layout(self.layers[name].layout.extents | {slot: extent})
            self._loaded[slot] = tuple(modules)
            self._forget_unused_layouts()

    def free(self, slot: int) -> None:
        """Empty a slot; its rows can be written again at once.

        Raises:
            AdapterNotFoundError: the slot is empty.
        """
        with self._lock:
            if slot not in self._loaded:
                raise AdapterNotFoundError(f"slot {slot} is empty")
            for name in self._loaded.pop(slot):
                extents = self.layers[name].layout.extents
                self.layers[name].layout = self._layout({s: e for s, e in extents.items() if s != slot})
                self.layers[name].trim()
            self._forget_unused_layouts()

    def add_layer(self, name: str, layer: SlotsOfLayer) -> None:
        """One more layer, empty."""
        with self._lock:
            layer.layout = self._layout({})
            self.layers = {**self.layers, name: layer}

    def check_integrity(self) -> None:
        """Assert that extents are disjoint, inside their arenas, and belong to loaded slots; on any thread."""
        with self._lock:
            for name, layer in self.layers.items():
                layer.check_integrity()
                for slot in layer.layout.extents:
                    assert name in self._loaded.get(slot, ()), f"{name}: slot {slot} is not loaded"

    def _layout(self, extents: Mapping[int, Extent]) -> Layout:
        key = tuple(sorted(extents.items()))
        if key not in self._layouts:
            self._layouts[key] = Layout(extents)
        return self._layouts[key]

    def _forget_unused_layouts(self) -> None:
        used = {layer.layout for layer in self.layers.values()}
        self._layouts = {key: layout for key, layout in self._layouts.items() if layout in used}
