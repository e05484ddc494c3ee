"""The formulas of LoRA and DoRA, each in one place.

With W0 [O, I] the base weight, A [R, I], B [O, R], s the scaling and m [O] DoRA's magnitude:

    LoRA     W = W0 + s·B·A
    DoRA     W = diag(gain)·(W0 + s·B·A),   gain = m / ‖W0 + s·B·A‖_row

Both are folded once into arrays from which any batch is computed (see `lora_core.ops`):

    y_t = (1 + Σ_i w_ti·(gain_i - 1))·(W0·x_t) + bias0 + Σ_i w_ti·(x_t·a_iᵀ·b_i + bias_i)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.errors import TargetError
from lora_core.weights import LoraTensors

__all__ = ["Folded", "delta_weight", "dora_gain", "fold", "is_finite", "weight_change"]

# Of W0 + s·B·A, for its norms: 64 MiB in float32.
NORM_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Folded:
    """One adapter on one linear layer, ready to be applied.

    Attributes:
        a: [R, I].
        b: [R, O]; B transposed, times the scaling and, for DoRA, times the gain.
        gain: [O] or None; DoRA's gain minus one, so that zero means "leave the base output alone".
        bias: [O] or None; already scaled.
        dropout: applied to the input of a, in training; None otherwise.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None
    dropout: nn.Module | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.a, self.b, self.gain, self.bias) if t is not None]

    def to(self, dtype: torch.dtype) -> "Folded":
        """The same arrays in another dtype."""
        gain = None if self.gain is None else self.gain.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Folded(self.a.to(dtype), self.b.to(dtype), gain, bias, self.dropout)


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s·B·A, [O, I]."""
    return (lora_B @ lora_A) * scaling


def dora_gain(magnitude: Tensor, base_weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """m / ‖W0 + s·B·A‖_row, [O] (Liu et al. 2024, eq. 5 and section 4.3), on the magnitude's device.

    The norm is a constant to autograd, as in the paper and in PEFT. It is computed where the base weight is, which is
    large and stays there, and so many rows at a time that no more than `NORM_ELEMENTS` numbers are held for it.

    Args:
        base_weight: [O, I], in full precision; any quantized weight is dequantized before.
    """
    with torch.no_grad():
        lora_A, lora_B = lora_A.to(base_weight.device), lora_B.to(base_weight.device)
        num_rows = max(NORM_ELEMENTS // max(base_weight.shape[1], 1), 1)
        norms = [
            torch.linalg.vector_norm(rows.to(lora_A.dtype) + delta_weight(lora_A, b, scaling), dim=1)
            for rows, b in zip(base_weight.split(num_rows), lora_B.split(num_rows), strict=True)
        ]
    return magnitude / torch.cat(norms).to(magnitude.device)


def weight_change(part: LoraTensors, scaling: float, base_weight: Tensor | None = None) -> Tensor:
    """What an adapter adds to a weight, [O, I]: s·B·A, or diag(gain)·(W0 + s·B·A) - W0 for DoRA.

    Args:
        base_weight: W0 [O, I]; needed for DoRA only.
    """
    delta = delta_weight(part.lora_A, part.lora_B, scaling)
    if part.magnitude is None:
        return delta
    assert base_weight is not None
    weight = base_weight.to(delta.dtype)
    gain = dora_gain(part.magnitude, weight, part.lora_A, part.lora_B, scaling)
    return gain[:, None] * (weight + delta) - weight


def fold(part: LoraTensors, scaling: float, base_weight: Tensor | None = None) -> Folded:
    """Fold one module of an adapter; differentiable in all of its tensors.

    Args:
        base_weight: [O, I]; needed for DoRA only. It may be on another device, and is not moved.

    Raises:
        TargetError: a DoRA part and a base weight of another shape.
    """
    b = (part.lora_B * scaling).T
    bias = None if part.bias is None else part.bias * scaling
    if part.magnitude is None:
        return Folded(part.lora_A, b, None, bias)
    if base_weight is None or base_weight.shape != (part.lora_B.shape[0], part.lora_A.shape[1]):
        raise TargetError("a DoRA adapter needs the base weight, of its own shape")
    gain = dora_gain(part.magnitude, base_weight, part.lora_A, part.lora_B, scaling)
    return Folded(part.lora_A, b * gain, gain - 1, bias)


def is_finite(tensor: Tensor) -> bool:
    """No element of a floating-point tensor is NaN or infinite.

    Its extremes tell, as NaN comes through; `isfinite` takes ten times as long in bfloat16.
    """
    if not tensor.numel():
        return True
    if tensor.ndim == 2 and not tensor.is_contiguous():  # of a transposed one they take ten times as long
        tensor = tensor.T
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))
