"""Small operations of a model in one pass of C; None where the tensors are not for it, and PyTorch has to serve."""

import torch
from torch import Tensor

from lora_core.native import library

__all__ = ["native_maxima", "native_rms_norm", "native_silu_gate"]


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x / sqrt(mean(x²) + eps) · weight: x [..., D], weight [D] -> [..., D] (Zhang & Sennrich 2019)."""
    found = library(x.dtype) if _is_plain(x) and weight.dtype == x.dtype else None
    if found is None:
        return None
    y = torch.empty_like(x)
    size = weight.shape[0]
    found.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps)
    return y


def native_silu_gate(x: Tensor) -> Tensor | None:
    """silu(gate)·up of [gate | up], x [..., 2·D] -> [..., D] (Shazeer 2020)."""
    found = library(x.dtype) if _is_plain(x) else None
    if found is None:
        return None
    size = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], size)
    found.silu_gate(x.data_ptr(), y.data_ptr(), x.numel() // (2 * size), size)
    return y


def native_maxima(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of each row of x [N, V]: the largest number, in float32, NaN if one is, and its first place: [N] each."""
    is_plain = x.device.type == "cpu" and x.is_contiguous() and not x.requires_grad
    found = library(x.dtype) if is_plain else None
    if found is None:
        return None
    peaks, places = x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.long)
    found.row_maxima(x.data_ptr(), peaks.data_ptr(), places.data_ptr(), *x.shape)
    return peaks, places


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_contiguous() and not torch.is_grad_enabled()
