"""`apply_lora` in two Triton kernels, for all layers that share an input at once.

    shrink   h[e] = w_e · (x[tile of e] · a_eᵀ)                          per entry, member and part of I
    expand   y[tile] += (Σ_e w_e·gain_e)·(y - bias0) + Σ_e (h[e]·b_e + w_e·bias_e)     per tile, member and block of O

A tile belongs to one program for each block of its outputs, so that mixes need no atomics and results do not depend on
the order of execution. Ranks are loop bounds: a token pays for its own adapter's rank. Entries and tiles that are
nobody's end at their first load, and a step without adapters launches nothing. Products take the inputs' dtype (h is
rounded to it once), sums are float32.

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
from lora_core.ops.plan import LARGE_TILE, RoutePlan, bucket_of

__all__ = [
    "RANK_BLOCKS",
    "ExpandConfig",
    "LaunchConfigs",
    "LayerTable",
    "ShrinkConfig",
    "apply_plan",
    "expand",
    "is_interpreted",
    "shrink",
]

# Input features that one program of a split sums over, in decoding; and ranks that one product takes at once.
SPLIT_FEATURES, MAX_SPLITS = 512, 16
RANK_BLOCKS = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Layers whose outputs lie side by side, and where their adapters are found.

    Attributes:
        rows: [L, S, FIELDS] int64, `AdapterTable.rows`.
        layers: [m] int32, the members' numbers in the table.
        starts, sizes: [m] int32, their columns in y.
        out_features: the sizes on the host.
        in_features: I.
        is_aligned: all sizes and I are multiples of 16.
        configs: measured launch parameters (`AdapterTable.configs`).
    """

    rows: Tensor
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

    def launch_configs(self, plan: RoutePlan, rank: int, itemsize: int) -> "LaunchConfigs":
        """The measured parameters of the next such plan, or the default."""
        bucket = bucket_of(plan.num_entries, plan.tile_tokens, rank)
        found: LaunchConfigs | None = self.configs.get((self.in_features, self.out_features, *bucket))
        return found or LaunchConfigs.default(plan, self, rank, itemsize)


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """Launch parameters of the shrink kernel."""

    block_r: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(cls, plan: RoutePlan, in_features: int, rank: int, itemsize: int) -> "ShrinkConfig":
        """For a plan and the highest rank. Small tiles split the input features: there would be few programs."""
        block_k = min(128 if itemsize < 4 else 64, max(16, triton.next_power_of_2(in_features)))
        splits = min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(in_features, SPLIT_FEATURES)))
        if plan.tile_tokens == LARGE_TILE:
            splits = min(splits, 4) if plan.num_entries <= LARGE_TILE else 1
        return cls(_rank_block(rank), block_k, splits, 4, 3 if itemsize < 4 else 2)


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """Launch parameters of the expand kernel."""

    block_r: int
    block_o: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(cls, plan: RoutePlan, max_size: int, rank: int, itemsize: int) -> "ExpandConfig":
        """Large tiles have the sums of outputs and gains in the registers of eight warps, and h's splits take room."""
        is_large, is_wide = plan.tile_tokens == LARGE_TILE, itemsize >= 4
        block_o = min(64 if is_large and (is_wide or rank > 32) else 128, max(16, triton.next_power_of_2(max_size)))
        return cls(_rank_block(rank), block_o, 8 if is_large else 4, 2 if is_large or is_wide else 3)


@dataclass(frozen=True, slots=True)
class LaunchConfigs:
    """Of both kernels: they share the number of splits."""

    shrink: ShrinkConfig
    expand: ExpandConfig

    @classmethod
    def default(cls, plan: RoutePlan, layers: LayerTable, rank: int, itemsize: int) -> "LaunchConfigs":
        return cls(
            ShrinkConfig.default(plan, layers.in_features, rank, itemsize),
            ExpandConfig.default(plan, layers.max_size, rank, itemsize),
        )


def _rank_block(rank: int) -> int:
    return next((block for block in RANK_BLOCKS if block >= rank), RANK_BLOCKS[-1])


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
    rank = -(-rank // 16) * 16
    configs = layers.launch_configs(plan, rank, x.element_size())
    h = shrink(x if x.stride(-1) == 1 else x.contiguous(), layers, plan, rank, configs.shrink)
    expand(y, h, layers, plan, base_bias, configs.expand)


def shrink(x: Tensor, layers: LayerTable, plan: RoutePlan, rank: int, config: ShrinkConfig) -> Tensor:
    """h [splits, m, E·M, rank] in float32; only the columns below an entry's rank are written."""
    shape = (config.split_k, layers.num_members, plan.num_entries * plan.tile_tokens, rank)
    h = torch.empty(shape, dtype=torch.float32, device=x.device)
    _shrink[(plan.num_entries, config.split_k, layers.num_members)](
        x,
        h,
        layers.rows,
        layers.layers,
        plan.tokens,
        plan.entry_tiles,
        plan.entry_slots,
        plan.weights,
        layers.rows.shape[1],
        layers.in_features,
        x.stride(0),
        h.stride(0),
        h.stride(1),
        rank,
        NUM_FIELDS=FIELDS,
        M=plan.tile_tokens,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        WIDEN=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return h


def expand(
    y: Tensor, h: Tensor, layers: LayerTable, plan: RoutePlan, base_bias: Tensor | None, config: ExpandConfig
) -> None:
    """y [T, ΣO] += the rest of the formula."""
    _expand[(plan.num_tiles, triton.cdiv(layers.max_size, config.block_o), layers.num_members)](
        y,
        h,
        y if base_bias is None else base_bias,
        layers.rows,
        layers.layers,
        layers.starts,
        layers.sizes,
        plan.tokens,
        plan.starts,
        plan.entry_slots,
        plan.weights,
        layers.rows.shape[1],
        y.stride(0),
        h.stride(0),
        h.stride(1),
        h.shape[-1],
        HAS_BASE_BIAS=base_bias is not None,
        NUM_FIELDS=FIELDS,
        M=plan.tile_tokens,
        BLOCK_R=config.block_r,
        BLOCK_O=config.block_o,
        SPLIT_K=h.shape[0],
        IS_ALIGNED=layers.is_aligned,
        WIDEN=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton.jit
def _product(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _shrink(
    x,
    h,
    table,
    layers,
    tokens,
    entry_tiles,
    entry_slots,
    weights,
    num_slots,
    in_features,
    x_stride,
    h_split_stride,
    h_member_stride,
    h_stride,
    NUM_FIELDS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    entry = tl.program_id(0)
    split = tl.program_id(1)
    member = tl.program_id(2)
    slot = tl.load(entry_slots + entry)
    if slot < 0:
        return
    row = table + (tl.load(layers + member).to(tl.int64) * num_slots + slot) * NUM_FIELDS
    rank = tl.load(row + 4).to(tl.int32)
    if rank == 0:
        return
    a = tl.multiple_of(tl.load(row).to(tl.pointer_type(x.dtype.element_ty)), 16)
    place = tl.arange(0, M)
    token = tl.load(tokens + tl.load(entry_tiles + entry) * M + place)
    is_token = token >= 0
    weight = tl.load(weights + entry * M + place)
    x_rows = x + tl.where(is_token, token, 0).to(tl.int64) * x_stride
    length = tl.cdiv(tl.cdiv(in_features, SPLIT_K), BLOCK_K) * BLOCK_K
    start = split * length
    stop = tl.minimum(start + length, in_features)
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
        out = h + split.to(tl.int64) * h_split_stride + member.to(tl.int64) * h_member_stride
        out += (entry * M + place).to(tl.int64)[:, None] * h_stride + r[None, :]
        tl.store(out, acc * weight[:, None], mask=(r < rank)[None, :])


@triton.jit
def _expand(
    y,
    h,
    base_bias,
    table,
    layers,
    member_starts,
    member_sizes,
    tokens,
    tile_starts,
    entry_slots,
    weights,
    num_slots,
    y_stride,
    h_split_stride,
    h_member_stride,
    h_stride,
    HAS_BASE_BIAS: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SPLIT_K: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.program_id(1)
    member = tl.program_id(2)
    first_entry = tl.load(tile_starts + tile)
    last_entry = tl.load(tile_starts + tile + 1)
    if first_entry == last_entry:
        return
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
    split_stride = tl.zeros([], dtype=tl.int64) + h_split_stride  # the last of 16 splits may lie beyond 2^31
    h += member.to(tl.int64) * h_member_stride
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
        acc = _entry(acc, h_rows, b, rank.to(tl.int32), size, o, split_stride, M, BLOCK_R, SPLIT_K, WIDEN)
        weight = tl.load(weights + entry * M + place)[:, None]
        gain += weight * _vector(gain_address, o, size, dtype)[None, :]
        acc += weight * _vector(bias_address, o, size, dtype)[None, :]
        touched |= rank | gain_address | bias_address
        gained |= gain_address
    if touched == 0:
        return
    token = tl.load(tokens + tile * M + place)
    mask = (token >= 0)[:, None] & is_output[None, :]
    y_places = y + tl.where(token >= 0, token, 0).to(tl.int64)[:, None] * y_stride + (y_start + o)[None, :]
    before = tl.load(y_places, mask=mask, other=0.0).to(tl.float32)
    if gained != 0:  # else a gain of zero would turn infinity into NaN
        base = before
        if HAS_BASE_BIAS:
            base -= tl.load(base_bias + y_start + o, mask=is_output, other=0.0).to(tl.float32)[None, :]
        acc += gain * base
    tl.store(y_places, (before + acc).to(dtype), mask=mask)


@triton.jit
def _entry(
    acc,
    h_rows,
    b,
    rank,
    size,
    o,
    split_stride,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """acc + h·b of one entry, h summed over the splits."""
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        h_part = tl.zeros([M, BLOCK_R], dtype=tl.float32)
        for split in tl.static_range(SPLIT_K):
            places = h_rows[:, None] + split * split_stride + r[None, :]
            h_part += tl.load(places, mask=(r < rank)[None, :], other=0.0)
        b_places = b + r.to(tl.int64)[:, None] * size + o[None, :]
        b_part = tl.load(b_places, mask=(r < rank)[:, None] & (o < size)[None, :], other=0.0)
        acc = _product(h_part.to(b.dtype.element_ty), b_part, acc, WIDEN)
    return acc


@triton.jit
def _vector(address, o, size, dtype: tl.constexpr):
    """What is at an address, in float32; zeros if it is none."""
    mask = o < tl.where(address != 0, size, 0)
    return tl.load(address.to(tl.pointer_type(dtype)) + o, mask=mask, other=0.0).to(tl.float32)
