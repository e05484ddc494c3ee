"""The kernels of `lora_core.ops.triton`, which says what they compute.

Memory's answers, one after the other, are most of a program's time in decoding: what it will need is asked for as early
as it can be, before it is known whether it is needed.
"""

import triton
import triton.language as tl

__all__ = ["expand_kernel", "shrink_kernel"]


@triton.jit
def _product(a, b, acc, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# Numbers that change from step to step: Triton would compile a variant for 1 and one for multiples of 16.
@triton.jit(do_not_specialize=["num_entries", "parts_stride", "member_stride"])
def shrink_kernel(
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
    """Programs: entries, splits, members."""
    entry = tl.program_id(0)
    slot, tile = tl.load(entry_slots + entry), tl.load(entry_tiles + entry)
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
    while entry < num_used:
        row = table + slot.to(tl.int64) * NUM_FIELDS
        token = tl.load(tokens + tile * M + place)
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
        entry += tl.num_programs(0)
        slot = tl.load(entry_slots + tl.minimum(entry, num_entries - 1))
        tile = tl.load(entry_tiles + tl.minimum(entry, num_entries - 1))


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
def expand_kernel(
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
    tile_slots,
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
    """Programs: tiles, blocks of outputs, members."""
    tile = tl.program_id(0)
    first_entry, last_entry = tl.load(tile_starts + tile), tl.load(tile_starts + tile + 1)
    slot = tl.load(tile_slots + tile)
    place = tl.arange(0, M)
    token = tl.load(tokens + tile * M + place)
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
    table += tl.load(layers + member).to(tl.int64) * num_slots * NUM_FIELDS
    h += member.to(tl.int64) * h_member_stride
    while tile < num_tiles:
        acc = tl.zeros([M, BLOCK_O], dtype=tl.float32)
        touched = tl.full([], 0, tl.int64)
        gained = tl.full([], 0, tl.int64)
        for entry in range(first_entry, last_entry):
            row = table + slot.to(tl.int64) * NUM_FIELDS
            slot = tl.load(entry_slots + tl.minimum(entry + 1, last_entry - 1))
            rank = tl.load(row + 4)
            gain_address, bias_address = tl.load(row + 2), tl.load(row + 3)
            b = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(dtype)), 16)
            h_rows = h + (entry * M + place).to(tl.int64) * h_stride
            acc = _expand_entry(acc, h_rows, b, rank.to(tl.int32), size, o, BLOCK_R, WIDEN)
            if bias_address != 0:
                weight = tl.load(weights + entry * M + place)[:, None]
                acc += weight * _vector(bias_address, o, size, dtype)[None, :]
            touched |= rank | gain_address | bias_address
            gained |= gain_address
        mask = (token >= 0)[:, None] & is_output[None, :]
        token = tl.where(token >= 0, token, 0)
        places = token.to(tl.int64)[:, None] * y_stride + (y_start + o)[None, :]
        if IN_PLACE:
            if touched != 0:
                before = tl.load(y + places, mask=mask, other=0.0).to(tl.float32)
                if gained != 0:  # else a gain of zero would turn infinity into NaN
                    base = before
                    if HAS_BASE_BIAS:
                        base -= tl.load(base_bias + y_start + o, mask=is_output, other=0.0).to(tl.float32)[None, :]
                    own = _gains(table, entry_slots, weights, first_entry, last_entry, o, size, dtype, NUM_FIELDS, M)
                    acc += own * base
                tl.store(y + places, (before + acc).to(dtype), mask=mask)
        else:
            tl.store(y + places, acc.to(dtype), mask=mask)
            if tl.max(tl.load(flags + token), 0) == 2:
                own = _gains(table, entry_slots, weights, first_entry, last_entry, o, size, dtype, NUM_FIELDS, M)
                tl.store(gains + places, own.to(dtype), mask=mask)
        tile += tl.num_programs(0)
        known = tl.minimum(tile, num_tiles - 1)
        first_entry, last_entry = tl.load(tile_starts + known), tl.load(tile_starts + known + 1)
        slot = tl.load(tile_slots + known)
        token = tl.load(tokens + known * M + place)


@triton.jit
def _expand_entry(acc, h_rows, b, rank, size, o, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr):
    """acc + h·b of one entry."""
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        h_part = tl.load(h_rows[:, None] + r[None, :], mask=(r < rank)[None, :], other=0.0)
        b_places = b + r.to(tl.int64)[:, None] * size + o[None, :]
        b_part = tl.load(b_places, mask=(r < rank)[:, None] & (o < size)[None, :], other=0.0)
        acc = _product(h_part, b_part, acc, WIDEN)
    return acc


@triton.jit
def _gains(
    table,
    entry_slots,
    weights,
    first_entry,
    last_entry,
    o,
    size,
    dtype: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    M: tl.constexpr,
):
    """Σ w·gain of a tile's entries [M, outputs]."""
    gain = tl.zeros([M, o.shape[0]], dtype=tl.float32)
    for entry in range(first_entry, last_entry):
        address = tl.load(table + tl.load(entry_slots + entry).to(tl.int64) * NUM_FIELDS + 2)
        weight = tl.load(weights + entry * M + tl.arange(0, M))[:, None]
        gain += weight * _vector(address, o, size, dtype)[None, :]
    return gain


@triton.jit
def _vector(address, o, size, dtype: tl.constexpr):
    """What is at an address, in float32; zeros if it is none."""
    mask = o < tl.where(address != 0, size, 0)
    return tl.load(address.to(tl.pointer_type(dtype)) + o, mask=mask, other=0.0).to(tl.float32)
