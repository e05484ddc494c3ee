"""Weights laid out once in the order in which the CPU's matrix kernels read them.

`F.linear` brings its weight into that order at every call, which costs as much as the product itself when there are
few rows. oneDNN's packed form holds the same numbers in the same number of bytes, and gives the same results. PyTorch's
operators for it are private; where they are missing, or the device or dtype is another, a plain weight is used.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PackedWeight"]

# The kernels choose a layout for about so many rows; it serves other numbers nearly as well.
TYPICAL_ROWS = 16
PACKABLE = (torch.float32, torch.bfloat16)


class PackedWeight:
    """y = x·Wᵀ + b for one W [O, I] and any number of rows.

    Args:
        weight: [O, I]; copied if it is packed, kept as it is otherwise.

    Attributes:
        is_packed: the weight is in the packed form.
    """

    def __init__(self, weight: Tensor) -> None:
        packers = _packers() if _is_packable(weight) else None
        self.is_packed = packers is not None
        if packers is None:
            self._weight = weight
            self._linear: Any = None
        else:
            pack, self._linear = packers
            self._weight = pack(weight.contiguous(), TYPICAL_ROWS)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I], bias [O] -> [..., O]."""
        if self._linear is None:
            return F.linear(x, self._weight, bias)
        out: Tensor = self._linear(x, self._weight, bias, "none", [], "")
        return out

    def unpack(self) -> Tensor:
        """The weight [O, I], bit for bit: a copy if it is packed, its own storage otherwise."""
        torch.get_num_threads()  # oneDNN would ask OpenMP; a thread's first PyTorch operator sets the number there
        return self._weight.to_dense() if self.is_packed else self._weight


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in PACKABLE and weight.numel() > 0


@functools.cache
def _packers() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """oneDNN's reorder and product, if this build of PyTorch has them and they do what is expected."""
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight.default
        linear = torch.ops.mkldnn._linear_pointwise.default
        with torch.inference_mode():
            for dtype in PACKABLE:
                weight = torch.eye(24, 40, dtype=dtype)
                packed = pack(weight, TYPICAL_ROWS)
                product = linear(torch.eye(40, dtype=dtype), packed, None, "none", [], "")
                if not (torch.equal(packed.to_dense(), weight) and torch.equal(product, weight.T)):
                    return None
    except (AttributeError, RuntimeError):
        return None
    return pack, linear
