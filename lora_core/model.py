"""LoraModel: a base model with adapters in it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.checkpoint import load_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.errors import AdapterNotFoundError, ConfigError, TargetError
from lora_core.layer import LoraLinear, is_linear, linear_shape, linear_weight
from lora_core.maths import Folded, fold
from lora_core.routing import Route, Router
from lora_core.slots import LayerSlots, SlotBank
from lora_core.targets import match_targets, output_embedding_name, resolve_targets
from lora_core.weights import AdapterWeights, LoraTensors

__all__ = ["LoraModel", "attach_slots", "fold_adapter", "wrap_linears"]


def wrap_linears(model: nn.Module, router: Router, names: Iterable[str] | None = None) -> dict[str, LoraLinear]:
    """Put a LoraLinear in the place of linear layers of `model`, in place.

    Args:
        names: dotted names of the layers; all linear layers by default. One that is wrapped already stays as it is.

    Returns:
        The wrapped layers by name.
    """
    head = output_embedding_name(model)
    if names is None:
        names = [n for n, m in model.named_modules() if is_linear(m) and not n.endswith(".base_layer")]
    out = {}
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, LoraLinear):
            module = LoraLinear(module, router, is_head=name == head)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        out[name] = module
    return out


def attach_slots(layers: Mapping[str, LoraLinear], max_slots: int, *, dtype: torch.dtype) -> SlotBank:
    """Give every layer slots for `max_slots` adapters, held in `dtype`; memory is taken as adapters come."""
    slots = {
        name: LayerSlots(layer.in_features, layer.out_features, max_slots, dtype=dtype, device=layer.device)
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer.slots = slots[name]
    return SlotBank(slots, max_slots)


def fold_adapter(adapter: AdapterWeights, layers: Mapping[str, LoraLinear], *, dtype: torch.dtype) -> dict[str, Folded]:
    """Fold a whole adapter for slots, in float32, then cast to `dtype`.

    Raises:
        TargetError: a module is not in `layers` or has another shape there, or folding overflows `dtype`.
    """
    out = {}
    for target in match_targets(adapter.config, adapter.modules):
        layer, part = layers.get(target.name), adapter.modules[target.name]
        if layer is None:
            raise TargetError(f"the base model has no linear layer {target.name!r}")
        _check_shape(target.name, part, layer)
        _check_base_weight(adapter, target.name, layer.base_layer)
        part = part.map(torch.Tensor.float)
        weight = None if part.magnitude is None else linear_weight(layer.base_layer).detach().cpu()
        folded = fold(part, target.scaling, weight).to(dtype)
        if not all(bool(torch.isfinite(t).all()) for t in folded.tensors()):
            raise TargetError(f"module {target.name!r} is not finite in {dtype}", code="adapter_not_finite")
        out[target.name] = folded
    return out


def _check_shape(name: str, part: LoraTensors, layer: nn.Module) -> None:
    wanted, shape = linear_shape(layer), (part.lora_B.shape[0], part.lora_A.shape[1])
    if shape != wanted:
        raise TargetError(
            f"module {name!r}: the adapter is for a layer {list(shape)}, the base model's is {list(wanted)}"
        )


def _check_base_weight(adapter: AdapterWeights, name: str, layer: nn.Module) -> None:
    """The copy of a base weight in an adapter's file must be the base model's own, rounded to the model's dtype."""
    saved = adapter.base_weights.get(name)
    if saved is None:
        return
    own = linear_weight(layer)
    if not torch.equal(saved.to(own), own):
        raise TargetError(
            f"module {name!r}: the adapter's file holds a base weight that is not this base model's; "
            "it was trained on another model, or on one with a resized vocabulary"
        )


class LoraModel(nn.Module):
    """A base model with trainable adapters, changed in place.

    Args:
        model: any module with linear layers.
        config: of the first adapter, or None to add adapters later.
        adapter_name: its name.

    Attributes:
        peft_config: configuration by adapter name.
        active_adapters: names of the adapters that `forward` applies, each with weight 1.
    """

    def __init__(self, model: nn.Module, config: LoraConfig | None = None, adapter_name: str = "default") -> None:
        super().__init__()
        self.model = model
        self.router = Router()
        self.layers: dict[str, LoraLinear] = {}
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = []
        self.requires_grad_(False)
        if config is not None:
            self.add_adapter(adapter_name, config)
            self.set_adapter(adapter_name)

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Create an adapter's parameters; the active adapters stay as they are.

        Raises:
            ConfigError: the name is taken or holds a dot.
            TargetError: the configuration matches nothing in the model.
        """
        if adapter_name in self.peft_config:
            raise ConfigError(f"Adapter with name '{adapter_name}' already exists.")
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise ConfigError("adapter names may not be empty, contain a dot or be an attribute of nn.ModuleDict")
        targets = resolve_targets(config, self.model)
        layers = wrap_linears(self.model, self.router, [target.name for target in targets])
        for target in targets:
            layers[target.name].add_adapter(
                adapter_name,
                target.r,
                target.scaling,
                use_dora=config.use_dora,
                lora_bias=config.lora_bias,
                dropout=config.lora_dropout,
            )
        self.layers |= layers
        self.peft_config[adapter_name] = config
        self._freeze_inactive()

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters, and no others, active and trainable.

        Raises:
            AdapterNotFoundError: one does not exist.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._require(name)
        self.active_adapters = names
        self._freeze_inactive()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterNotFoundError: it does not exist.
        """
        self._require(adapter_name)
        for layer in self.layers.values():
            layer.delete(adapter_name)
        del self.peft_config[adapter_name]
        self.set_adapter([name for name in self.active_adapters if name != adapter_name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.router.use(Route.uniform(dict.fromkeys(self.active_adapters, 1.0))):
            return self.model(*args, **kwargs)

    def adapter_weights(self, adapter_name: str = "default") -> AdapterWeights:
        """The adapter's current parameters."""
        self._require(adapter_name)
        layers = {name: layer for name, layer in self.layers.items() if adapter_name in layer.lora_A}
        modules = {name: layer.tensors(adapter_name) for name, layer in layers.items()}
        base_weights = {name: layer.weight for name, layer in layers.items() if layer.is_head}
        return AdapterWeights(self.peft_config[adapter_name], modules, base_weights)

    def save_pretrained(self, folder: str | Path, adapter_name: str = "default") -> None:
        """Write a PEFT adapter folder."""
        save_adapter(self.adapter_weights(adapter_name), folder)

    def load_adapter(self, folder: str | Path, adapter_name: str) -> None:
        """Add an adapter from a PEFT folder; inactive until `set_adapter`.

        Raises:
            LoraError: the folder is no valid adapter, or does not fit the model.
        """
        adapter = load_adapter(folder)
        targets = {target.name for target in resolve_targets(adapter.config, self.model)}
        if targets != set(adapter.modules):
            odd = min(targets ^ set(adapter.modules))
            raise TargetError(f"the adapter's file and configuration disagree about module {odd!r}")
        for name, part in adapter.modules.items():
            _check_shape(name, part, self.model.get_submodule(name))
            _check_base_weight(adapter, name, self.model.get_submodule(name))
        self.add_adapter(adapter_name, adapter.config)
        with torch.no_grad():
            for name, part in adapter.modules.items():
                for own, saved in zip(self.layers[name].tensors(adapter_name).tensors(), part.tensors(), strict=True):
                    own.copy_(saved)

    def _freeze_inactive(self) -> None:
        for layer in self.layers.values():
            for parts in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                for name, part in parts.items():
                    part.requires_grad_(name in self.active_adapters)

    def _require(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterNotFoundError(f"Adapter {name} does not exist")
