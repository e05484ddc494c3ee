"""LoftQ (Li et al. 2023): adapters that begin by giving back what quantization takes.

The quantizers are simulated in PyTorch and return what the quantized weight stands for, in full precision. Four bits
are bitsandbytes' NF4 in blocks of 64, bit for bit; two bits the same construction with four levels; eight bits
bitsandbytes' row-wise int8.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.errors import ConfigError

__all__ = ["LoftQ", "fake_quantize", "loftq", "low_rank"]

BLOCK_SIZE = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NORMAL_OFFSET = 0.9677083  # the quantile of the outermost level (QLoRA, Dettmers et al. 2023)


class LoftQ(NamedTuple):
    """`quantized` [O, I], what the quantized weight stands for; `lora_A` [R, I] and `lora_B` [O, R] beside it."""

    quantized: Tensor
    lora_A: Tensor
    lora_B: Tensor


def loftq(weight: Tensor, bits: int, rank: int, scaling: float, num_iterations: int = 1) -> LoftQ:
    """Alternate between quantizing W - s·B·A and factoring what that leaves of W.

    PEFT leaves the scaling out, so that its factors compensate only where lora_alpha equals r; here s·B·A does always.

    Args:
        weight: [O, I], any float dtype.
        bits: 2, 4 or 8.

    Raises:
        ConfigError: another number of bits, or no iteration.
    """
    if num_iterations < 1:
        raise ConfigError("Number of iterations must be greater than 0")
    full = weight.float()
    target = full
    for _ in range(num_iterations):
        quantized = fake_quantize(target, bits)
        lora_a, lora_b = low_rank(full - quantized, rank, scaling)
        target = full - scaling * (lora_b @ lora_a)
    return LoftQ(quantized.to(weight.dtype), lora_a, lora_b)


def low_rank(residual: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The best A [R, I] and B [O, R] with s·B·A ≈ residual [O, I], the singular values shared evenly.

    A rank above the residual's own is filled up with zeros.
    """
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    root = (s[:rank] / abs(scaling)).sqrt()
    lora_a, lora_b = root[:, None] * vh[:rank], u[:, :rank] * root
    if scaling < 0:
        lora_b = -lora_b
    missing = rank - lora_a.shape[0]
    if missing > 0:
        lora_a = torch.cat([lora_a, lora_a.new_zeros(missing, lora_a.shape[1])])
        lora_b = torch.cat([lora_b, lora_b.new_zeros(lora_b.shape[0], missing)], dim=1)
    return lora_a.contiguous(), lora_b.contiguous()


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize [O, I]; float32.

    Raises:
        ConfigError: bits is not 2, 4 or 8.
    """
    weight = weight.float()
    if bits == 8:
        weight = weight.half().float()  # bitsandbytes quantizes from float16
        largest = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)  # a row of zeros stays one
        return (weight * (127 / largest)).round() * (largest / 127)
    if bits not in (2, 4):
        raise ConfigError(f"LoftQ quantizes to 2, 4 or 8 bits, not {bits}")
    levels = torch.tensor(NF4, device=weight.device) if bits == 4 else _normal_levels(bits).to(weight.device)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    relative = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)
    borders = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(relative, borders)] * scale
    return nearest.flatten()[: flat.numel()].view_as(weight)


def _normal_levels(bits: int) -> Tensor:
    """2^bits quantiles of the normal distribution with zero among them, scaled to [-1, 1], sorted."""
    half = 2 ** (bits - 1)

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(NORMAL_OFFSET, 0.5, count, dtype=torch.float64)[:-1])

    levels = torch.cat([quantiles(half + 1), torch.zeros(1, dtype=torch.float64), -quantiles(half)])
    return (levels / levels.max()).sort().values.float()
