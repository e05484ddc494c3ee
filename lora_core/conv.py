"""LoraConv: convolutions in one, two and three dimensions with adapters.

A is a convolution like the base layer's with R output channels; B is a 1 × 1 convolution on top. As a linear map the
base weight is [O, I·kernel].
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import ConfigError, UnsupportedError
from lora_core.layer import LoraLayer
from lora_core.maths import Folded
from lora_core.ops import apply_rows
from lora_core.routing import Key, Route
from lora_core.weights import LoraTensors

__all__ = ["LoraConv", "is_conv"]

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def is_conv(module: nn.Module) -> bool:
    """True for nn.Conv1d, nn.Conv2d and nn.Conv3d."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


class LoraConv(LoraLayer):
    """A convolution with adapters: `lora_A` [R, I, *kernel], `lora_B` [O, R / groups, 1, …]."""

    base_layer: nn.Conv2d  # or Conv1d, or Conv3d

    @staticmethod
    def shape_of(module: nn.Module) -> tuple[int, int]:
        conv = cast(nn.Conv2d, module)
        return conv.out_channels, conv.weight[0].numel()

    def matrix(self) -> Tensor:
        return self.base_layer.weight.flatten(1)

    def weight_of(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base_layer.weight.shape)

    def make_factors(self, r: int, *, bias: bool) -> tuple[nn.Module, nn.Module]:
        base = self.base_layer
        if r % base.groups:
            raise ConfigError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. "
                "Currently, support is limited to conv layers where the rank is divisible by groups."
            )
        if base.padding_mode != "zeros":
            raise UnsupportedError(f"a convolution with padding mode {base.padding_mode!r} cannot have an adapter")
        kind: Any = type(base)
        a = kind(base.in_channels, r, base.kernel_size, base.stride, base.padding, base.dilation, bias=False)
        return a, kind(r, base.out_channels, 1, groups=base.groups, bias=bias)

    def magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.out_features, *[1] * (self.base_layer.weight.ndim - 2))

    def tensors(self, name: str) -> LoraTensors:
        part = super().tensors(name)
        groups = self.base_layer.groups
        if groups == 1:
            return part
        # B's groups as one matrix: each output channel reads its own group's rows of A.
        blocks = part.lora_B.unflatten(0, (groups, -1))
        return LoraTensors(part.lora_A, torch.block_diag(*blocks), part.bias, part.magnitude)

    def delta_matrix(self, name: str) -> Tensor:
        if self.base_layer.groups > 1:
            raise UnsupportedError("an adapter of a convolution with groups is no change of its weight")
        return super().delta_matrix(name)

    def folded(self, key: Key) -> Folded | None:
        if self.base_layer.groups > 1 and str(key) in self.lora_magnitude_vector:
            raise UnsupportedError("DoRA on a convolution with groups is not defined")
        return super().folded(key)

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        kernel = a.view(a.shape[0], -1, *self.base_layer.kernel_size)
        return _rows(self._convolve(x, kernel, 1))

    def base_part(self, x: Tensor) -> Tensor:
        return _rows(self._convolve(x, self.base_layer.weight, self.base_layer.groups))

    def _convolve(self, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        base = self.base_layer
        convolve: Any = CONVOLVE[kernel.ndim - 2]
        out: Tensor = convolve(x, kernel, None, base.stride, base.padding, base.dilation, groups)
        return out

    def adapt(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        if x.ndim < self.base_layer.weight.ndim:  # a single image without a batch
            return self.adapt(y.unsqueeze(0), x.unsqueeze(0), route).squeeze(0)
        channels_last = y.movedim(1, -1)
        rows = channels_last.reshape(-1, self.out_features)
        out = apply_rows(rows, x, self.source(), route, self.bias, self.shrink, self.base_part)
        return out.view(channels_last.shape).movedim(-1, 1)


def _rows(y: Tensor) -> Tensor:
    """[N, C, *places] -> [N · places, C]."""
    return y.movedim(1, -1).reshape(-1, y.shape[1])
