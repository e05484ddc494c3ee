"""Products of few rows with a weight in 4 bits, in one Triton kernel: decoding reads each weight once, as it is stored.

    y[t, o] = Σ_u absmax[o, u] · Σ_{i in unit u} T[code[o, i]] · x[t, i] + bias[o]

The weight is packed as bitsandbytes does it (QLoRA, Dettmers et al. 2023): codes of NF4 or FP4, two a byte, the first
in the high half, row after row; a scale for each unit of 64 codes of a row, which multiplies their sum in float32. T is
rounded to the inputs' dtype, as the products take it; bitsandbytes rounds T·absmax.

On a GPU the codes go from memory to shared memory to the registers from which tensor cores take them. On the way each
byte is looked up in a table of the 256 pairs of numbers, of which every lane of a warp has a copy in its own bank of
shared memory (32 KiB): 64 codes a clock and multiprocessor, where one table for all would have lanes wait for each
other. Four bytes in a register become two numbers of each of two products, so that these see features in an order of
their own: 8g + r of the first is at the place of 8g + 4 + r of the second (r < 4). Warps have units of their own, which
are summed at the end. The order of summation is the launch parameters', not the inputs': a row's result depends neither
on the other rows nor, with the same parameters, on their number.

Triton comes with PyTorch for CUDA; this module is imported only where kernels are used.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.ops.triton import is_interpreted

__all__ = ["DTYPES", "MAX_ROWS", "ROW_BLOCKS", "FourBitConfig", "can_multiply", "four_bit_product", "pair_table"]

# Above, reading the weight is not what takes the time: dequantizing it and a product in floating point are faster.
MAX_ROWS = 64
UNIT = 64  # codes
# What the programs' units always divide; other inputs would do, but were not run on a GPU.
WHOLE_INPUTS = 8 * UNIT
TABLE_BYTES = 32 << 10
ROW_BLOCKS = (8, 16, 32)
DTYPES = (torch.bfloat16, torch.float16)
# Weights with so many outputs fill a GPU with blocks of 64 of them.
MANY_OUTPUTS = 6_144


@dataclass(frozen=True, slots=True)
class FourBitConfig:
    """Launch parameters.

    Attributes:
        block_t, block_o: rows and outputs of one program.
        units: of each row of the weight that a program takes at once; each warp needs one of its own.
    """

    block_t: int
    block_o: int
    units: int
    num_warps: int
    num_stages: int

    @classmethod
    def default(cls, num_rows: int, num_outputs: int, itemsize: int = 2) -> "FourBitConfig":
        """What was fastest on an H200, for weights with many outputs and with few.

        Triton does not count the table, and asks for more than 48 KiB of shared memory only where it counts as much:
        it must count at most 16 KiB, or more than 48.
        """
        if itemsize > 2:
            return cls(8, 32, 4, 4, 1)
        block_t = next((block for block in ROW_BLOCKS if block >= num_rows), ROW_BLOCKS[-1])
        if num_outputs >= MANY_OUTPUTS:
            return cls(block_t, 64, 4, 4, {8: 5, 16: 4, 32: 3}[block_t])
        return {8: cls(8, 32, 8, 4, 4), 16: cls(16, 32, 8, 4, 3), 32: cls(32, 32, 4, 4, 4)}[block_t]


def can_multiply(x: Tensor, num_inputs: int, blocksize: int) -> bool:
    """The kernel can take these inputs [..., I], and is the fastest that there is: in float32 bitsandbytes' own is.

    Args:
        num_inputs: I of the weight.
        blocksize: codes that share a scale.
    """
    num_rows = x.numel() // max(1, x.shape[-1])
    is_whole = blocksize == UNIT and num_inputs % WHOLE_INPUTS == 0
    return is_whole and x.shape[-1] == num_inputs and 0 < num_rows <= MAX_ROWS and x.dtype in DTYPES


def pair_table(code: Tensor, dtype: torch.dtype) -> Tensor:
    """What a byte stands for: [256, 2], the numbers of its high half and of its low half.

    Args:
        code: [16], `QuantState.code`.
        dtype: of the inputs.
    """
    numbers = code.to(dtype)
    byte = torch.arange(256, device=code.device)
    return torch.stack([numbers[byte >> 4], numbers[byte & 15]], dim=-1)


def four_bit_product(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    pairs: Tensor,
    bias: Tensor | None = None,
    config: FourBitConfig | None = None,
) -> Tensor:
    """x·Wᵀ + b: [T, O], in x's dtype.

    Args:
        x: [T, I] in bfloat16, float16 or, slowly, float32; I is a multiple of 64.
        codes: O·I / 2 bytes of any shape, contiguous.
        absmax: O·I / 64 scales in float32, contiguous.
        pairs: `pair_table` in x's dtype.
        bias: [O] or None.
        config: None for the default.
    """
    num_rows, num_inputs = x.shape
    num_outputs = codes.numel() * codes.element_size() * 2 // num_inputs
    assert pairs.dtype == x.dtype
    assert absmax.dtype == torch.float32
    assert absmax.numel() * UNIT == num_outputs * num_inputs
    config = config or FourBitConfig.default(num_rows, num_outputs, x.element_size())
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    _multiply[(triton.cdiv(num_outputs, config.block_o), triton.cdiv(num_rows, config.block_t))](
        y,
        x,
        codes.view(torch.uint8),
        absmax,
        pairs,
        y if bias is None else bias,
        num_rows,
        num_outputs,
        num_inputs // UNIT,
        num_inputs // 2,
        x.stride(0),
        y.stride(0),
        HAS_BIAS=bias is not None,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        UNITS=config.units,
        IS_EVEN=num_inputs // UNIT % config.units == 0,
        LOOK_UP=x.element_size() == 2 and not is_interpreted(),
        WIDEN=is_interpreted(),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
# The table, from the 256 words at an address: 32 copies of each, one for each bank and lane.
FILL = tl.constexpr("""
.shared .align 128 .b8 lora_core_pairs[32768];
{
.reg .pred more;
.reg .b32 byte, step, pair, start, place, turn, lane;
.reg .b64 from;
mov.u32 byte, %tid.x;
mov.u32 step, %ntid.x;
mov.u32 lane, %laneid;
next_byte:
mul.wide.u32 from, byte, 4;
add.u64 from, from, $1;
ld.global.nc.b32 pair, [from];
mov.u32 start, lora_core_pairs;
mad.lo.u32 start, byte, 128, start;
mov.u32 turn, 0;
next_copies:
add.u32 place, turn, lane;
and.b32 place, place, 7;
mad.lo.u32 place, place, 16, start;
st.shared.v4.b32 [place], {pair, pair, pair, pair};
add.u32 turn, turn, 1;
setp.lt.u32 more, turn, 8;
@more bra next_copies;
add.u32 byte, byte, step;
setp.lt.u32 more, byte, 256;
@more bra next_byte;
mov.u32 $0, 0;
bar.sync 0;
}
""")
LOOK_UP = """
{
.reg .b32 place, lane;
mov.u32 lane, %laneid;
mov.u32 place, lora_core_pairs;
mad.lo.u32 lane, lane, 4, place;
bfe.u32 place, $2, FIRST, 8;
mad.lo.u32 place, place, 128, lane;
ld.shared.b32 $0, [place];
bfe.u32 place, $2, SECOND, 8;
mad.lo.u32 place, place, 128, lane;
ld.shared.b32 $1, [place];
}
"""
# Of four bytes in a register, the pairs of the first two, and of the others.
LOOK_UP_FIRST = tl.constexpr(LOOK_UP.replace("FIRST", "0").replace("SECOND", "8"))
LOOK_UP_LAST = tl.constexpr(LOOK_UP.replace("FIRST", "16").replace("SECOND", "24"))


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    y,
    x,
    codes,
    absmax,
    pairs,
    bias,
    num_rows,
    num_outputs,
    num_units,
    row_bytes,
    x_stride,
    y_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    UNITS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    LOOK_UP: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.minimum(o, num_outputs - 1).to(tl.int64)  # what is read twice is not stored twice
    u = tl.arange(0, UNITS)
    j = tl.arange(0, 32)
    feature = j // 4 * 8 + j % 4
    codes_at = codes + (row * row_bytes)[None, :, None] + (u * 32)[:, None, None] + j[None, None, :]
    x_at = x + t.to(tl.int64)[None, None, :] * x_stride + (u * 64)[:, None, None] + feature[None, :, None]
    scales_at = absmax + (row * num_units)[None, :]
    is_row = (t < num_rows)[None, None, :]
    if LOOK_UP:
        _prepare(codes + row * row_bytes, row_bytes, absmax + row * num_units, pairs)
    acc = tl.zeros([UNITS, BLOCK_O, BLOCK_T], dtype=tl.float32)
    for first in tl.range(0, num_units, UNITS, num_stages=STAGES):
        is_unit = (u < num_units - first)[:, None, None]
        is_x = is_row if IS_EVEN else is_row & is_unit
        x_first = tl.load(x_at, mask=is_x, other=0.0)
        x_last = tl.load(x_at + 4, mask=is_x, other=0.0)
        scale = _scales(scales_at, first + u, num_units, IS_EVEN)
        w_first, w_last = _numbers(codes_at, is_unit, pairs, IS_EVEN, LOOK_UP)
        if WIDEN:
            w_first, w_last = w_first.to(tl.float32), w_last.to(tl.float32)
            x_first, x_last = x_first.to(tl.float32), x_last.to(tl.float32)
        sums = tl.dot(w_first, x_first, input_precision="ieee")
        sums = tl.dot(w_last, x_last, sums, input_precision="ieee")
        acc += sums * scale[:, :, None]
        codes_at += UNITS * 32
        x_at += UNITS * 64
    out = tl.sum(acc, axis=0)
    if HAS_BIAS:
        out += tl.load(bias + row).to(tl.float32)[:, None]
    y_at = y + t.to(tl.int64)[None, :] * y_stride + o[:, None]
    tl.store(y_at, out.to(y.dtype.element_ty), mask=(o < num_outputs)[:, None] & (t < num_rows)[None, :])


@triton.jit
def _prepare(rows_at, row_bytes, scales_at, pairs):
    """Fill the table, while the first KiB of each row, and 32 scales, come from memory as far as L2."""
    ahead = rows_at[:, None] + tl.minimum(tl.arange(0, 8) * 128, row_bytes - 1)[None, :]
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [ahead], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [scales_at], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(FILL, "=r,l", [pairs], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _scales(scales_at, unit, num_units, IS_EVEN: tl.constexpr):
    """[UNITS, BLOCK_O]; zeros beyond the row's end."""
    if IS_EVEN:
        return tl.load(scales_at + unit[:, None])
    return tl.load(scales_at + unit[:, None], mask=(unit < num_units)[:, None], other=0.0)


@triton.jit
def _numbers(codes_at, is_unit, pairs, IS_EVEN: tl.constexpr, LOOK_UP: tl.constexpr):
    """Twice [UNITS, BLOCK_O, 32], the weight's features of both products; zeros are not needed beyond a row's end."""
    if LOOK_UP:
        part = tl.load(codes_at) if IS_EVEN else tl.load(codes_at, mask=is_unit, other=0)
        dtype = pairs.dtype.element_ty
        first = tl.inline_asm_elementwise(LOOK_UP_FIRST, "=r,=r,r", [part], dtype=dtype, is_pure=True, pack=4)
        last = tl.inline_asm_elementwise(LOOK_UP_LAST, "=r,=r,r", [part], dtype=dtype, is_pure=True, pack=4)
        return first, last
    j = tl.arange(0, 32)
    side = (j % 2)[None, None, :]  # of the byte, and the byte itself, of which two are of each product in turn
    place = (j // 4 * 4 + j % 4 // 2 - j)[None, None, :]
    byte = tl.load(codes_at + place, mask=is_unit, other=0).to(tl.int32)
    next_byte = tl.load(codes_at + place + 2, mask=is_unit, other=0).to(tl.int32)
    return tl.load(pairs + byte * 2 + side), tl.load(pairs + next_byte * 2 + side)
