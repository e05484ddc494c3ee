"""AdapterModule: a module of the base model with the parts of adapters beside it.

The base module stays the object it was. Subclasses say what an adapter's parts are and what they make of the base
module's parameters; merging, freezing, saving and deleting are the same for all of them.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lora_core.errors import LoraError
from lora_core.quant import is_quantized, replace_weight
from lora_core.routing import Route, Router

__all__ = ["AdapterModule", "base_of", "set_parameter"]


def base_of(module: nn.Module) -> nn.Module:
    """The module itself, or what is innermost where adapters wrap it."""
    while isinstance(module, AdapterModule):
        module = module.get_base_layer()
    return module


class AdapterModule(nn.Module):
    """Base of all wrappers.

    Args:
        router: tells which rows want which adapters.
        is_head: the module is the output embedding and runs on `router.head_route`.

    Attributes:
        merged_adapters: adapters whose change is in the base module's parameters at the moment.
    """

    def __init__(self, router: Router, *, is_head: bool = False) -> None:
        super().__init__()
        self.router = router
        self.is_head = is_head
        self.merged_adapters: list[str] = []
        self._originals: dict[str, nn.Parameter] = {}

    @property
    def route(self) -> Route | None:
        """The route of the forward pass under way, or None where nothing is to be added."""
        route = self.router.head_route if self.is_head else self.router.route
        return None if route is None or route.is_base or self.merged_adapters else route

    def get_base_layer(self) -> nn.Module:
        """The module that is wrapped."""
        raise NotImplementedError

    @property
    def adapter_names(self) -> set[str]:
        """Adapters that have a part here."""
        raise NotImplementedError

    def state(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by the end of their keys on disk; empty if this module has no part of it."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Forget an adapter; harmless if it has no part here."""
        raise NotImplementedError

    def merged_parameters(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """New values of the base module's parameters under a weighted sum of adapters, by parameter name."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        return bool(self.state(name))

    def merge(self, names: Iterable[str], *, safe: bool = False) -> None:
        """Put adapters into the base module's parameters, beside those that are there already.

        The old parameters are kept, and new ones take their place: `unmerge` is exact, and a parameter that is shared
        with another module (tied embeddings) keeps its value there.

        Raises:
            LoraError: `safe` and a merged value is NaN or infinite.
        """
        chosen = self.merged_adapters + [n for n in names if self.has(n) and n not in self.merged_adapters]
        if chosen == self.merged_adapters:
            return
        before = self.merged_adapters
        self.unmerge()
        with torch.no_grad():
            new = self.merged_parameters(dict.fromkeys(chosen, 1.0))
        if safe and not all(_is_finite(value) for value in new.values()):
            self.merge(before)
            raise LoraError(f"NaNs detected in the merged weights. The adapter {chosen[-1]} seems to be broken")
        base = base_of(self)
        self._originals = {path: set_parameter(base, path, value) for path, value in new.items()}
        self.merged_adapters = chosen

    def unmerge(self) -> None:
        """Put the original parameters back, bit for bit."""
        base = base_of(self)
        for path, parameter in self._originals.items():
            set_parameter(base, path, parameter)
        self._originals, self.merged_adapters = {}, []


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def set_parameter(module: nn.Module, path: str, value: Tensor) -> nn.Parameter:
    """Give a module another parameter, frozen unless it is one already; returns the former one."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    if name == "weight" and is_quantized(owner):
        return replace_weight(owner, cast(nn.Parameter, value))
    former = owner.get_parameter(name)
    setattr(owner, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False))
    return former
