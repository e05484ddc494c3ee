"""Where layers meet the kernels: a group of layers whose adapters are on the device.

The kernels' module is imported when the first group is made, so that Triton is needed only where they are used.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.device_slots import DeviceSlots
from lora_core.ops.cpu import apply_segments
from lora_core.ops.launch import RANK_BLOCKS
from lora_core.ops.plan import NUM_ENTRIES, RANKS, SMALL_TILE, PlannedRoute, RoutePlan
from lora_core.routing import Route

if TYPE_CHECKING:
    from lora_core.ops.triton import Delta

__all__ = ["KernelGroup"]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class KernelGroup:
    """Layers that read one input and whose outputs lie side by side.

    Args:
        slots: of each member; all in one table.
    """

    def __init__(self, slots: Sequence[DeviceSlots]) -> None:
        from lora_core.ops import triton as kernels  # noqa: PLC0415 - Triton is optional

        self._slots = list(slots)
        self._kernels: Any = kernels
        sizes = [member.out_features for member in slots]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        assert slots[0].table is not None
        self._adapters = table = slots[0].table
        assert all(member.table is table for member in slots)
        numbers = torch.tensor([[member.layer for member in slots], starts, sizes], dtype=torch.int32)
        layers, on_device_starts, on_device_sizes = numbers.to(table.rows.device)
        features = slots[0].in_features
        self._table = kernels.LayerTable(
            table.rows,
            table.counters,
            layers,
            on_device_starts,
            on_device_sizes,
            tuple(sizes),
            features,
            all(number % 16 == 0 for number in (features, *sizes)),
            table.configs,
        )

    @property
    def shape(self) -> tuple[int, tuple[int, ...]]:
        """in_features, and the members' out_features."""
        return self._table.in_features, self._table.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, outputs and adapters."""
        return self._slots[0].dtype

    def warm_up(self, base_bias: Tensor | None) -> None:
        """Launch every variant of the kernels, for nobody, so that serving compiles none.

        Args:
            base_bias: [ΣO] or None, as it will be given to `apply`.
        """
        features, sizes = self.shape
        device, dtype = self._table.rows.device, self.dtype
        for tile_tokens, numbers in NUM_ENTRIES.items():
            x = torch.zeros(tile_tokens, features, dtype=dtype, device=device)
            y = torch.zeros(tile_tokens, sum(sizes), dtype=dtype, device=device)
            for num_entries in (*numbers, numbers[-1] + 1):
                plan = RoutePlan(num_entries, num_entries, tile_tokens, device, tile_tokens)
                plan.fill([])
                for rank in (*RANKS, *RANK_BLOCKS):
                    self._kernels.apply_plan(y, x, self._table, plan, base_bias, rank)
                    if tile_tokens == SMALL_TILE:
                        self._kernels.delta_of_plan(x, self._table, plan, rank)

    def apply(self, y: Tensor, x: Tensor, route: Route, base_bias: Tensor | None) -> None:
        """Add the adapters' part in place; see `lora_core.ops.apply_lora`.

        Args:
            y: [T, ΣO], the members' outputs side by side.
            x: [T, I].
            base_bias: [ΣO] or None.
        """
        is_fit = x.dtype == y.dtype == self.dtype and y.stride(-1) == 1
        if isinstance(route, PlannedRoute):
            assert is_fit, "a planned route reaches a layer that computes in another dtype than its adapters"
            self._kernels.apply_plan(y, x, self._table, route.plan, base_bias, route.max_rank)
            return
        if not is_fit:
            for slots, span in zip(self._slots, self._spans, strict=True):
                apply_segments(y[:, span], x, slots, route, None if base_bias is None else base_bias[span])
            return
        rank = self._highest_rank(route)
        if rank is not None:
            self._kernels.apply_plan(y, x, self._table, self._plan(route, x), base_bias, rank)

    def delta(self, x: Tensor, route: Route) -> "Delta | None":
        """The adapters' part for whoever adds it to the layers' outputs; None if there is none.

        Args:
            x: [T, I] of the adapters' dtype, with few tokens (`MANY_TOKENS`).
        """
        if isinstance(route, PlannedRoute):
            plan, rank = route.plan, route.max_rank
        elif route.is_base or (highest := self._highest_rank(route)) is None:
            return None
        else:
            plan, rank = self._plan(route, x), highest
        return self._kernels.delta_of_plan(x, self._table, plan, rank) if plan.num_entries else None

    def beside(self, x: Tensor, route: Route, multiply: Callable[[Tensor], Tensor]) -> "tuple[Tensor, Delta | None]":
        """`multiply(x)` and `delta(x, route)`: side by side, on streams of their own, in a recorded step."""
        if not x.is_cuda or not torch.cuda.is_current_stream_capturing():
            delta = self.delta(x, route)
            return multiply(x), delta
        main, side = torch.cuda.current_stream(), _side_stream(x.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            delta = self.delta(x, route)
        y = multiply(x)
        main.wait_stream(side)  # also before either's memory is anybody else's
        return y, delta

    def _highest_rank(self, route: Route) -> int | None:
        """Of the route's adapters on these layers; None if none of them touches any. Kept with the route."""
        layouts = tuple([slots.layout for slots in self._slots])
        if layouts not in route.cache:
            extents = [extent for slot in route.segments for layout in layouts if (extent := layout.get(slot))]
            route.cache[layouts] = max((extent.rank for extent in extents), default=None)
        return route.cache[layouts]  # type: ignore[return-value]

    def _plan(self, route: Route, x: Tensor) -> RoutePlan:
        """Made once a step for all layers."""
        key = ("kernels", x.shape[0], x.device, self._adapters.gained)
        if key not in route.cache:
            max_slots = self._table.rows.shape[1]
            route.cache[key] = RoutePlan.of(route, x.shape[0], max_slots, x.device, self._adapters.gained)
        plan = route.cache[key]
        assert isinstance(plan, RoutePlan)
        return plan
