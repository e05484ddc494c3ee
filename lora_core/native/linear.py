"""A linear layer's weight in the panels that `linear.c` reads."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.native import library

__all__ = ["NativeWeight"]


class NativeWeight:
    """y = x·Wᵀ + b for one W [O, I] and any number of rows; a row's result does not depend on the others.

    Args:
        weight: [O, I], copied; see `can_hold`.
    """

    def __init__(self, weight: Tensor) -> None:
        library_ = library(weight.dtype)
        assert library_ is not None
        self.out_features, self.in_features = weight.shape
        self._linear = library_.linear
        self._is_interleaved = weight.dtype == torch.bfloat16
        width = int(library_.panel_width())
        panels = F.pad(weight, (0, 0, 0, -self.out_features % width)).unflatten(0, (-1, width))  # [P, W, I]
        if self._is_interleaved:
            panels = panels.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        self._panels = panels.transpose(1, 2).contiguous()  # [P, I, W]

    @staticmethod
    def can_hold(dtype: torch.dtype) -> bool:
        return library(dtype) is not None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] of the weight's dtype, bias [O] -> [..., O]."""
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1 or x.dtype != self._panels.dtype:
            rows = rows.to(self._panels.dtype).contiguous()
        bias = None if bias is None else bias.to(rows.dtype).contiguous()
        y = rows.new_empty(*x.shape[:-1], self.out_features)
        places = rows.data_ptr(), rows.stride(0), self._panels.data_ptr(), None if bias is None else bias.data_ptr()
        failed = self._linear(*places, y.data_ptr(), len(rows), self.in_features, self.out_features)
        if failed:
            raise MemoryError("no memory for a product")
        return y

    def unpack(self) -> Tensor:
        """[O, I], bit for bit: a copy."""
        panels = self._panels.transpose(1, 2)
        if self._is_interleaved:
            panels = panels.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return panels.flatten(0, 1)[: self.out_features].contiguous()
