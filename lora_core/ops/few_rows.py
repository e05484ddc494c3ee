"""Products of few rows with a weight of a GPU, x·Wᵀ, as fast as the weight can be read.

Decoding reads every weight for a handful of rows. On an H200 PyTorch's products of 1 to 32 rows of 4,096 features read
2.6 to 4.0 TB/s of the 4.1 that there are; these read 2.8 to 4.2, and leave room on each multiprocessor for the
adapters' kernels, which run beside them in a recorded step. One row is summed number by number, more go through the
matrix units, weights first. Sums are float32, in an order that the number of rows (beyond one) does not change.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.ops.triton import is_interpreted

__all__ = ["MAX_ROWS", "can_multiply", "multiply"]

MAX_ROWS = 32
# The launch parameters were measured on this architecture only; and a vocabulary's worth of outputs gains nothing.
CAPABILITY = (9, 0)
MAX_OUTPUTS = 1 << 15
OUTPUT_STEP, INPUT_STEP = 64, 256
MANY_OUTPUTS = 1 << 14


def can_multiply(weight: Tensor) -> bool:
    """A weight [O, I] of whole blocks in half precision, where these products are known to be the faster ones."""
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    if not weight.is_cuda or not is_half or weight.ndim != 2 or not weight.is_contiguous():
        return False
    has_blocks = weight.shape[0] % OUTPUT_STEP == 0 and weight.shape[1] % INPUT_STEP == 0
    is_known = torch.cuda.get_device_capability(weight.device) == CAPABILITY
    return has_blocks and weight.shape[0] <= MAX_OUTPUTS and is_known


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, I] of at most `MAX_ROWS` rows, weight [O, I], bias [O] or None -> [T, O]."""
    num_rows, num_outputs = len(x), len(weight)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(num_rows, num_outputs)
    own: dict[str, Any] = {"HAS_BIAS": bias is not None}
    added = weight if bias is None else bias
    if num_rows == 1:
        block_o, block_i = _blocks_of_one(num_outputs, weight.shape[1])
        _multiply_one[(num_outputs // block_o,)](
            x, weight, added, y, weight.shape[1], **own, BLOCK_O=block_o, BLOCK_I=block_i, num_warps=4
        )
        return y
    block_i = INPUT_STEP if num_outputs < MANY_OUTPUTS else INPUT_STEP // 2
    _multiply[(num_outputs // OUTPUT_STEP,)](
        x,
        weight,
        added,
        y,
        num_rows,
        num_outputs,
        weight.shape[1],
        x.stride(0),
        **own,
        M=16 if num_rows <= 16 else MAX_ROWS,
        BLOCK_O=OUTPUT_STEP,
        BLOCK_I=block_i,
        WIDEN=is_interpreted(),
        num_warps=4,
        num_stages=4,
    )
    return y


def _blocks_of_one(num_outputs: int, num_inputs: int) -> tuple[int, int]:
    """Few outputs need many programs each, whose reads are long then."""
    block_o = 2 if num_outputs <= 4_096 else 8 if num_outputs < MANY_OUTPUTS else 16
    block_i = 4_096 // block_o
    while num_inputs % block_i:
        block_i //= 2
    return block_o, block_i


@triton.jit
def _multiply_one(x, weight, bias, y, num_inputs, HAS_BIAS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    rows = weight + o.to(tl.int64)[:, None] * num_inputs
    acc = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for first in range(0, num_inputs, BLOCK_I):
        own = tl.load(x + first + i).to(tl.float32)
        acc += tl.load(rows + (first + i)[None, :]).to(tl.float32) * own[None, :]
    out = tl.sum(acc, 1)
    if HAS_BIAS:
        out += tl.load(bias + o).to(tl.float32)
    tl.store(y + o, out.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x,
    weight,
    bias,
    y,
    num_rows,
    num_outputs,
    num_inputs,
    x_stride,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WIDEN: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.arange(0, M)
    i = tl.arange(0, BLOCK_I)
    is_row = (row < num_rows)[:, None]
    weights = weight + o.to(tl.int64)[:, None] * num_inputs + i[None, :]
    inputs = x + row[:, None] * x_stride + i[None, :]
    acc = tl.zeros([BLOCK_O, M], dtype=tl.float32)
    for first in range(0, num_inputs, BLOCK_I):
        w_part = tl.load(weights + first)
        x_part = tl.load(inputs + first, mask=is_row, other=0.0)
        if WIDEN:
            w_part = w_part.to(tl.float32)
            x_part = x_part.to(tl.float32)
        acc = tl.dot(w_part, x_part.T, acc)
    if HAS_BIAS:
        acc += tl.load(bias + o).to(tl.float32)[:, None]
    tl.store(y + row[None, :] * num_outputs + o[:, None], acc.to(y.dtype.element_ty), mask=(row < num_rows)[None, :])
