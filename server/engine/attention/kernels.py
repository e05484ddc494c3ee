"""Attention over the block-wise cache in three Triton kernels: store new keys and values, attend, join split sums.

    tile       at most Q new tokens of one sequence, one after the other; Q is 1 for sequences that decode
    program    a tile's queries of the G heads that share a key head, and one of `splits` parts of its keys

Scores and sums are float32; softmax is computed as the keys go by (Dao et al. 2022, "FlashAttention"). With few
sequences the keys are split over several programs, whose sums the last kernel joins.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.ops.triton import is_interpreted
from lora_core.ops.tuning import num_buffers
from server.engine.attention.interface import AttentionCall

__all__ = ["AttendConfig", "Tiles", "attend", "num_rows", "store"]

BLOCK_KEYS = 128
# Shared memory for a program's queries, keys and values, of which the smallest GPUs have 99 KiB; for the latter alone.
SHARED_BYTES, STAGES_BYTES = 96 << 10, 64 << 10
# Sums that four warps hold in registers beside the rest.
WARP_SUMS = 64 * 128


@dataclass(frozen=True, slots=True)
class AttendConfig:
    """Launch parameters of the attention kernel."""

    block_keys: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(
        cls, itemsize: int, num_rows: int, dim: int, value_dim: int, *, is_split: bool = False
    ) -> "AttendConfig":
        """As many keys as there is room for beside the queries: 128 of 128 features for 16 rows in half precision.

        Args:
            num_rows: queries of a program, `num_rows`; many with many features need the registers of more warps.
            is_split: several programs share a tile's keys.
        """
        num_stages = 2
        if itemsize >= 4:  # multiplied number by number, from registers
            if _block(dim) > 128:  # ... of more warps; and one stage, for the queries take the room
                return cls(16, 4 if num_rows <= 16 else 16, 1)
            return cls(16, 4 if num_rows <= 16 else 8, num_stages)
        row_bytes = itemsize * (_block(dim) + _block(value_dim)) * num_buffers(num_stages, num_rows)
        room = min(STAGES_BYTES, SHARED_BYTES - itemsize * num_rows * _block(dim))
        num_keys = 1 << max(4, (room // row_bytes).bit_length() - 1)
        num_keys = min(num_keys, BLOCK_KEYS // 2 if is_split or num_rows > 64 else BLOCK_KEYS)
        return cls(num_keys, 4 if num_rows * _block(value_dim) <= WARP_SUMS else 8, num_stages)

    def shared_bytes(self, itemsize: int, num_rows: int, dim: int, value_dim: int) -> int:
        """At most so much shared memory takes a program: queries, keys and values, scores as the values' dtype has
        them, and what the warps tell each other of rows."""
        rows = num_rows * (_block(dim) * itemsize + self.block_keys * itemsize + 4 * self.num_warps)
        keys = self.block_keys * (_block(dim) + _block(value_dim)) * itemsize
        return rows + num_buffers(self.num_stages, num_rows) * keys


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries of one kind.

    Attributes:
        fields: [N, 4] int32: where the sequence's blocks begin in `blocks`, the first query's place among the step's
            tokens, the number of queries, and the first one's position in the sequence, -1 for a tile of nobody.
        blocks: [...] int32, block tables one after the other.
        num_queries: Q, a power of two.
        num_splits: parts that a tile's keys are split into.
        configs: measured launch parameters, by (Q, heads of a group, D, Dv).
    """

    fields: Tensor
    blocks: Tensor
    num_queries: int
    num_splits: int
    configs: Mapping[Hashable, AttendConfig] = field(default_factory=dict)


def store(keys: Tensor, values: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
    """Write new tokens into the cache.

    Args:
        keys, values: [Hkv, blocks, block_size, D or Dv].
        positions: [T] int64, block · block_size + offset; -1 is not written.
        key, value: [T, Hkv, D or Dv], contiguous along D.
    """
    num_tokens, num_heads, dim = key.shape
    _store[(num_tokens, num_heads)](
        keys,
        values,
        positions,
        key,
        value,
        keys.stride(0),
        values.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        DIM=dim,
        VALUE_DIM=value.shape[-1],
        BLOCK_DIM=triton.next_power_of_2(max(dim, value.shape[-1])),
    )


def attend(call: AttentionCall, query: Tensor, keys: Tensor, values: Tensor, tiles: Tiles, out: Tensor) -> None:
    """Attention of the tiles' queries over the cache, which holds their own keys already.

    Args:
        query: [T, H, D], contiguous along D.
        keys, values: [Hkv, blocks, block_size, D or Dv].
        out: [T, H, Dv], contiguous; written for the tiles' tokens.
    """
    num_tiles, num_kv_heads, dim, value_dim = len(tiles.fields), keys.shape[0], query.shape[-1], values.shape[-1]
    group_size = query.shape[1] // num_kv_heads
    group_block = triton.next_power_of_2(group_size)
    key = tiles.num_queries, group_size, dim, value_dim
    splits = tiles.num_splits
    config = tiles.configs.get(key) or AttendConfig.default(
        out.element_size(), num_rows(tiles.num_queries, group_size), dim, value_dim, is_split=splits > 1
    )
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
        sums = torch.empty(splits, 2, *out.shape[:2], dtype=torch.float32, device=out.device)
    _attend[(num_tiles, num_kv_heads, splits)](
        query,
        keys,
        values,
        parts,
        sums,
        tiles.fields,
        tiles.blocks,
        query if call.sinks is None else call.sinks,
        call.scaling,
        call.softcap or 0.0,
        call.window or 0,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        values.stride(0),
        out.shape[0],
        out.shape[1],
        group_size,
        BLOCK_SIZE=keys.shape[2],
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_DIM=_block(dim),
        BLOCK_VALUE_DIM=_block(value_dim),
        GROUP=group_block,
        ROWS=num_rows(tiles.num_queries, group_size),
        BLOCK_KEYS=config.block_keys,
        SPLITS=splits,
        HAS_WINDOW=call.window is not None,
        HAS_SOFTCAP=call.softcap is not None,
        HAS_SINKS=call.sinks is not None,
        WIDEN=is_interpreted(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        _launch_join(parts, sums, tiles, out)


def num_rows(num_queries: int, group_size: int) -> int:
    """Queries of a program, those of all heads of a group: no fewer than a tensor core takes."""
    return max(16, num_queries * triton.next_power_of_2(group_size))


def _block(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _launch_join(parts: Tensor, sums: Tensor, tiles: Tiles, out: Tensor) -> None:
    """parts [splits, T, H, Dv] and sums [splits, 2, T, H] give out [T, H, Dv]."""
    _join[(len(tiles.fields), out.shape[1])](
        parts,
        sums,
        tiles.fields,
        out,
        out.shape[0],
        out.shape[1],
        VALUE_DIM=out.shape[2],
        BLOCK_VALUE_DIM=triton.next_power_of_2(out.shape[2]),
        SPLITS=tiles.num_splits,
        num_warps=1,
    )


@triton.jit
def _store(
    keys,
    values,
    positions,
    key,
    value,
    keys_stride,
    values_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + token)
    if position < 0:
        return
    d = tl.arange(0, BLOCK_DIM)
    own_key = tl.load(key + token * key_stride + head * key_head_stride + d, mask=d < DIM)
    tl.store(keys + head * keys_stride + position * DIM + d, own_key, mask=d < DIM)
    own_value = tl.load(value + token * value_stride + head * value_head_stride + d, mask=d < VALUE_DIM)
    tl.store(values + head * values_stride + position * VALUE_DIM + d, own_value, mask=d < VALUE_DIM)


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# The number of tokens changes from step to step; Triton would compile a variant for 1 and one for multiples of 16.
@triton.jit(do_not_specialize=["num_tokens"])
def _attend(
    query,
    keys,
    values,
    out,
    sums,
    fields,
    blocks,
    sinks,
    scaling,
    softcap,
    window,
    query_stride,
    query_head_stride,
    keys_stride,
    values_stride,
    num_tokens,
    num_heads,
    group_size,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    table = blocks + tl.load(fields + 4 * tile)
    count, position0 = tl.load(fields + 4 * tile + 2), tl.load(fields + 4 * tile + 3)
    row = tl.arange(0, ROWS)
    is_row = (row // GROUP < count) & (row % GROUP < group_size)
    head = kv_head * group_size + row % GROUP
    token = (tl.load(fields + 4 * tile + 1) + row // GROUP).to(tl.int64)
    position = position0 + row // GROUP
    d = tl.arange(0, BLOCK_DIM)
    q_places = token[:, None] * query_stride + head[:, None] * query_head_stride + d[None, :]
    q = tl.load(query + q_places, mask=is_row[:, None] & (d < DIM)[None, :], other=0.0)
    acc = tl.zeros([ROWS, BLOCK_VALUE_DIM], dtype=tl.float32)
    peak = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if HAS_SINKS:  # noqa: SIM102 - decided by the compiler. As if a key without a value came first
        if split == 0:
            peak = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32)
            total += 1.0
    stop = position0 + count
    first = tl.maximum(position0 - window + 1, 0) if HAS_WINDOW else 0
    length = tl.cdiv(tl.cdiv(stop - first, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    first += split * length
    stop = tl.minimum(first + length, stop)
    keys += kv_head * keys_stride
    values += kv_head * values_stride
    dv = tl.arange(0, BLOCK_VALUE_DIM)
    for n0 in range(first, stop, BLOCK_KEYS):
        n = n0 + tl.arange(0, BLOCK_KEYS)
        block = tl.load(table + n // BLOCK_SIZE, mask=n < stop, other=0).to(tl.int64)
        place = block * BLOCK_SIZE + n % BLOCK_SIZE
        k_mask = (n < stop)[None, :] & (d < DIM)[:, None]
        k = tl.load(keys + place[None, :] * DIM + d[:, None], mask=k_mask, other=0.0)
        scores = _dot(q, k, tl.zeros([ROWS, BLOCK_KEYS], dtype=tl.float32), WIDEN) * scaling
        if HAS_SOFTCAP:  # tanh(x) = 2 / (1 + exp(-2x)) - 1
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
        visible = (n < stop)[None, :] & (n[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (n[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # no key yet
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(peak - shift)
        v_mask = (n < stop)[:, None] & (dv < VALUE_DIM)[None, :]
        v = tl.load(values + place[:, None] * VALUE_DIM + dv[None, :], mask=v_mask, other=0.0)
        acc = _dot(weights.to(v.dtype), v, acc * decay[:, None], WIDEN)
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
    mask = is_row[:, None] & (dv < VALUE_DIM)[None, :]
    places = (token * num_heads + head)[:, None] * VALUE_DIM + dv[None, :]
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + places, acc.to(out.dtype.element_ty), mask=mask)
    else:
        part = split.to(tl.int64) * num_tokens * num_heads
        tl.store(out + part * VALUE_DIM + places, acc, mask=mask)
        own = sums + 2 * part + token * num_heads + head
        tl.store(own, peak, mask=is_row)
        tl.store(own + num_tokens * num_heads, total, mask=is_row)


@triton.jit(do_not_specialize=["num_tokens"])
def _join(
    parts,
    sums,
    fields,
    out,
    num_tokens,
    num_heads,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Σ e^(peak_s - peak)·part_s / Σ e^(peak_s - peak)·total_s of a tile's one query; 0 if it has seen no key."""
    token = tl.load(fields + 4 * tl.program_id(0) + 1).to(tl.int64)
    place = token * num_heads + tl.program_id(1)
    size = (tl.zeros([], dtype=tl.int64) + num_tokens) * num_heads
    split = tl.arange(0, SPLITS)
    dv = tl.arange(0, BLOCK_VALUE_DIM)
    peaks = tl.load(sums + 2 * split * size + place)
    peak = tl.max(peaks, 0)
    scale = tl.exp(peaks - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(scale * tl.load(sums + 2 * split * size + size + place), 0)
    part_places = (split * size + place)[:, None] * VALUE_DIM + dv[None, :]
    found = tl.load(parts + part_places, mask=(dv < VALUE_DIM)[None, :], other=0.0)
    result = tl.sum(found * scale[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + place * VALUE_DIM + dv, result.to(out.dtype.element_ty), mask=dv < VALUE_DIM)
