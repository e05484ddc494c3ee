"""LoraLayer: a layer of the base model with its LoRA and DoRA adapters beside it; and LoraLinear, for linear layers.

The base layer is always called through its own forward, so that quantized layers work as they are. Adapters come from
one of two places: trainable parameters named as PEFT names them (`lora_A`, `lora_B`, `lora_magnitude_vector`), or, in a
server, the layer's slots.

Every kind of layer is a linear map underneath, and says how: its weight as a matrix [O, I], its adapters' factors A
[R, I] and B [O, R], and how A meets the layer's input. Folding, merging and mixing know only that.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapter_module import AdapterModule
from lora_core.errors import AdapterNotFoundError, UnsupportedError
from lora_core.maths import Folded, dora_gain, fold, weight_change
from lora_core.ops import apply_rows
from lora_core.quant import dequantized_weight, is_opaque_linear, is_quantized, keep_layout, quantized_like
from lora_core.routing import Key, Route, Router
from lora_core.slots import SlotsOfLayer
from lora_core.weights import LoraTensors

__all__ = [
    "LoraLayer",
    "LoraLinear",
    "MagnitudeVector",
    "RemovedFactors",
    "is_conv1d",
    "is_linear",
    "linear_shape",
    "linear_weight",
]

HALF = (torch.float16, torch.bfloat16)


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and its subclasses, quantized ones, GPT-2's Conv1D, or one of them that is wrapped already."""
    while isinstance(module, AdapterModule) and not isinstance(module, LoraLinear):
        module = module.get_base_layer()
    return isinstance(module, nn.Linear | LoraLinear) or is_conv1d(module) or is_opaque_linear(module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (weight [I, O]), told by its name: this package does not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [O, I] in floating point; a view where possible, else dequantized."""
    if is_quantized(module):
        return dequantized_weight(module)
    weight = cast(Tensor, module.weight)
    if not weight.is_floating_point():
        raise UnsupportedError(f"the weight of a {type(module).__name__} is stored as {weight.dtype}")
    return weight.T if is_conv1d(module) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    if is_conv1d(module):
        in_features, out_features = cast(Tensor, module.weight).shape
        return out_features, in_features
    return cast(int, module.out_features), cast(int, module.in_features)


class MagnitudeVector(nn.Module):
    """DoRA's magnitude in a module of its own, so that its key is the one PEFT uses."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


class _SharedOutput(Protocol):
    """Computes several layers as one (`lora_core.shared`)."""

    def output(self, member: "LoraLinear", x: Tensor, /) -> Tensor:
        """The member's output, adapters included."""


class RemovedFactors(nn.Module):
    """A0 and B0 that an adapter's initialisation takes out of a quantized weight, which itself stays as it is."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)


class LoraLayer(AdapterModule):
    """A layer with adapters; subclasses know the kind of layer.

    Args:
        base_layer: the layer itself.

    Attributes:
        slots: a server's adapters, by slot; None in the library.
        scaling, r, lora_alpha: of each adapter that has factors here, by name.
    """

    def __init__(self, base_layer: nn.Module, router: Router, *, is_head: bool = False) -> None:
        super().__init__(router, is_head=is_head)
        self.base_layer = base_layer
        keep_layout(base_layer)
        self.out_features, self.in_features = self.shape_of(base_layer)
        self.slots: SlotsOfLayer | None = None
        self.shared: _SharedOutput | None = None
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.trained_bias = nn.ParameterDict()
        self.removed = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}

    # What a kind of layer knows.

    @staticmethod
    def shape_of(module: nn.Module) -> tuple[int, int]:
        """(O, I) of the weight as a matrix."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The base weight as [O, I]; a view where possible."""
        raise NotImplementedError

    def weight_of(self, matrix: Tensor) -> Tensor:
        """[O, I] as the base layer stores it."""
        raise NotImplementedError

    def make_factors(self, r: int, *, bias: bool) -> tuple[nn.Module, nn.Module]:
        """Modules for A and B, initialised as PyTorch does, in the order in which PEFT draws."""
        raise NotImplementedError

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        """A's part: inputs in their own form and a [R, I] -> [tokens, R]."""
        raise NotImplementedError

    def adapt(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        """Add the adapters' part to the base layer's output."""
        raise NotImplementedError

    # What all kinds share.

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.base_layer.parameters(), self.base_layer.buffers())).device

    @property
    def adapter_dtype(self) -> torch.dtype:
        """What PEFT trains in: float32 beside half precision."""
        dtype = self.weight.dtype if not is_quantized(self.base_layer) else torch.float32
        return torch.float32 if dtype in HALF else dtype

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = self.base_layer(x, *args, **kwargs)
        route = self.route
        return y if route is None else self.adapt(y, x, route)

    def source(self) -> Any:
        """Where `apply_lora` finds this layer's adapters."""
        return self if self.slots is None else self.slots

    def add_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float,
        scaling: float,
        *,
        use_dora: bool = False,
        lora_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Create an adapter's parameters with PyTorch's own starting values; `lora_core.init` sets PEFT's."""
        place: dict[str, Any] = {"device": self.device, "dtype": self.adapter_dtype}
        a, b = self.make_factors(r, bias=lora_bias)
        self.lora_A[name], self.lora_B[name] = a.to(**place), b.to(**place)
        self.r[name], self.lora_alpha[name], self.scaling[name] = r, lora_alpha, scaling
        if dropout > 0:
            self.lora_dropout[name] = nn.Dropout(dropout).train(self.base_layer.training)
        if use_dora:
            self.lora_magnitude_vector[name] = MagnitudeVector(torch.empty(self.magnitude_shape(), **place))

    def add_bias(self, name: str) -> None:
        """Let the adapter train the base layer's bias: a copy of its own."""
        self.trained_bias[name] = nn.Parameter(self.bias.detach().clone())

    def magnitude_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    def reset_magnitude(self, name: str) -> None:
        """DoRA's starting value: the norm of every row of W0 + s·B·A."""
        part = self.effective(name)
        if part.magnitude is not None:
            one = torch.ones_like(part.magnitude)
            with torch.no_grad():
                part.magnitude.copy_(1 / dora_gain(one, self.matrix(), part.lora_A, part.lora_B, self.scaling[name]))

    def delete(self, name: str) -> None:
        vectors = (self.lora_magnitude_vector, self.trained_bias)
        for parts in (self.lora_A, self.lora_B, self.lora_dropout, self.removed, *vectors):
            if name in parts:
                del parts[name]
        for numbers in (self.scaling, self.r, self.lora_alpha):
            numbers.pop(name, None)

    @property
    def adapter_names(self) -> set[str]:
        return set(self.scaling) | set(self.trained_bias)

    def has_factors(self, name: object) -> bool:
        return name in self.scaling

    def state(self, name: str) -> dict[str, nn.Parameter]:
        out = self.factor_state(name) if self.has_factors(name) else {}
        if name in self.lora_magnitude_vector:
            out["lora_magnitude_vector"] = cast(MagnitudeVector, self.lora_magnitude_vector[name]).weight
        if name in self.trained_bias:
            out["base_layer.bias" if out else "bias"] = self.trained_bias[name]
        return out

    def factor_state(self, name: str) -> dict[str, nn.Parameter]:
        a, b = self.lora_A[name], self.lora_B[name]
        return {f"lora_A.{key}": p for key, p in a.named_parameters()} | {
            f"lora_B.{key}": p for key, p in b.named_parameters()
        }

    def tensors(self, name: str) -> LoraTensors:
        """The adapter's parameters as matrices: views, through which they can be changed.

        Raises:
            AdapterNotFoundError: this layer does not have it.
        """
        if not self.has_factors(name):
            raise AdapterNotFoundError(f"Adapter {name} does not exist")
        state = list(self.factor_state(name).values())
        magnitude = None
        if name in self.lora_magnitude_vector:
            magnitude = cast(MagnitudeVector, self.lora_magnitude_vector[name]).weight.flatten()
        bias = state[2] if len(state) > 2 else None
        return LoraTensors(state[0].flatten(1), state[1].flatten(1), bias, magnitude)

    def effective(self, name: str) -> LoraTensors:
        """As `tensors`, less what the initialisation took out: s·B·A - s·B0·A0 as one product, and no views then."""
        part = self.tensors(name)
        if name not in self.removed:
            return part
        gone = cast(Any, self.removed[name])
        lora_a, lora_b = torch.cat([part.lora_A, gone.lora_A]), torch.cat([part.lora_B, -gone.lora_B], dim=1)
        return LoraTensors(lora_a, lora_b, part.bias, part.magnitude)

    def folded(self, key: Key) -> Folded | None:
        """The adapter folded afresh from its parameters, differentiable (`AdapterSource`)."""
        if not isinstance(key, str) or not (self.has_factors(key) or key in self.trained_bias):
            return None
        bias = self._bias_change(key)
        if not self.has_factors(key):
            like = cast(Tensor, bias)
            return Folded(like.new_empty(0, self.in_features), like.new_empty(0, self.out_features), None, bias)
        part = self.effective(key)
        out = fold(part, self.scaling[key], None if part.magnitude is None else self.matrix())
        dropout = self.lora_dropout[key] if key in self.lora_dropout else None  # noqa: SIM401 - a ModuleDict has no get
        return Folded(out.a, out.b, out.gain, bias, dropout)

    def base_part(self, x: Tensor) -> Tensor:
        """W0·x without the bias, [tokens, O], for inputs other than the layer's own (DoRA under dropout)."""
        return self.shrink(x, self.matrix().to(x.dtype))

    def get_delta_weight(self, name: str) -> Tensor:
        """What the adapter adds to the base weight, in its stored form: s·B·A, for DoRA with its gain."""
        return self.weight_of(self.delta_matrix(name))

    def delta_matrix(self, name: str) -> Tensor:
        """[O, I]: s·B·A, or diag(gain)·(W0 + s·B·A) - W0 for DoRA."""
        part = self.effective(name)
        return weight_change(part, self.scaling[name], None if part.magnitude is None else self.matrix())

    def merged_matrix(self, weights: Mapping[str, float]) -> Tensor | None:
        """[O, I], half precision as float32: the base weight and so much of each adapter; None if none changes it."""
        matrix = None
        for name, weight in weights.items():
            if self.has_factors(name):
                if matrix is None:
                    matrix = self.matrix().detach()
                    matrix = matrix.float() if matrix.dtype in HALF else matrix
                matrix = self._plus_delta(matrix, name, weight)
        return matrix

    def merged_parameters(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        bias = None if self.bias is None else self.bias.detach()
        for name, weight in weights.items():
            change = self._bias_change(name)
            if change is not None:
                if bias is None:
                    raise UnsupportedError(
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
                    )
                bias = out["bias"] = (bias + weight * change).to(self.bias.dtype)
        matrix = self.merged_matrix(weights)
        if matrix is not None:
            out["weight"] = self.stored(matrix)
        return out

    def _plus_delta(self, matrix: Tensor, name: str, weight: float) -> Tensor:
        """matrix [O, I] + weight · the adapter's change; in one pass without DoRA."""
        if name in self.lora_magnitude_vector or getattr(self.base_layer, "groups", 1) > 1:
            return matrix + weight * self.delta_matrix(name)
        part = self.effective(name)
        return torch.addmm(matrix, part.lora_B.to(matrix), part.lora_A.to(matrix), alpha=weight * self.scaling[name])

    def _bias_change(self, name: str) -> Tensor | None:
        """What the adapter adds to the layer's output as a constant, [O]."""
        trained = self.trained_bias[name] - self.bias if name in self.trained_bias else None
        own = self.tensors(name).bias if self.has_factors(name) else None
        if own is None:
            return trained
        return own * self.scaling[name] if trained is None else own * self.scaling[name] + trained

    def stored(self, matrix: Tensor) -> Tensor:
        """[O, I] in the form, dtype and quantization of the base weight."""
        if is_quantized(self.base_layer):
            return quantized_like(self.base_layer, matrix)
        return self.weight_of(matrix).to(self.weight.dtype).contiguous()

    def extra_repr(self) -> str:
        return f"adapters={sorted(self.scaling)}" if self.slots is None else "adapters in slots"


class LoraLinear(LoraLayer):
    """A linear layer with adapters: nn.Linear, a subclass of it (quantized ones among them), or Conv1D."""

    @staticmethod
    def shape_of(module: nn.Module) -> tuple[int, int]:
        return linear_shape(module)

    def matrix(self) -> Tensor:
        return linear_weight(self.base_layer)

    def weight_of(self, matrix: Tensor) -> Tensor:
        return matrix.T if is_conv1d(self.base_layer) else matrix

    def make_factors(self, r: int, *, bias: bool) -> tuple[nn.Module, nn.Module]:
        return nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=bias)

    def shrink(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.shared is not None and not torch.is_grad_enabled():
            return self.shared.output(self, x)
        return super().forward(x, *args, **kwargs)

    def adapt(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        rows = y.reshape(-1, y.shape[-1])
        inputs = x.reshape(-1, x.shape[-1])
        return apply_rows(rows, inputs, self.source(), route, self.bias, self.shrink, self.base_part).view(y.shape)
