"""What lies between a decoder layer's products, in three Triton kernels: each reads a product's output once.

    rotate     queries and keys, norms of their heads applied, turned; keys and values written into the cache
    gate       silu(gate)·up
    add_norm   hidden += y; norm(hidden)

Where adapters have left what they add beside an output (`lora_core.ops.triton.Delta`), it is added as the output is
read, rounded as if it had been added in place. Products and sums are not fused, so that a row without an adapter has
the same bits in both variants of a kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.ops.triton import Delta
from server.engine.norm import RmsNorm

__all__ = ["add_norm", "gate", "rotate"]

HEADS = 8
GATE_COLUMNS = 1_024


def rotate(
    heads: Tensor,
    delta: Delta | None,
    bias: Tensor | None,
    norms: tuple[RmsNorm, RmsNorm] | None,
    embeddings: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
) -> Tensor:
    """Queries, turned by their rotary positions (Su et al. 2021, in Llama's order of halves): [T, H, D].

    Args:
        heads: [T, (H + 2·Hkv)·D], queries, keys and values as products give them.
        bias: of that product, [ΣO] or None.
        norms: of each head of queries and of keys, or None.
        embeddings: cos and sin, [1, T, D].
        keys, values: [Hkv, blocks, block_size, D]; written.
        positions: [T] int64, block · block_size + offset; -1 is not written.
    """
    num_tokens, num_kv_heads, dim = len(heads), keys.shape[0], keys.shape[-1]
    num_heads = heads.shape[1] // dim - 2 * num_kv_heads
    query = heads.new_empty(num_tokens, num_heads, dim)
    cos, sin = (part[0] for part in embeddings)
    weights = (heads, heads) if norms is None else (norms[0].weight, norms[1].weight)
    epsilons = (0.0, 0.0) if norms is None else (norms[0].eps, norms[1].eps)
    _rotate[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS))](
        heads,
        *_arguments(heads, delta, bias),
        *weights,
        cos,
        sin,
        positions,
        query,
        keys,
        values,
        *epsilons,
        heads.stride(0),
        cos.stride(0),
        keys.stride(0),
        values.stride(0),
        num_heads,
        num_kv_heads,
        HAS_DELTA=delta is not None,
        HAS_BIAS=bias is not None,
        HAS_NORMS=norms is not None,
        DIM=dim,
        BLOCK_HALF=triton.next_power_of_2(dim // 2),
        HEADS=HEADS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return query


def gate(both: Tensor, delta: Delta | None, bias: Tensor | None) -> Tensor:
    """silu(gate)·up, [T, F], of both side by side [T, 2·F]; bias [2·F] or None."""
    num_tokens, size = len(both), both.shape[1] // 2
    out = both.new_empty(num_tokens, size)
    block = min(GATE_COLUMNS, triton.next_power_of_2(size))
    _gate[(num_tokens, triton.cdiv(size, block))](
        both,
        *_arguments(both, delta, bias),
        out,
        both.stride(0),
        size,
        HAS_DELTA=delta is not None,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def add_norm(
    hidden: Tensor, y: Tensor, delta: Delta | None, bias: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """hidden [T, D] += y [T, D], in place; returns that / sqrt(mean(that²) + eps)·weight [D], or itself without one."""
    size = hidden.shape[1]
    out = hidden if weight is None else torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    _add_norm[(len(hidden),)](
        hidden,
        y,
        *_arguments(y, delta, bias),
        hidden if weight is None else weight,
        out,
        y.stride(0),
        size,
        eps,
        HAS_DELTA=delta is not None,
        HAS_BIAS=bias is not None,
        HAS_NORM=weight is not None,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
        enable_fp_fusion=False,
    )
    return out


def _arguments(y: Tensor, delta: Delta | None, bias: Tensor | None) -> tuple[Any, ...]:
    own = (y, y, y) if delta is None else (delta.flags, delta.added, delta.gains)
    return (*own, y if bias is None else bias)


@triton.jit
def _whole(
    y, flags, added, gains, bias, token, columns, mask, y_stride, HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """A token's outputs with its adapters' part, in float32, rounded to y's dtype."""
    places = token * y_stride + columns
    value = tl.load(y + places, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        flag = tl.load(flags + token)
        is_gained = mask & (columns < tl.where(flag == 2, y_stride, 0))
        more = tl.load(added + places, mask=mask, other=0.0).to(tl.float32)
        more = tl.where(flag != 0, more, 0.0)  # else it is anything; asked for before the flag is known
        gain = tl.load(gains + places, mask=is_gained, other=0.0).to(tl.float32)
        base = value
        if HAS_BIAS:
            base -= tl.load(bias + columns, mask=is_gained, other=0.0).to(tl.float32)
        more += tl.where(flag == 2, gain * base, 0.0)
        value = (value + more).to(y.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _rotate(
    heads,
    flags,
    added,
    gains,
    bias,
    query_weights,
    key_weights,
    cos,
    sin,
    positions,
    query,
    keys,
    values,
    query_eps,
    key_eps,
    heads_stride,
    angles_stride,
    keys_stride,
    values_stride,
    num_heads,
    num_kv_heads,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, BLOCK_HALF)[None, :]
    is_half = d < DIM // 2
    mask = is_half & (head < num_heads + 2 * num_kv_heads)
    columns = head * DIM + d
    first = _whole(heads, flags, added, gains, bias, token, columns, mask, heads_stride, HAS_DELTA, HAS_BIAS)
    columns += DIM // 2
    second = _whole(heads, flags, added, gains, bias, token, columns, mask, heads_stride, HAS_DELTA, HAS_BIAS)
    dtype = query.dtype.element_ty
    is_query = mask & (head < num_heads)
    normed_first, normed_second = first, second  # of values it is not stored
    if HAS_NORMS:
        squares = tl.sum(first * first + second * second, 1)[:, None] / DIM
        scale = 1.0 / tl.sqrt(squares + tl.where(head < num_heads, query_eps, key_eps))
        weights = tl.load(query_weights + d, mask=is_half, other=0.0).to(tl.float32)
        other = tl.load(key_weights + d, mask=is_half, other=0.0).to(tl.float32)
        normed_first = (first * scale * tl.where(head < num_heads, weights, other)).to(dtype).to(tl.float32)
        weights = tl.load(query_weights + d + DIM // 2, mask=is_half, other=0.0).to(tl.float32)
        other = tl.load(key_weights + d + DIM // 2, mask=is_half, other=0.0).to(tl.float32)
        normed_second = (second * scale * tl.where(head < num_heads, weights, other)).to(dtype).to(tl.float32)
    angles = token * angles_stride + d
    first_cos = tl.load(cos + angles, mask=is_half, other=0.0).to(tl.float32)
    first_sin = tl.load(sin + angles, mask=is_half, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + angles + DIM // 2, mask=is_half, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + angles + DIM // 2, mask=is_half, other=0.0).to(tl.float32)
    first_turned = (normed_first * first_cos - normed_second * first_sin).to(dtype)
    second_turned = (normed_second * second_cos + normed_first * second_sin).to(dtype)
    out = query + (token * num_heads + head) * DIM + d
    tl.store(out, first_turned, mask=is_query)
    tl.store(out + DIM // 2, second_turned, mask=is_query)
    position = tl.load(positions + token)
    kv_head = (head - num_heads).to(tl.int64)
    mask = mask & (head < tl.where(position >= 0, num_heads + 2 * num_kv_heads, 0))
    is_key = mask & (kv_head >= 0) & (kv_head < num_kv_heads)
    out = keys + kv_head * keys_stride + position * DIM + d
    tl.store(out, first_turned, mask=is_key)
    tl.store(out + DIM // 2, second_turned, mask=is_key)
    is_value = mask & (kv_head >= num_kv_heads)
    out = values + (kv_head - num_kv_heads) * values_stride + position * DIM + d
    tl.store(out, first.to(dtype), mask=is_value)
    tl.store(out + DIM // 2, second.to(dtype), mask=is_value)


@triton.jit
def _gate(
    both,
    flags,
    added,
    gains,
    bias,
    out,
    both_stride,
    size,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    own = _whole(both, flags, added, gains, bias, token, column, mask, both_stride, HAS_DELTA, HAS_BIAS)
    up = _whole(both, flags, added, gains, bias, token, size + column, mask, both_stride, HAS_DELTA, HAS_BIAS)
    result = own / (1.0 + tl.exp(-own)) * up
    tl.store(out + token * size + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm(
    hidden,
    y,
    flags,
    added,
    gains,
    bias,
    weight,
    out,
    y_stride,
    size,
    eps,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    more = _whole(y, flags, added, gains, bias, token, column, mask, y_stride, HAS_DELTA, HAS_BIAS)
    places = token * size + column
    total = tl.load(hidden + places, mask=mask, other=0.0).to(tl.float32) + more
    rounded = total.to(hidden.dtype.element_ty)
    tl.store(hidden + places, rounded, mask=mask)
    if HAS_NORM:
        total = rounded.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / size + eps)
        weights = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + places, (total * scale * weights).to(out.dtype.element_ty), mask=mask)
