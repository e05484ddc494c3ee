"""A model whose adapters live in slots: what a server needs of this package."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lora_core.checkpoint import check_base_weight, check_shape
from lora_core.errors import TargetError
from lora_core.layer import LoraLinear, is_linear, linear_weight
from lora_core.maths import Folded, fold
from lora_core.routing import Router
from lora_core.slots import LayerSlots, SlotBank
from lora_core.targets import match_targets, output_embedding_name
from lora_core.weights import AdapterWeights

__all__ = ["attach_slots", "fold_adapter", "wrap_linears"]


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
        check_shape(target.name, part, (layer.out_features, layer.in_features))
        check_base_weight(target.name, adapter.base_weights.get(target.name), layer.base_layer)
        part = part.map(torch.Tensor.float)
        weight = None if part.magnitude is None else linear_weight(layer.base_layer).detach().cpu()
        folded = fold(part, target.scaling, weight).to(dtype)
        if not all(bool(torch.isfinite(t).all()) for t in folded.tensors()):
            raise TargetError(f"module {target.name!r} is not finite in {dtype}", code="adapter_not_finite")
        out[target.name] = folded
    return out
