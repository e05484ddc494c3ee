"""LoraParameter: adapters on one parameter of a module, as the stacked weights of MoE experts.

The parameter W is [E, I, O] or [E, O, I] (the module's `is_transposed` tells), or a matrix [O, I] with E = 1. One A and
one B hold all experts' factors; in PEFT's layout A is [E·R, I] with the expert outermost and B is [O, R·E] with the
expert innermost. The change cannot be added to the module's output, so the module runs with W + Σ w·ΔW, once per
distinct mix of adapters in the batch.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_core.adapter_module import AdapterModule, base_of
from lora_core.errors import AdapterNotFoundError, UnsupportedError
from lora_core.layer import HALF
from lora_core.routing import Router
from lora_core.rows import call_by_rows
from lora_core.weights import LoraTensors

__all__ = ["LoraParameter"]


class LoraParameter(AdapterModule):
    """A module with adapters on its parameter `parameter_name`.

    Several parameters of one module are wrapped one around the other, in the order in which the module registers them.

    Raises:
        UnsupportedError: the parameter has neither two nor three dimensions.
    """

    def __init__(self, base_layer: nn.Module, router: Router, parameter_name: str) -> None:
        super().__init__(router)
        self.base_layer = base_layer
        self.parameter_name = parameter_name
        shape = self.parameter.shape
        if len(shape) not in (2, 3):
            raise UnsupportedError(f"{parameter_name!r} has {len(shape)} dimensions: only 2 and 3 can have an adapter")
        self.num_experts = shape[0] if len(shape) == 3 else 1
        self.inputs_first = len(shape) == 3 and bool(getattr(base_of(self), "is_transposed", False))
        in_features, out_features = shape[-2:] if self.inputs_first else (shape[-1], shape[-2])
        self.in_features, self.out_features = in_features, out_features
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.slots: dict[Any, tuple[LoraTensors, float]] = {}

    @property
    def parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(base_of(self), self.parameter_name))

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def add_adapter(self, name: str, r: int, lora_alpha: float, scaling: float) -> None:
        """Create an adapter's parameters with PyTorch's own starting values."""
        weight = self.parameter
        dtype = torch.float32 if weight.dtype in HALF else weight.dtype
        rows = r * self.num_experts
        self.lora_A[name] = nn.Linear(self.in_features, rows, bias=False).to(weight.device, dtype)
        self.lora_B[name] = nn.Linear(rows, self.out_features, bias=False).to(weight.device, dtype)
        self.r[name], self.lora_alpha[name], self.scaling[name] = r, lora_alpha, scaling

    @property
    def adapter_names(self) -> set[str]:
        return set(self.scaling)

    def has_factors(self, name: object) -> bool:
        return name in self.scaling

    def state(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.scaling:
            return {}
        parts = {"lora_A": self.lora_A[name], "lora_B": self.lora_B[name]}
        return {f"{part}.weight": module.get_parameter("weight") for part, module in parts.items()}

    def tensors(self, name: str) -> LoraTensors:
        """A [E·R, I] and B [O, R·E].

        Raises:
            AdapterNotFoundError: the parameter does not have it.
        """
        if name not in self.scaling:
            raise AdapterNotFoundError(f"Adapter {name} does not exist")
        return LoraTensors(*self.state(name).values())

    def delete(self, name: str) -> None:
        if name in self.scaling:
            del self.lora_A[name], self.lora_B[name]
            for numbers in (self.scaling, self.r, self.lora_alpha):
                del numbers[name]

    def get_delta_weight(self, key: Any) -> Tensor:
        """s·B·A for every expert, in the parameter's shape."""
        part, scaling = self.slots[key] if key in self.slots else (self.tensors(key), self.scaling[key])
        a = part.lora_A.unflatten(0, (self.num_experts, -1))
        b = part.lora_B.unflatten(1, (-1, self.num_experts))
        delta = torch.einsum("ore,eri->eio" if self.inputs_first else "ore,eri->eoi", b, a) * scaling
        return delta.view(self.parameter.shape)

    def merged_parameters(self, weights: Mapping[Any, float]) -> dict[str, Tensor]:
        own = {key: weight for key, weight in weights.items() if self._knows(key)}
        if not own:
            return {}
        weight = self.parameter
        deltas = [factor * self.get_delta_weight(key) for key, factor in own.items()]
        return {self.parameter_name: (weight + sum(deltas)).to(weight.dtype)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.route
        if route is None:
            return self.base_layer(*args, **kwargs)
        return call_by_rows(self.router, route, self._knows, self._call, *args, **kwargs)

    def _knows(self, key: Any) -> bool:
        return key in self.slots or key in self.scaling

    def _call(self, weights: Mapping[Any, float], *args: Any, **kwargs: Any) -> Any:
        new = self.merged_parameters(weights)
        if not new:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, {self._path(): new[self.parameter_name]}, args, kwargs)

    def _path(self) -> str:
        """The parameter's name from the wrapped module on."""
        depth, module = 0, self.base_layer
        while isinstance(module, AdapterModule):
            depth, module = depth + 1, module.get_base_layer()
        return "base_layer." * depth + self.parameter_name

    def extra_repr(self) -> str:
        return f"parameter={self.parameter_name!r}, adapters={sorted(self.scaling)}"
