"""`apply_lora` for layers that share an input, with the adapters in use packed side by side.

A batch is split in two. Its first rows, those of requests that want few rows each (decoding), are computed together
whoever they belong to: one shrink product with all A of all member layers, everything that is not a row's own masked
out, one expand product per member. The rows behind them (prompts) go adapter by adapter, as in `lora_core.ops.cpu`.

    h = x·[A of every adapter in use, for every member]ᵀ,  masked
    y_m += h_m·[B_m of every adapter in use]

Packing copies the rows of the adapters in use; it is done again when a batch wants an adapter that is not among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.ops.cpu import apply_segments
from lora_core.packing import PackedWeight
from lora_core.routing import Route, Run
from lora_core.slots import Extent, LayerSlots, Layout

__all__ = ["AdapterPacker", "GroupAdapters"]

MAX_BLANKS = 150_000
# Runs of at most so many tokens are computed together with others.
MAX_TOGETHER = 4
# Packed again, without what is no longer used, when so many times on end less than this share was in use.
MIN_USED_SHARE = 0.5
MAX_SPARSE_PLANS = 64


@dataclass(frozen=True, eq=False, slots=True)
class _Columns:
    """Which adapters are packed, in which order: one list of (slot, extent) per member. Compared by identity."""

    members: tuple[tuple[tuple[int, Extent], ...], ...]

    @property
    def num_rows(self) -> int:
        return sum(extent.rank for member in self.members for _, extent in member)


class _Member(NamedTuple):
    """What each row wants of one member's part of h."""

    drop: Tensor  # [n, R_m]
    scale: Tensor  # [n, R_m] weights
    gain_slots: Tensor | None  # [K] slots with a gain
    gain_weights: Tensor | None  # [n, K]
    bias_slots: Tensor | None
    bias_weights: Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a route means for a group with certain layouts.

    Attributes:
        num_together: n, the rows computed together.
        columns: the packing that the rest is for; None if these rows want nothing of the group's.
        drop: [n, ΣR] which rank rows of h are not a row's own.
        scale: [n, ΣR] the weights of those that are, or None where all are 1.
        has_vectors: an adapter has a gain or a bias.
        tail: the route of the rows behind them, if they want adapters.
    """

    num_together: int
    columns: _Columns | None
    drop: Tensor | None
    scale: Tensor | None
    has_vectors: bool
    members: tuple[_Member, ...]
    tail: Route | None


class AdapterPacker:
    """Decides which adapters are packed, once for all groups of a model."""

    def __init__(self) -> None:
        self._slots: tuple[int, ...] = ()
        self._num_sparse_plans = 0
        self._columns: dict[tuple[tuple[tuple[int, Extent], ...], ...], _Columns] = {}

    def columns(self, needed: Sequence[int], layouts: Sequence[Layout]) -> _Columns:
        """A packing that has all slots in `needed`, if possible one that is in use already."""
        is_sparse = len(needed) < MIN_USED_SHARE * len(self._slots)
        self._num_sparse_plans = self._num_sparse_plans + 1 if is_sparse else 0
        if not set(needed) <= set(self._slots) or self._num_sparse_plans > MAX_SPARSE_PLANS:
            self._slots = tuple(sorted(needed))
            self._num_sparse_plans = 0
            self._columns.clear()
        members = tuple(
            tuple((slot, extent) for slot in self._slots if (extent := layout.get(slot)) is not None)
            for layout in layouts
        )
        if members not in self._columns:
            self._columns[members] = _Columns(members)
        return self._columns[members]

    def plan(self, route: Route, layouts: Sequence[Layout], x: Tensor) -> _Plan:
        """Split a route's tokens and say what the first of them want; x [T, I] for its size, dtype and device."""
        tokens_per_row = x.shape[0] // route.num_rows
        runs = [Run(run.weights, run.num_rows * tokens_per_row) for run in route.runs]
        count = next((i for i, run in enumerate(runs) if run.num_rows > MAX_TOGETHER), len(runs))
        together, tail = runs[:count], Route(runs[count:])
        has_tail = any(layout.get(slot) is not None for slot in tail.segments for layout in layouts)
        needed = {slot for run in together for slot, weight in run.weights.items() if weight}
        touched = [slot for slot in needed if any(layout.get(slot) is not None for layout in layouts)]
        columns = self.columns(sorted(needed), layouts) if touched else None
        num_together = sum(run.num_rows for run in together)
        if columns is None:
            return _Plan(num_together, None, None, None, False, (), tail if has_tail else None)
        members = _members(together, columns, x)
        drop = torch.cat([member.drop for member in members], dim=1)
        scale = torch.cat([member.scale for member in members], dim=1)
        is_scaled = any(weight not in (0.0, 1.0) for run in together for weight in run.weights.values())
        has_vectors = any(m.gain_slots is not None or m.bias_slots is not None for m in members)
        return _Plan(
            num_together=num_together,
            columns=columns,
            drop=drop,
            scale=scale if is_scaled else None,
            has_vectors=has_vectors,
            members=members,
            tail=tail if has_tail else None,
        )


def _members(runs: Sequence[Run], columns: _Columns, x: Tensor) -> tuple[_Member, ...]:
    slots = sorted({slot for member in columns.members for slot, _ in member})
    weights = torch.tensor([[run.weights.get(slot, 0.0) for slot in slots] for run in runs], dtype=x.dtype)
    by_row = weights.repeat_interleave(torch.tensor([run.num_rows for run in runs]), dim=0)  # [n, K]
    place = {slot: i for i, slot in enumerate(slots)}
    made: dict[object, _Member] = {}
    for member in columns.members:
        if member not in made:  # most members have the same adapters with the same ranks
            owners = torch.tensor([place[slot] for slot, _ in member], dtype=torch.long)
            ranks = torch.tensor([extent.rank for _, extent in member], dtype=torch.long)
            scale = by_row.index_select(1, owners.repeat_interleave(ranks)).to(x.device)
            gain = [slot for slot, extent in member if extent.has_gain]
            bias = [slot for slot, extent in member if extent.has_bias]

            def vectors(chosen: list[int]) -> tuple[Tensor | None, Tensor | None]:
                if not chosen:
                    return None, None
                picked = by_row[:, [place[slot] for slot in chosen]]
                return torch.tensor(chosen, device=x.device), picked.to(x.device)

            made[member] = _Member(scale == 0, scale, *vectors(gain), *vectors(bias))
    return tuple(made[member] for member in columns.members)


class _Expand(NamedTuple):
    """One product: the next `rank` columns of h give columns `span` of y, which may be all of them."""

    rank: int
    span: slice
    is_all: bool
    b: PackedWeight


def _join_expands(parts: Sequence[Tensor]) -> list[_Expand]:
    """Pack every member's B [R_m, O_m]; neighbours that are small share a product of a block-diagonal matrix.

    A product costs some 15 µs however small it is, in which as much memory is read as MAX_BLANKS zeros take.
    """
    joined: list[Tensor] = []
    for part in parts:
        last = joined[-1] if joined else part[:0, :0]
        num_blanks = last.shape[0] * part.shape[1] + part.shape[0] * last.shape[1]
        if joined and num_blanks <= MAX_BLANKS:
            joined[-1] = torch.block_diag(last, part)
        else:
            joined.append(part)
    num_columns = sum(b.shape[1] for b in joined)
    out = []
    column = 0
    for b in joined:
        span = slice(column, column + b.shape[1])
        column = span.stop
        if b.shape[0]:
            out.append(_Expand(b.shape[0], span, b.shape[1] == num_columns, PackedWeight(b.T)))
    return out


class GroupAdapters:
    """The adapters of one group of layers.

    Args:
        slots: of each member.
        packer: the model's.
    """

    def __init__(self, slots: Sequence[LayerSlots], packer: AdapterPacker) -> None:
        self._slots = list(slots)
        self._packer = packer
        stops = torch.tensor([member.out_features for member in slots]).cumsum(0).tolist()
        self._spans = [slice(stop - member.out_features, stop) for stop, member in zip(stops, slots, strict=True)]
        self._columns: _Columns | None = None
        self._a: PackedWeight | None = None
        self._expands: list[_Expand] = []
        self._ranks: list[int] = []
        self._zero = slots[0].a.new_zeros(())

    def apply(self, y: Tensor, x: Tensor, route: Route, base_bias: Tensor | None) -> None:
        """Add the adapters' part in place; see `lora_core.ops.apply_lora`.

        Args:
            y: [T, ΣO], the members' outputs side by side.
            x: [T, I].
            base_bias: [ΣO] or None.
        """
        layouts = tuple([slots.layout for slots in self._slots])
        plan = route.cache.get(layouts)
        if plan is None:
            plan = route.cache[layouts] = self._packer.plan(route, layouts, x)
        assert isinstance(plan, _Plan)
        if plan.columns is not None:
            n = plan.num_together
            self._apply_together(y[:n], x[:n], plan, route, base_bias)
        if plan.tail is not None:
            y_tail, x_tail = y[plan.num_together :], x[plan.num_together :]
            for slots, span in zip(self._slots, self._spans, strict=True):
                bias = None if base_bias is None else base_bias[span]
                apply_segments(y_tail[:, span], x_tail, slots, plan.tail, bias)

    def _apply_together(self, y: Tensor, x: Tensor, plan: _Plan, route: Route, base_bias: Tensor | None) -> None:
        if self._columns is not plan.columns:
            self._pack(plan.columns)
        if plan.has_vectors:
            gain, bias = self._vectors(plan, route)
            if gain is not None:
                y.addcmul_(y if base_bias is None else y - base_bias, gain)
            if bias is not None:
                y.add_(bias)
        if self._a is None or plan.drop is None:
            return
        # Replaced, not multiplied: another adapter's infinity times zero would be NaN.
        h = self._a(x).masked_fill_(plan.drop, 0.0)
        if plan.scale is not None:
            h.mul_(plan.scale)
        if len(self._expands) == 1:
            expand = self._expands[0]
            (y if expand.is_all else y[:, expand.span]).add_(expand.b(h))
            return
        for expand, own in zip(self._expands, h.split(self._ranks, 1), strict=True):
            y[:, expand.span].add_(expand.b(own))

    def _pack(self, columns: _Columns | None) -> None:
        """Copy the rows of the adapters in `columns` side by side."""
        assert columns is not None
        a, b = [], []
        for slots, member in zip(self._slots, columns.members, strict=True):
            a += [slots.a[extent.start : extent.stop] for _, extent in member]
            own = [slots.b[extent.start : extent.stop] for _, extent in member]
            b.append(torch.cat(own) if own else slots.b[:0])
        self._a = PackedWeight(torch.cat(a)) if a else None
        self._expands = _join_expands(b)
        self._ranks = [expand.rank for expand in self._expands]
        self._columns = columns

    def _vectors(self, plan: _Plan, route: Route) -> tuple[Tensor | None, Tensor | None]:
        """Each row's sum of gains and of biases, [n, ΣO], or None; kept with the route for the steps that follow."""
        key = (self, plan.columns)
        found = route.cache.get(key)
        if found is None:
            gains = [self._sum(slots.gain, m.gain_slots, m.gain_weights) for slots, m in self._zip(plan)]
            biases = [self._sum(slots.bias, m.bias_slots, m.bias_weights) for slots, m in self._zip(plan)]
            found = route.cache[key] = (self._join(gains, plan), self._join(biases, plan))
        assert isinstance(found, tuple)
        return found

    def _zip(self, plan: _Plan) -> list[tuple[LayerSlots, _Member]]:
        return list(zip(self._slots, plan.members, strict=True))

    def _sum(self, table: Tensor | None, slots: Tensor | None, weights: Tensor | None) -> Tensor | None:
        if table is None or slots is None or weights is None:
            return None
        return (weights.float() @ table.index_select(0, slots).float()).to(table.dtype)

    def _join(self, parts: Sequence[Tensor | None], plan: _Plan) -> Tensor | None:
        if all(part is None for part in parts):
            return None
        blank = [self._zero.new_zeros(plan.num_together, slots.out_features) for slots in self._slots]
        return torch.cat([b if part is None else part for part, b in zip(parts, blank, strict=True)], dim=1)
