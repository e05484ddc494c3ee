"""`apply_lora` in two Triton kernels, for all layers that share an input at once.

    shrink   h[e] = w_e · (x[tile of e] · a_eᵀ)                          per entry, member and part of I
    expand   y[tile] += (Σ_e w_e·gain_e)·(y - bias0) + Σ_e (h[e]·b_e + w_e·bias_e)     per tile, member and block of O

A tile belongs to one program for each block of its outputs, so that mixes need no atomics; where the input features are
split, whichever part comes last adds them up, in their order. So results do not depend on the order of execution. Ranks
are loop bounds: a token pays for its own adapter's rank. What a plan has room for and does not use costs next to
nothing, and a step without adapters launches nothing. Products take the inputs' dtype (h is rounded to it once), sums
are float32.

Of few tokens `expand` writes what is to be added beside y (`Delta`): so both kernels can run beside the product that
gives y, and whatever reads y next adds it.

Triton comes with PyTorch for CUDA; this module is imported only where kernels are used.
"""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.device_slots import FIELDS
from lora_core.ops.adapter_kernels import expand_kernel, shrink_kernel
from lora_core.ops.launch import ExpandConfig, LaunchConfigs, ShrinkConfig
from lora_core.ops.plan import LARGE_TILE, RoutePlan, bucket_of

__all__ = ["Delta", "LayerTable", "apply_plan", "delta_of_plan", "expand", "is_interpreted", "shrink"]

# Small tiles and their entries that have programs of their own; further ones are taken in turn.
MAX_TILES, MAX_ENTRIES = 32, 32


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Layers whose outputs lie side by side, and where their adapters are found.

    Attributes:
        rows: [L, S, FIELDS] int64, `AdapterTable.rows`.
        counters: [...] int32, `AdapterTable.counters`.
        layers: [m] int32, the members' numbers in the table.
        starts, sizes: [m] int32, their columns in y.
        out_features: the sizes on the host.
        in_features: I.
        is_aligned: all sizes and I are multiples of 16.
        configs: measured launch parameters (`AdapterTable.configs`).
    """

    rows: Tensor
    counters: Tensor
    layers: Tensor
    starts: Tensor
    sizes: Tensor
    out_features: tuple[int, ...]
    in_features: int
    is_aligned: bool
    configs: Mapping[Hashable, Any]

    @property
    def num_members(self) -> int:
        return len(self.out_features)

    @property
    def max_size(self) -> int:
        return max(self.out_features)

    def launch_configs(self, plan: RoutePlan, rank: int, itemsize: int) -> LaunchConfigs:
        """The measured parameters of the next such plan, or the default."""
        bucket = bucket_of(plan.num_entries, plan.tile_tokens, rank)
        found: LaunchConfigs | None = self.configs.get((self.in_features, self.out_features, *bucket))
        return found or LaunchConfigs.default(plan, self.in_features, self.max_size, rank, itemsize)


@dataclass(frozen=True, slots=True)
class Delta:
    """What adapters add to y [T, ΣO]: y + added + gains·(y - bias0), where a token's flag says so.

    Attributes:
        flags: [T] int32: 0 nothing, 1 without gains, 2 with them.
        added, gains: [T, ΣO] of y's dtype; what no flag asks for is not written.
    """

    flags: Tensor
    added: Tensor
    gains: Tensor


def is_interpreted() -> bool:
    """Kernels run in Triton's interpreter, on the CPU, which multiplies bfloat16 as if it were integers."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def apply_plan(y: Tensor, x: Tensor, layers: LayerTable, plan: RoutePlan, base_bias: Tensor | None, rank: int) -> None:
    """Add the adapters' part to y in place; see `lora_core.ops.apply_lora`.

    Args:
        y: [T, ΣO], contiguous along its rows.
        x: [T, I], of y's dtype.
        base_bias: [ΣO] or None.
        rank: the highest one in the plan, or more.
    """
    if not plan.num_entries:
        return
    assert y.stride(-1) == 1
    h, config = _shrink_by_default(x, layers, plan, rank)
    expand(y, None, h, layers, plan, base_bias, config)


def delta_of_plan(x: Tensor, layers: LayerTable, plan: RoutePlan, rank: int) -> Delta:
    """The adapters' part for whoever adds it; arguments as for `apply_plan`, the plan has entries."""
    h, config = _shrink_by_default(x, layers, plan, rank)
    added, gains = (x.new_empty(len(x), sum(layers.out_features)) for _ in range(2))
    expand(added, gains, h, layers, plan, None, config)
    return Delta(plan.flags, added, gains)


def _shrink_by_default(x: Tensor, layers: LayerTable, plan: RoutePlan, rank: int) -> tuple[Tensor, ExpandConfig]:
    rank = -(-rank // 16) * 16
    configs = layers.launch_configs(plan, rank, x.element_size())
    return shrink(x if x.stride(-1) == 1 else x.contiguous(), layers, plan, rank, configs.shrink), configs.expand


def shrink(x: Tensor, layers: LayerTable, plan: RoutePlan, rank: int, config: ShrinkConfig) -> Tensor:
    """h [m, E·M, rank] in x's dtype; only the columns below an entry's rank are written."""
    shape = layers.num_members, plan.num_entries * plan.tile_tokens, rank
    splits = config.split_k if layers.num_members * plan.num_entries <= len(layers.counters) else 1
    h = torch.empty(shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(splits, *shape, dtype=torch.float32, device=x.device) if splits > 1 else h[None]
    shrink_kernel[(_grid(plan, plan.num_entries, MAX_ENTRIES), splits, layers.num_members)](
        x,
        h,
        parts,
        layers.counters,
        layers.rows,
        layers.layers,
        plan.counts,
        plan.tokens,
        plan.entry_tiles,
        plan.entry_slots,
        plan.weights,
        layers.rows.shape[1],
        layers.in_features,
        plan.num_entries,
        x.stride(0),
        parts.stride(0),
        h.stride(0),
        rank,
        NUM_FIELDS=FIELDS,
        M=plan.tile_tokens,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
        SPLIT_K=splits,
        WIDEN=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return h


def expand(
    y: Tensor,
    gains: Tensor | None,
    h: Tensor,
    layers: LayerTable,
    plan: RoutePlan,
    base_bias: Tensor | None,
    config: ExpandConfig,
) -> None:
    """y [T, ΣO] += the rest of the formula; with gains [T, ΣO] both are written instead (`Delta`)."""
    grid = _grid(plan, plan.num_tiles, MAX_TILES), -(-layers.max_size // config.block_o), layers.num_members
    expand_kernel[grid](
        y,
        y if gains is None else gains,
        h,
        y if base_bias is None else base_bias,
        layers.rows,
        layers.layers,
        layers.starts,
        layers.sizes,
        plan.counts,
        plan.flags,
        plan.tokens,
        plan.starts,
        plan.tile_slots,
        plan.entry_slots,
        plan.weights,
        layers.rows.shape[1],
        y.stride(0),
        h.stride(0),
        h.stride(1),
        IN_PLACE=gains is None,
        HAS_BASE_BIAS=base_bias is not None,
        NUM_FIELDS=FIELDS,
        M=plan.tile_tokens,
        BLOCK_R=config.block_r,
        BLOCK_O=config.block_o,
        IS_ALIGNED=layers.is_aligned,
        WIDEN=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _grid(plan: RoutePlan, number: int, most: int) -> int:
    return number if plan.tile_tokens == LARGE_TILE else min(number, most)
