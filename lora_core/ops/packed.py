"""`apply_lora` for layers that share an input, with the adapters in use packed side by side.

Requests that want few rows each (decoding) come first in a batch and are computed together whoever they belong to: one
shrink product with all A of all member layers, everything that is not a row's own masked out, one expand product per
member. The rows behind them (prompts) go adapter by adapter, as in `lora_core.ops.cpu`.

    h = x·[A of every adapter in use, for every member]ᵀ,  masked
    y_m += h_m·[B_m of every adapter in use]

Packing copies the rows of the adapters in use, which takes as long as some steps. So it waits until rows whose adapter
is not packed, which go adapter by adapter meanwhile, have cost about as much; then a few groups are packed a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
# Packed again, without what is no longer used, when for so many steps on end less than this share was in use.
MIN_USED_SHARE = 0.5
MAX_SPARSE_STEPS = 64
# Packing an adapter costs about what going without does for so many steps.
STEPS_TO_PACK = 3
# Groups packed in one step. A model of 30 layers has 120.
GROUPS_A_STEP = 8


@dataclass(frozen=True, eq=False, slots=True)
class _Columns:
    """Which adapters are packed, in which order: one list of (slot, extent) per member. Compared by identity."""

    slots: tuple[int, ...]
    members: tuple[tuple[tuple[int, Extent], ...], ...]

    def has(self, slot: int, layouts: Sequence[Layout]) -> bool:
        """Everything that the slot has in these layers by now is packed."""
        pairs = zip(layouts, self.members, strict=True)
        return all((own := layout.get(slot)) is None or (slot, own) in member for layout, member in pairs)


class _Member(NamedTuple):
    """What each row wants of one member's part of h."""

    drop: Tensor  # [n, R_m]
    scale: Tensor  # [n, R_m] weights
    gain_slots: Tensor | None  # [K] slots with a gain
    gain_weights: Tensor | None  # [n, K]
    bias_slots: Tensor | None
    bias_weights: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class _Plan:
    """What a route means for a group with certain layouts and a certain packing. Compared by identity.

    Attributes:
        wanted: all slots that the route wants of the group.
        num_needed: adapters that the rows computed together want of it.
        num_missing: those of them that are not packed.
        num_together: n, the rows computed together.
        drop: [n, ΣR] which rank rows of h are not a row's own; None if these rows want nothing that is packed.
        scale: [n, ΣR] the weights of those that are, or None where all are 1.
        has_vectors: an adapter has a gain or a bias.
        rest: the route of all rows without what is computed together, if it wants adapters.
    """

    wanted: tuple[int, ...]
    num_needed: int
    num_missing: int
    num_together: int
    drop: Tensor | None = None
    scale: Tensor | None = None
    has_vectors: bool = False
    members: tuple[_Member, ...] = ()
    rest: Route | None = None

    def is_sparse(self, columns: _Columns) -> bool:
        return self.num_needed < MIN_USED_SHARE * len(columns.slots)


NOTHING_PACKED = _Columns((), ())


def _make_plan(route: Route, layouts: Sequence[Layout], columns: _Columns, x: Tensor) -> _Plan:
    """Split a route's tokens and say what the first of them want; x [T, I] for its size, dtype and device."""
    tokens_per_row = x.shape[0] // route.num_rows
    runs = [Run(run.weights, run.num_rows * tokens_per_row) for run in route.runs]
    count = next((i for i, run in enumerate(runs) if run.num_rows > MAX_TOGETHER), len(runs))
    touched = {
        slot
        for slot in route.segments
        if isinstance(slot, int) and any(layout.get(slot) is not None for layout in layouts)
    }
    needed = {slot for run in runs[:count] for slot, weight in run.weights.items() if weight} & touched
    packed = {slot for slot in needed if columns.members and columns.has(slot, layouts)}
    missing = needed - packed
    is_inside = [
        i < count and not any(w and slot in missing for slot, w in runs[i].weights.items()) for i in range(len(runs))
    ]
    rest = Route(Run({}, run.num_rows) if inside else run for run, inside in zip(runs, is_inside, strict=True))
    own = [
        Run(run.weights if inside else {}, run.num_rows) for run, inside in zip(runs[:count], is_inside, strict=False)
    ]
    plan = _Plan(
        wanted=tuple(sorted(touched)),
        num_needed=len(needed),
        num_missing=len(missing),
        num_together=sum(run.num_rows for run in own),
        rest=rest if touched & set(rest.segments) else None,
    )
    if not packed & {slot for run in own for slot, weight in run.weights.items() if weight}:
        return plan
    members = _members(own, columns, layouts, x)
    is_scaled = any(weight not in (0.0, 1.0) for run in own for weight in run.weights.values())
    return replace(
        plan,
        drop=torch.cat([member.drop for member in members], dim=1),
        scale=torch.cat([member.scale for member in members], dim=1) if is_scaled else None,
        has_vectors=any(m.gain_slots is not None or m.bias_slots is not None for m in members),
        members=members,
    )


def _members(runs: Sequence[Run], columns: _Columns, layouts: Sequence[Layout], x: Tensor) -> tuple[_Member, ...]:
    weights = torch.tensor([[run.weights.get(slot, 0.0) for slot in columns.slots] for run in runs], dtype=x.dtype)
    by_row = weights.repeat_interleave(torch.tensor([run.num_rows for run in runs]), dim=0)  # [n, K]
    by_row = torch.nn.functional.pad(by_row, (0, 1))  # and a column of nobody's
    place = {slot: i for i, slot in enumerate(columns.slots)}
    made: dict[object, _Member] = {}
    out = []
    for member, layout in zip(columns.members, layouts, strict=True):
        key = (member, layout)
        if key not in made:  # most members have the same adapters with the same ranks
            # What another adapter has left there before the slot was given away is nobody's.
            current = [(slot, extent) for slot, extent in member if layout.get(slot) == extent]
            owners = torch.tensor([place[s] if (s, e) in current else len(place) for s, e in member], dtype=torch.long)
            ranks = torch.tensor([extent.rank for _, extent in member], dtype=torch.long)
            scale = by_row.index_select(1, owners.repeat_interleave(ranks)).to(x.device)
            gain = [slot for slot, extent in current if extent.has_gain]
            bias = [slot for slot, extent in current if extent.has_bias]

            def vectors(chosen: list[int]) -> tuple[Tensor | None, Tensor | None]:
                if not chosen:
                    return None, None
                picked = by_row[:, [place[slot] for slot in chosen]]
                return torch.tensor(chosen, device=x.device), picked.to(x.device)

            made[key] = _Member(scale == 0, scale, *vectors(gain), *vectors(bias))
        out.append(made[key])
    return tuple(out)


class AdapterPacker:
    """Says when groups pack anew; one for all groups of a model."""

    def __init__(self) -> None:
        self._leader: object = None
        self._is_packing = False
        self._has_missed = False
        self._debt = 0
        self._room = 0
        self._columns: dict[object, _Columns] = {}

    def begin_call(self, group: object, plan: _Plan) -> None:
        """A group is about to compute; the first one's calls tell the steps apart."""
        if self._leader is None:
            self._leader = group
        if group is self._leader:
            self._room = GROUPS_A_STEP
            if not self._has_missed:
                self._is_packing, self._debt = False, 0
            self._has_missed = False
        if plan.num_missing:
            self._has_missed = True
            if group is self._leader:
                self._debt += plan.num_missing
            self._is_packing = self._is_packing or self._debt >= STEPS_TO_PACK * plan.num_needed

    def may_pack(self, plan: _Plan) -> bool:
        """Whether a group that lacks adapters packs now, before it computes."""
        if 2 * plan.num_missing >= plan.num_needed:  # there is little that could go on as before
            return True
        return self._is_packing and self.has_room()

    def has_room(self) -> bool:
        """Take one of the groups that may be packed in this step."""
        self._room -= 1
        return self._room >= 0

    def columns(self, slots: tuple[int, ...], layouts: Sequence[Layout]) -> _Columns:
        """The packing of these slots; one object for all groups of equal layouts."""
        members = tuple(
            tuple((slot, extent) for slot in slots if (extent := layout.get(slot)) is not None) for layout in layouts
        )
        if slots not in (columns.slots for columns in self._columns.values()):
            self._columns.clear()
        return self._columns.setdefault((slots, members), _Columns(slots, members))


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
        self._columns = NOTHING_PACKED
        self._num_sparse = 0
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
        plan = self._plan(route, layouts, x)
        self._packer.begin_call(self, plan)
        if plan.num_missing:
            is_due = self._packer.may_pack(plan)
        else:
            self._num_sparse = self._num_sparse + 1 if plan.num_needed and plan.is_sparse(self._columns) else 0
            is_due = self._num_sparse > MAX_SPARSE_STEPS and self._packer.has_room()
        if is_due:
            self._pack(self._packer.columns(plan.wanted, layouts))
            plan = self._plan(route, layouts, x)
        if plan.drop is not None:
            n = plan.num_together
            self._apply_together(y[:n], x[:n], plan, route, base_bias)
        if plan.rest is not None:
            for slots, span in zip(self._slots, self._spans, strict=True):
                bias = None if base_bias is None else base_bias[span]
                apply_segments(y[:, span], x, slots, plan.rest, bias)

    def _plan(self, route: Route, layouts: tuple[Layout, ...], x: Tensor) -> _Plan:
        key = (self._columns, *layouts)
        plan = route.cache.get(key)
        if plan is None:
            plan = route.cache[key] = _make_plan(route, layouts, self._columns, x)
        assert isinstance(plan, _Plan)
        return plan

    def _apply_together(self, y: Tensor, x: Tensor, plan: _Plan, route: Route, base_bias: Tensor | None) -> None:
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

    def _pack(self, columns: _Columns) -> None:
        """Copy the rows of the adapters in `columns` side by side."""
        self._num_sparse = 0
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
        key = (self, plan)
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
