"""`apply_lora` in PyTorch operators: two forms of the same sum.

- *Segments*: one pair of GEMMs per stretch of tokens that share an adapter. Best for many tokens, and the only form
  that autograd sees.
- *Dense*: one pair of GEMMs over the arena rows of all adapters in use, with the rows that are not the token's own
  masked out in between. Best for few tokens on many adapters, as in decoding: its cost does not grow with the
  number of adapters, only with the sum of their ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.maths import Folded
from lora_core.routing import Key, Route, Run
from lora_core.slots import LayerSlots, Layout

if TYPE_CHECKING:
    from lora_core.ops import AdapterSource, BasePart, Shrink

__all__ = ["SplitGroup", "apply", "apply_segments"]

# A segment's calls cost about as much as this many (token, rank row) pairs in the dense form: measured at 576 to 1,536
# features in bf16, where 8 adapters of ranks 8 to 64 break even between 256 and 1,024 tokens.
SEGMENT_ROWS = 8_192


def apply(
    y: Tensor,
    x: Tensor,
    adapters: "AdapterSource",
    route: Route,
    base_bias: Tensor | None,
    shrink: "Shrink" = F.linear,
    base_part: "BasePart | None" = None,
) -> Tensor:
    """y [T, O], x [T, I] -> [T, O]: y itself, updated in place; see `lora_core.ops.apply_lora` and `apply_rows`."""
    if isinstance(adapters, LayerSlots) and not torch.is_grad_enabled() and x.dtype == y.dtype == adapters.a.dtype:
        plan = _plan(route, adapters.layout, x)
        if plan is None:
            return y
        if isinstance(plan, _Dense):
            return _apply_dense(y, x, adapters, plan, base_bias)
    return apply_segments(y, x, adapters, route, base_bias, shrink, base_part)


class SplitGroup:
    """The adapters of layers with one input, layer by layer.

    Args:
        slots: of each layer.
    """

    def __init__(self, slots: Sequence[LayerSlots]) -> None:
        self._slots = list(slots)
        self._sizes = [member.out_features for member in slots]

    def apply(self, y: Tensor, x: Tensor, route: Route, base_bias: Tensor | None) -> None:
        """Add the adapters' part in place: y [T, ΣO], the layers' outputs side by side, x [T, I], base_bias [ΣO]."""
        biases = [None] * len(self._sizes) if base_bias is None else base_bias.split(self._sizes)
        for slots, part, bias in zip(self._slots, y.split(self._sizes, 1), biases, strict=True):
            apply(part, x, slots, route, bias)


def apply_segments(
    y: Tensor,
    x: Tensor,
    adapters: "AdapterSource",
    route: Route,
    base_bias: Tensor | None,
    shrink: "Shrink" = F.linear,
    base_part: "BasePart | None" = None,
) -> Tensor:
    """The form for many tokens; as `apply`."""
    x_per_row, y_per_row = x.shape[0] // route.num_rows, y.shape[0] // route.num_rows
    found = {key: adapter for key in route.segments if (adapter := adapters.folded(key)) is not None}
    updates: list[tuple[slice, Tensor, Tensor | None]] = []
    for key, adapter in found.items():
        dropout = adapter.dropout if adapter.dropout is not None and adapter.dropout.training else None
        for segment in route.segments[key]:
            rows = slice(segment.start * y_per_row, segment.stop * y_per_row)
            x_rows = x[segment.start * x_per_row : segment.stop * x_per_row]
            if x_rows.is_floating_point():
                x_rows = x_rows.to(adapter.a.dtype)
            if dropout is not None:
                x_rows = dropout(x_rows)
                if adapter.gain is not None and base_part is not None:  # W0 sees the same zeros as A
                    updates.append((rows, base_part(x_rows) * (segment.weight * adapter.gain), None))
            h = shrink(x_rows, adapter.a)
            if segment.weight != 1.0:
                h = h * segment.weight
            updates.append((rows, h, adapter.b))
        if dropout is not None and base_part is not None:
            found[key] = replace(adapter, gain=None)
    _apply_gains(y, found, route.runs, y_per_row, base_bias)
    for rows, h, b in updates:
        if b is None:
            y[rows] += h.to(y.dtype)
        elif b.dtype == y.dtype:
            y[rows].addmm_(h, b)
        else:
            y[rows] += (h @ b).to(y.dtype)
    return y


def _apply_gains(
    y: Tensor, found: Mapping[Key, Folded], runs: tuple[Run, ...], tokens_per_row: int, base_bias: Tensor | None
) -> None:
    """The parts that are one vector per adapter: y[t] += gain·(y[t] - bias0) + bias. A run has one sum of each."""
    start = 0
    for weights, num_rows in runs:
        stop = start + num_rows * tokens_per_row
        wanted = [(weight, found[key]) for key, weight in weights.items() if key in found]
        gain = sum(weight * a.gain for weight, a in wanted if a.gain is not None)
        bias = sum(weight * a.bias for weight, a in wanted if a.bias is not None)
        rows = y[start:stop]
        if isinstance(gain, Tensor) and (torch.is_grad_enabled() or gain.dtype != y.dtype):
            base = rows.clone() if base_bias is None else rows - base_bias  # autograd keeps it, and rows change
            bias = bias + base * gain
        elif isinstance(gain, Tensor):
            rows.addcmul_(rows if base_bias is None else rows - base_bias, gain)
        if isinstance(bias, Tensor):
            rows += bias.to(y.dtype)
        start = stop


class _Vectors(NamedTuple):
    """Per-adapter vectors in use: their [K] slots and [T, K] weights."""

    slots: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class _Dense:
    """What a route means for one layout, in the dense form.

    Attributes:
        rows: the arena rows that hold every adapter in use.
        mask: [T, rows] true where the token does not want the row.
        scale: [T, rows] weights, or None where all are 1.
        gain, bias: the adapters with such a vector, if any.
    """

    rows: slice
    mask: Tensor
    scale: Tensor | None
    gain: _Vectors | None
    bias: _Vectors | None


SEGMENTS = "segments"


def _plan(route: Route, layout: Layout, x: Tensor) -> object:
    """A `_Dense`, or SEGMENTS, or None if no token wants an adapter of this layer. Made once per route and layout."""
    key = (layout, x.shape[0])
    if key not in route.cache:
        route.cache[key] = _make_plan(route, layout, x)
    return route.cache[key]


def _make_plan(route: Route, layout: Layout, x: Tensor) -> object:
    num_tokens = x.shape[0]
    tokens_per_row = num_tokens // route.num_rows
    extents = {key: extent for key in route.segments if (extent := layout.get(key)) is not None}
    if not extents:
        return None
    start = min(extent.start for extent in extents.values())
    stop = max(extent.stop for extent in extents.values())
    segment_work = sum(
        (segment.stop - segment.start) * tokens_per_row * extent.rank + SEGMENT_ROWS
        for key, extent in extents.items()
        for segment in route.segments[key]
    )
    if num_tokens * (stop - start) > segment_work:
        return SEGMENTS

    weights = torch.tensor([[w.get(key, 0.0) for key in extents] for w, _ in route.runs], dtype=x.dtype)
    counts = torch.tensor([num_rows * tokens_per_row for _, num_rows in route.runs])
    by_token = weights.repeat_interleave(counts, dim=0)  # [T, K]
    owner = torch.full((stop - start,), len(extents))  # column of by_token; the extra one is "nobody"
    for column, extent in enumerate(extents.values()):
        owner[extent.start - start : extent.stop - start] = column
    scale = F.pad(by_token, (0, 1)).index_select(1, owner).to(x.device)
    all_ones = all(s.weight == 1.0 for key in extents for s in route.segments[key])

    def vectors(chosen: list[bool]) -> _Vectors | None:
        if not any(chosen):
            return None
        slots = [slot for slot, is_chosen in zip(extents, chosen, strict=True) if is_chosen]
        return _Vectors(torch.tensor(slots, device=x.device), by_token[:, torch.tensor(chosen)].to(x.device))

    gain = vectors([extent.has_gain for extent in extents.values()])
    bias = vectors([extent.has_bias for extent in extents.values()])
    return _Dense(slice(start, stop), scale == 0, None if all_ones else scale, gain, bias)


def _apply_dense(y: Tensor, x: Tensor, slots: LayerSlots, plan: _Dense, base_bias: Tensor | None) -> Tensor:
    h = F.linear(x, slots.a[plan.rows])
    if plan.scale is not None:
        h.mul_(plan.scale)
    h.masked_fill_(plan.mask, 0.0)  # not a product: another adapter's infinity times zero would be NaN
    if plan.gain is not None and slots.gain is not None:
        gain = plan.gain.weights @ slots.gain.index_select(0, plan.gain.slots)
        y.addcmul_(y if base_bias is None else y - base_bias, gain)
    if plan.bias is not None and slots.bias is not None:
        y.addmm_(plan.bias.weights, slots.bias.index_select(0, plan.bias.slots))
    return y.addmm_(h, slots.b[plan.rows])
