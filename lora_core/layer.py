"""LoraLinear: a linear layer of the base model with its adapters beside it.

The base layer stays the object it was, under `base_layer`, and is always called through its own forward, so that
quantized layers work as they are. Adapters come from one of two places: trainable parameters named as PEFT names
them (`lora_A`, `lora_B`, `lora_magnitude_vector`), or, in a server, the layer's slots.
"""

import math
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lora_core.errors import AdapterNotFoundError, UnsupportedError
from lora_core.maths import Folded, fold
from lora_core.ops import apply_lora
from lora_core.routing import Key, Router
from lora_core.slots import LayerSlots
from lora_core.weights import LoraTensors

__all__ = ["LoraLinear", "MagnitudeVector", "is_linear", "linear_shape", "linear_weight"]


def is_linear(module: nn.Module) -> bool:
    """True for the layers that can carry an adapter: nn.Linear, GPT-2's Conv1D, or one that is wrapped already."""
    return isinstance(module, nn.Linear | LoraLinear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (weight [I, O]), told by its name: this package does not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [O, I], a view where possible.

    Raises:
        UnsupportedError: the weight is not stored as plain floats.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise UnsupportedError(f"the weight of a {type(module).__name__} is stored as {weight.dtype}")
    return weight.T if _is_conv1d(module) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    if _is_conv1d(module):
        in_features, out_features = cast(Tensor, module.weight).shape
        return out_features, in_features
    return cast(int, module.out_features), cast(int, module.in_features)


class MagnitudeVector(nn.Module):
    """DoRA's magnitude, [O], in a module of its own so that its key is the one PEFT uses."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


class _SharedOutput(Protocol):
    """Computes several layers as one (`lora_core.shared`)."""

    def output(self, member: "LoraLinear", x: Tensor, /) -> Tensor:
        """The member's output, adapters included."""


class LoraLinear(nn.Module):
    """A linear layer with adapters.

    Args:
        base_layer: nn.Linear, a subclass of it, or Conv1D.
        router: tells which rows want which adapters.
        is_head: the layer is the output embedding and runs on `router.head_route`.
    """

    def __init__(self, base_layer: nn.Module, router: Router, *, is_head: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = linear_shape(base_layer)
        self.router = router
        self.is_head = is_head
        self.slots: LayerSlots | None = None
        self.shared: _SharedOutput | None = None
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.scaling: dict[str, float] = {}

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)

    @property
    def device(self) -> torch.device:
        return next(self.base_layer.parameters()).device

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.shared is not None and not torch.is_grad_enabled():
            return self.shared.output(self, x)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        route = self.router.head_route if self.is_head else self.router.route
        if route is None or route.is_base:
            return y
        return apply_lora(y, x, self if self.slots is None else self.slots, route, self.bias)

    def add_adapter(
        self,
        name: str,
        r: int,
        scaling: float,
        *,
        use_dora: bool = False,
        lora_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Create trainable parameters: A Kaiming-uniform, B zero, DoRA's magnitude ‖W0‖_row (PEFT's defaults)."""
        weight = linear_weight(self.base_layer)
        dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        lora_a = nn.Linear(self.in_features, r, bias=False, device=weight.device, dtype=dtype)
        lora_b = nn.Linear(r, self.out_features, bias=lora_bias, device=weight.device, dtype=dtype)
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(lora_b.weight)
        if lora_bias:
            nn.init.zeros_(lora_b.bias)
        self.lora_A[name], self.lora_B[name] = lora_a, lora_b
        self.scaling[name] = scaling
        if dropout > 0:
            self.lora_dropout[name] = nn.Dropout(dropout)
        if use_dora:
            norm = torch.linalg.vector_norm(weight.detach().to(dtype), dim=1)
            self.lora_magnitude_vector[name] = MagnitudeVector(norm)

    def tensors(self, name: str) -> LoraTensors:
        """The adapter's parameters.

        Raises:
            AdapterNotFoundError: this layer does not have it.
        """
        if name not in self.lora_A:
            raise AdapterNotFoundError(f"Adapter {name} does not exist")
        a, b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        magnitude = None
        if name in self.lora_magnitude_vector:
            magnitude = cast(MagnitudeVector, self.lora_magnitude_vector[name]).weight
        return LoraTensors(a.weight, b.weight, b.bias, magnitude)

    def folded(self, key: Key) -> Folded | None:
        """The adapter folded afresh from its parameters, differentiable (`AdapterSource`)."""
        if not isinstance(key, str) or key not in self.lora_A:
            return None
        part = self.tensors(key)
        weight = None if part.magnitude is None else linear_weight(self.base_layer)
        out = fold(part, self.scaling[key], weight)
        dropout = self.lora_dropout[key] if key in self.lora_dropout else None  # noqa: SIM401 - a ModuleDict has no get
        return Folded(out.a, out.b, out.gain, out.bias, dropout)

    def extra_repr(self) -> str:
        return f"adapters={sorted(self.lora_A)}" if self.slots is None else "adapters in slots"
