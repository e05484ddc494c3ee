"""An adapter's file into a LoraModel."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lora_core.adapter_module import base_of
from lora_core.checkpoint import check_base_weight
from lora_core.config import LoraConfig
from lora_core.convert import initial_factors, subtract_mutated_init, subtracted_config
from lora_core.errors import TargetError, UnsupportedError
from lora_core.quant import is_quantized
from lora_core.state import adapter_state, base_embeddings
from lora_core.targets import resolve_targets

if TYPE_CHECKING:
    from lora_core.model import LoraModel

__all__ = ["fill_adapter", "plain_adapter"]


def plain_adapter(
    model: "LoraModel", config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as one of the model's own base: itself, or what it is after its changed base is taken out.

    Raises:
        UnsupportedError: code `adapter_needs_conversion`, the changed base cannot be computed again from this model.
    """
    if not config.changes_base:
        return config, tensors
    names = [target.name for target in resolve_targets(config, model.model)]
    layers = {name: base_of(model.model.get_submodule(name)) for name in names}
    is_changed = any(other.changes_base for other in model.peft_config.values())
    if is_changed or any(is_quantized(layer) for layer in layers.values()):
        raise UnsupportedError(
            f"`init_lora_weights` is {config.init_lora_weights!r}, and the original base weights are not here: convert "
            "the adapter with `lora_core.convert_to_lora`",
            code="adapter_needs_conversion",
        )
    base = {f"{name}.weight": cast(Tensor, layer.weight) for name, layer in layers.items()}
    initial = initial_factors(config, tensors, base)
    return subtracted_config(config), subtract_mutated_init(tensors, initial)


@torch.no_grad()
def fill_adapter(model: "LoraModel", name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into a new adapter's parameters.

    Raises:
        TargetError: keys, shapes or saved base weights are not those that the configuration says for this model.
    """
    own = adapter_state(model, name, with_base=False)
    base = base_embeddings(model, name)
    odd = min(set(own) ^ (set(tensors) - {f"{module}.base_layer.weight" for module in base}), default=None)
    if odd is not None:
        raise TargetError(f"the adapter's file and configuration disagree about {odd!r}")
    for key, parameter in own.items():
        if parameter.shape != tensors[key].shape:
            raise TargetError(f"{key!r}: the adapter holds {list(tensors[key].shape)}, not {list(parameter.shape)}")
    for module in base:
        check_base_weight(module, tensors.get(f"{module}.base_layer.weight"), model.layers[module].base_layer)
    for key, parameter in own.items():
        parameter.copy_(tensors[key])
