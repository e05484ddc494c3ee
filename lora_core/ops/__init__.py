"""`apply_lora`: the one operation that adapters add to a linear layer.

Legend of shapes: T tokens, I/O input/output features, R rank of one adapter, K adapters in use, S slots.

Semantics, for every token t, with w the route and everything on the right as it was before the call:

    y[t] += (Σ_i w[t,i]·gain_i) * (y[t] - bias0)  +  Σ_i w[t,i]·(x[t]·a_iᵀ·b_i + bias_i)

`lora_core.ops.reference` is this formula as a loop and the definition; the other backends must agree with it. A token
with no adapter keeps its bits, whatever other tokens' adapters hold (infinities among them).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.device_slots import DeviceSlots
from lora_core.maths import Folded
from lora_core.ops import cpu
from lora_core.routing import Key, Route

__all__ = ["AdapterSource", "BasePart", "Shrink", "apply_lora", "apply_rows"]

# (x, a [R, I]) -> x·aᵀ [tokens, R], for layers whose input is no row of features (token ids, images).
Shrink = Callable[[Tensor, Tensor], Tensor]
# x -> W0·x [tokens, O] without the bias.
BasePart = Callable[[Tensor], Tensor]


class AdapterSource(Protocol):
    """Where a layer's folded adapters come from: slots in the server, parameters in the library."""

    def folded(self, key: Key, /) -> Folded | None:
        """The adapter's arrays for this layer, or None if it does not touch the layer."""


def apply_lora(y: Tensor, x: Tensor, adapters: AdapterSource, route: Route, base_bias: Tensor | None) -> Tensor:
    """Add the adapters' part to a linear layer's output.

    Args:
        y: [..., O], the layer's own output; may be overwritten when autograd is off.
        x: [..., I], its input, with the same leading shape.
        adapters: this layer's adapters.
        route: of T rows, or of a divisor of T: then each row stands for T / num_rows tokens in a row.
        base_bias: [O], the bias inside y, or None; a DoRA gain does not scale it.

    Returns:
        [..., O], in the dtype of y.

    Raises:
        ValueError: the number of tokens is no multiple of the route's rows.
    """
    if route.is_base:
        return y
    y_rows = y.reshape(-1, y.shape[-1])
    return apply_rows(y_rows, x.reshape(-1, x.shape[-1]), adapters, route, base_bias).view(y.shape)


def apply_rows(
    y: Tensor,
    x: Tensor,
    adapters: AdapterSource,
    route: Route,
    base_bias: Tensor | None,
    shrink: Shrink = F.linear,
    base_part: BasePart | None = None,
) -> Tensor:
    """`apply_lora` for any layer that is a linear map underneath.

    Args:
        y: [Y, O], Y a multiple of the route's rows; may be overwritten when autograd is off.
        x: inputs in the layer's own form, whose first dimension is a multiple of the route's rows.
        base_part: needed where a DoRA adapter trains with dropout, which W0 must see too (as in PEFT).

    Returns:
        [Y, O], in the dtype of y.

    Raises:
        ValueError: the number of rows does not fit.
    """
    if x.shape[0] % max(route.num_rows, 1) or y.shape[0] % max(route.num_rows, 1):
        raise ValueError(f"{x.shape[0]} tokens cannot be split over {route.num_rows} rows")
    if torch.is_grad_enabled():
        y = y.clone()
    elif isinstance(adapters, DeviceSlots) and adapters.kernels is not None:
        adapters.kernels.apply(y, x, route, base_bias)
        return y
    return cpu.apply(y, x, adapters, route, base_bias, shrink, base_part)
