"""Starting values of A and B, and what they take out of the base weight.

Sources: LoRA (Hu et al. 2021), PiSSA (Meng et al. 2024), OLoRA (Büyükakyüz 2024). Random draws come in PEFT's order, so
equal seeds give equal adapters.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError

__all__ = ["Start", "gaussian", "kaiming", "olora", "orthogonal", "pissa"]


class Start(NamedTuple):
    """Starting values: `lora_A` [R, I], `lora_B` [O, R], and the changed base weight [O, I] or None."""

    lora_A: Tensor
    lora_B: Tensor
    residual: Tensor | None = None


def kaiming(lora_A: Tensor, lora_B: Tensor) -> None:
    """A Kaiming-uniform, B zero, in place: the adapter begins as no change."""
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


def gaussian(lora_A: Tensor, lora_B: Tensor) -> None:
    """A normal with deviation 1 / R, B zero, in place."""
    nn.init.normal_(lora_A, std=1 / lora_A.shape[0])
    nn.init.zeros_(lora_B)


def orthogonal(in_features: int, out_features: int, rank: int) -> Start:
    """A and B with rows from the odd and even rows of one random orthogonal matrix: B·A = 0, yet neither is zero.

    Raises:
        ConfigError: the rank is odd.
    """
    if rank % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {rank} instead.")
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    lora_a = torch.randn(in_features, rank // 2).mm(q[0::2]).T / 10.0
    lora_b = torch.randn(rank // 2, out_features).T.mm(q[1::2]) / 10.0
    return Start(lora_a.contiguous(), lora_b.contiguous())


def pissa(weight: Tensor, rank: int, scaling: float, num_iterations: int | None = None) -> Start:
    """The principal singular triples of the weight; the base keeps the rest.

    Args:
        weight: [O, I], float32.
        num_iterations: None for an exact SVD, else subspace iterations of a randomised one.
    """
    if num_iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=num_iterations)
        vh = v.T
    root = (s / scaling).sqrt()
    lora_a, lora_b = root[:, None] * vh, u * root
    return Start(lora_a, lora_b, weight - scaling * (lora_b @ lora_a))


def olora(weight: Tensor, rank: int, scaling: float) -> Start:
    """The first columns of Q and rows of R of the weight's QR decomposition; the base keeps the rest.

    Args:
        weight: [O, I], float32.
    """
    q, r = torch.linalg.qr(weight)
    lora_a, lora_b = r[:rank].contiguous(), q[:, :rank].contiguous()
    return Start(lora_a, lora_b, weight - scaling * (lora_b @ lora_a))
