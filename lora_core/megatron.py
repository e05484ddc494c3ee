"""LoraParallelLinear: Megatron-LM's tensor-parallel linear layers with adapters.

The weight is split over ranks, by outputs (ColumnParallelLinear) or by inputs (RowParallelLinear), and so is one
factor: B of a column layer and A of a row layer, which are parallel layers of the same class; the other factor is whole
on every rank. Each rank's ΔW is then the change of its own part of the weight.

Nothing is imported by a name that a configuration gives: the classes and their settings are those of the layer that is
in the model, so a file can never make this package import anything.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.config import LoraConfig
from lora_core.errors import UnsupportedError
from lora_core.layer import LoraLayer
from lora_core.routing import Route, Router

__all__ = ["LoraParallelLinear", "check_megatron", "is_parallel_linear"]

PREFIX = "megatron."
COLUMN, ROW = "ColumnParallelLinear", "RowParallelLinear"


def is_parallel_linear(module: nn.Module) -> bool:
    """True for Megatron's two parallel linear layers and subclasses of them."""
    return _parallel_class(module) is not None


def check_megatron(config: LoraConfig, bases: Mapping[str, nn.Module]) -> None:
    """Refuse what cannot be done with the modules that a configuration targets.

    Raises:
        UnsupportedError: DoRA or `lora_bias` on a parallel layer, or `megatron_config` for a model without any.
    """
    parallel = next((name for name, base in bases.items() if is_parallel_linear(base)), None)
    if parallel is None:
        if config.megatron_config is not None:
            raise UnsupportedError(
                f"`megatron_config` is set, but none of the targeted modules is a {COLUMN} or {ROW} of Megatron: is "
                f"`{config.megatron_core}` installed, and the model built with it?"
            )
        return
    for field in ("use_dora", "lora_bias"):
        if getattr(config, field):
            raise UnsupportedError(f"{parallel!r} is a parallel layer of Megatron, which does not support `{field}`")


class LoraParallelLinear(LoraLayer):
    """A parallel layer with adapters; it returns (output, bias), as Megatron's do.

    One mix of adapters applies to a whole batch: Megatron's batches have the sequence first, so rows cannot be told
    apart here.

    Attributes:
        megatron_config: `LoraConfig.megatron_config`, in place of the base layer's own settings.
    """

    def __init__(self, base_layer: nn.Module, router: Router, *, is_head: bool = False) -> None:
        super().__init__(base_layer, router, is_head=is_head)
        self.megatron_config: Mapping[str, Any] | None = None

    @staticmethod
    def shape_of(module: nn.Module) -> tuple[int, int]:
        return cast(int, module.output_size), cast(int, module.input_size)

    def matrix(self) -> Tensor:
        return cast(Tensor, self.base_layer.weight)

    def weight_of(self, matrix: Tensor) -> Tensor:
        return matrix

    @property
    def adapter_dtype(self) -> torch.dtype:
        return torch.float32

    def make_factors(self, r: int, *, bias: bool) -> tuple[nn.Module, nn.Module]:
        assert not bias
        base: Any = self.base_layer
        own = base.config
        config = copy.copy(own) if self.megatron_config is None else type(own)(**self.megatron_config)
        config.params_dtype = self.adapter_dtype
        init = getattr(config, "init_method", None) or nn.init.xavier_normal_
        parallel: Any = _parallel_class(base)
        if parallel.__name__ == ROW:
            options = {"input_is_parallel": base.input_is_parallel, "skip_bias_add": True}
            a = parallel(self.in_features, r, config=config, init_method=init, bias=False, **options)
            return a, nn.Linear(r, self.out_features, bias=False, dtype=self.adapter_dtype)
        a = nn.Linear(self.in_features, r, bias=False, dtype=self.adapter_dtype)
        options = {"gather_output": base.gather_output}
        return a, parallel(r, self.out_features, config=config, init_method=init, bias=False, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y, bias = self.base_layer(x, *args, **kwargs)
        route = self.route
        return (y if route is None else self.adapt(y, x, route)), bias

    def adapt(self, y: Tensor, x: Tensor, route: Route) -> Tensor:
        weights = route.runs[0].weights
        if any(run.weights != weights for run in route.runs):
            raise UnsupportedError("rows of one batch cannot have different adapters on Megatron's parallel layers")
        total = y
        for name, weight in weights.items():
            if not self.has_factors(name):
                continue
            h = x.to(self.adapter_dtype)
            if name in self.lora_dropout:
                h = self.lora_dropout[name](h)
            change = _output(self.lora_B[name](_output(self.lora_A[name](h))))
            total = total + change * (weight * self.scaling[name])
        return total.to(y.dtype)


def _parallel_class(module: nn.Module) -> type | None:
    """Megatron's own class among the module's: subclasses may be built in another way."""
    for kind in type(module).__mro__:
        if kind.__name__ in (COLUMN, ROW) and kind.__module__.startswith(PREFIX):
            return kind
    return None


def _output(result: Any) -> Tensor:
    """Megatron's layers give a bias beside their output, plain ones do not."""
    return cast(Tensor, result[0] if isinstance(result, tuple) else result)
