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
import triton
import triton.language as tl
from torch import Tensor

from lora_core.device_slots import FIELDS
from lora_core.ops.launch import RANK_BLOCKS, ExpandConfig, LaunchConfigs, ShrinkConfig
from lora_core.ops.plan import LARGE_TILE, RoutePlan, bucket_of

__all__ = [
    "RANK_BLOCKS",
    "Delta",
    "ExpandConfig",
    "LaunchConfigs",
    "LayerTable",
    "ShrinkConfig",
    "apply_plan",
    "delta_of_plan",
    "expand",
    "is_interpreted",
    "shrink",
]

# Small tiles and their entries that have programs of their own; further ones are taken in turn.
MAX_TILES, MAX_ENTRIES = 16, 32


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
    expand(y, y, h, layers, plan, config, base_bias=base_bias, in_place=True)


def delta_of_plan(x: Tensor, layers: LayerTable, plan: RoutePlan, rank: int) -> Delta:
    """The adapters' part for whoever adds it; arguments as for `apply_plan`, the plan has flags and entries."""
    h, config = _shrink_by_default(x, layers, plan, rank)
    added, gains = (x.new_empty(len(x), sum(layers.out_features)) for _ in range(2))
    expand(added, gains, h, layers, plan, config, base_bias=None, in_place=False)
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
    _shrink[(_grid(plan, plan.num_entries, MAX_ENTRIES), splits, layers.num_members)](
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
    gains: Tensor,
    h: Tensor,
    layers: LayerTable,
    plan: RoutePlan,
    config: ExpandConfig,
    *,
    base_bias: Tensor | None,
    in_place: bool,
) -> None:
    """The rest of the formula, added to y [T, ΣO] in place, or written to y and gains [T, ΣO] (`Delta`)."""
    grid = _grid(plan, plan.num_tiles, MAX_TILES), triton.cdiv(layers.max_size, config.block_o), layers.num_members
    _expand[grid](
        y,
        gains,
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
        plan.entry_slots,
        plan.weights,
        layers.rows.shape[1],
        y.stride(0),
        h.stride(0),
        h.stride(1),
        IN_PLACE=in_place,
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


@triton.jit
def _product(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# The number of tokens changes from step to step; Triton would compile a variant for 1 and one for multiples of 16.
@triton.jit(do_not_specialize=["num_entries", "parts_stride", "member_stride"])
def _shrink(
    x,
    h,
    parts,
    counters,
    table,
    layers,
    counts,
    tokens,
    entry_tiles,
    entry_slots,
    weights,
    num_slots,
    in_features,
    num_entries,
    x_stride,
    parts_stride,
    member_stride,
    h_stride,
    NUM_FIELDS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    split = tl.program_id(1)
    member = tl.program_id(2)
    num_used = tl.load(counts + 1)
    table += tl.load(layers + member).to(tl.int64) * num_slots * NUM_FIELDS
    h += member.to(tl.int64) * member_stride
    parts += member.to(tl.int64) * member_stride
    own_part = parts + split.to(tl.int64) * parts_stride
    place = tl.arange(0, M)
    length = tl.cdiv(tl.cdiv(in_features, SPLIT_K), BLOCK_K) * BLOCK_K
    start = split * length
    stop = tl.minimum(start + length, in_features)
    for entry in range(tl.program_id(0), num_used, tl.num_programs(0)):
        row = table + tl.load(entry_slots + entry).to(tl.int64) * NUM_FIELDS
        token = tl.load(tokens + tl.load(entry_tiles + entry) * M + place)
        weight = tl.load(weights + entry * M + place)
        rank = tl.load(row + 4).to(tl.int32)
        a = tl.multiple_of(tl.load(row).to(tl.pointer_type(x.dtype.element_ty)), 16)
        is_token = token >= 0
        x_rows = x + tl.where(is_token, token, 0).to(tl.int64) * x_stride
        places = (entry * M + place).to(tl.int64)[:, None] * h_stride
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            acc = tl.zeros([M, BLOCK_R], dtype=tl.float32)
            for k0 in range(start, stop, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                is_feature = k < in_features
                x_part = tl.load(x_rows[:, None] + k[None, :], mask=is_token[:, None] & is_feature[None, :], other=0.0)
                a_places = r.to(tl.int64)[None, :] * in_features + k[:, None]
                a_part = tl.load(a + a_places, mask=(r < rank)[None, :] & is_feature[:, None], other=0.0)
                acc = _product(x_part, a_part, acc, WIDEN)
            acc *= weight[:, None]
            if SPLIT_K == 1:
                tl.store(h + places + r[None, :], acc.to(h.dtype.element_ty), mask=(r < rank)[None, :])
            else:
                tl.store(own_part + places + r[None, :], acc, mask=(r < rank)[None, :])
        if SPLIT_K > 1:
            counter = counters + member * num_entries + entry
            _join_parts(h, parts, parts_stride, counter, places, rank, M, BLOCK_R, SPLIT_K)


@triton.jit
def _join_parts(
    h, parts, parts_stride, counter, places, rank, M: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr
):
    """The last of an entry's programs to come sums what all have written, and leaves the counter as it was."""
    tl.debug_barrier()  # all of this program's threads have written
    num_before = tl.atomic_add(counter, 1)
    if num_before == SPLIT_K - 1:
        tl.store(counter, 0)
        stride = tl.zeros([], dtype=tl.int64) + parts_stride
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            total = tl.zeros([M, BLOCK_R], dtype=tl.float32)
            for split in tl.static_range(SPLIT_K):
                part = parts + split * stride + places + r[None, :]
                total += tl.load(part, mask=(r < rank)[None, :], other=0.0, cache_modifier=".cg")
            tl.store(h + places + r[None, :], total.to(h.dtype.element_ty), mask=(r < rank)[None, :])


@triton.jit
def _expand(
    y,
    gains,
    h,
    base_bias,
    table,
    layers,
    member_starts,
    member_sizes,
    counts,
    flags,
    tokens,
    tile_starts,
    entry_slots,
    weights,
    num_slots,
    y_stride,
    h_member_stride,
    h_stride,
    IN_PLACE: tl.constexpr,
    HAS_BASE_BIAS: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    block = tl.program_id(1)
    member = tl.program_id(2)
    num_tiles = tl.load(counts)
    size = tl.load(member_sizes + member)
    y_start = tl.load(member_starts + member)
    if IS_ALIGNED:
        size = tl.multiple_of(size, 16)
        y_start = tl.multiple_of(y_start, 16)
    if block * BLOCK_O >= size:
        return
    dtype = y.dtype.element_ty
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output = o < size
    place = tl.arange(0, M)
    table += tl.load(layers + member).to(tl.int64) * num_slots * NUM_FIELDS
    h += member.to(tl.int64) * h_member_stride
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        first_entry = tl.load(tile_starts + tile)
        last_entry = tl.load(tile_starts + tile + 1)
        token = tl.load(tokens + tile * M + place)
        acc = tl.zeros([M, BLOCK_O], dtype=tl.float32)
        gain = tl.zeros([M, BLOCK_O], dtype=tl.float32)
        touched = tl.full([], 0, tl.int64)
        gained = tl.full([], 0, tl.int64)
        for entry in range(first_entry, last_entry):
            row = table + tl.load(entry_slots + entry).to(tl.int64) * NUM_FIELDS
            rank = tl.load(row + 4)
            gain_address, bias_address = tl.load(row + 2), tl.load(row + 3)
            b = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(dtype)), 16)
            h_rows = h + (entry * M + place).to(tl.int64) * h_stride
            acc = _entry(acc, h_rows, b, rank.to(tl.int32), size, o, BLOCK_R, WIDEN)
            weight = tl.load(weights + entry * M + place)[:, None]
            gain += weight * _vector(gain_address, o, size, dtype)[None, :]
            acc += weight * _vector(bias_address, o, size, dtype)[None, :]
            touched |= rank | gain_address | bias_address
            gained |= gain_address
        mask = (token >= 0)[:, None] & is_output[None, :]
        places = tl.where(token >= 0, token, 0).to(tl.int64)[:, None] * y_stride + (y_start + o)[None, :]
        if IN_PLACE:
            if touched != 0:
                before = tl.load(y + places, mask=mask, other=0.0).to(tl.float32)
                if gained != 0:  # else a gain of zero would turn infinity into NaN
                    base = before
                    if HAS_BASE_BIAS:
                        base -= tl.load(base_bias + y_start + o, mask=is_output, other=0.0).to(tl.float32)[None, :]
                    acc += gain * base
                tl.store(y + places, (before + acc).to(dtype), mask=mask)
        else:
            tl.store(y + places, acc.to(dtype), mask=mask)
            has_gain = tl.load(flags + tl.where(token >= 0, token, 0)) == 2
            tl.store(gains + places, gain.to(dtype), mask=mask & has_gain[:, None])


@triton.jit
def _entry(acc, h_rows, b, rank, size, o, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr):
    """acc + h·b of one entry."""
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        h_part = tl.load(h_rows[:, None] + r[None, :], mask=(r < rank)[None, :], other=0.0)
        b_places = b + r.to(tl.int64)[:, None] * size + o[None, :]
        b_part = tl.load(b_places, mask=(r < rank)[:, None] & (o < size)[None, :], other=0.0)
        acc = _product(h_part, b_part, acc, WIDEN)
    return acc


@triton.jit
def _vector(address, o, size, dtype: tl.constexpr):
    """What is at an address, in float32; zeros if it is none."""
    mask = o < tl.where(address != 0, size, 0)
    return tl.load(address.to(tl.pointer_type(dtype)) + o, mask=mask, other=0.0).to(tl.float32)
