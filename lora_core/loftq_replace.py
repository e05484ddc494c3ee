"""LoftQ for a model that is quantized already: adapters that give back what quantizing took."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core.errors import AdapterNotFoundError, CheckpointError, TargetError
from lora_core.layer import LoraLayer
from lora_core.loftq import low_rank
from lora_core.quant import dequantized_weight, is_quantized
from lora_core.tensor_folder import TensorFolder, find_weight

if TYPE_CHECKING:
    from lora_core.model import LoraModel

__all__ = ["replace_lora_weights_loftq"]


def replace_lora_weights_loftq(
    model: "LoraModel",
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Set an adapter's A and B on every quantized layer so that s·B·A is the best rank-r part of W - Q.

    One layer's full weight W is read at a time. Differs from PEFT in that the scaling s is divided out of the factors:
    PEFT's make up for the loss only where lora_alpha equals r. Also, 8-bit layers take part, keys are found with and
    without the base model's prefix in single files and shards alike, and DoRA's magnitude is set to the row norms of
    Q + s·B·A, so that its gain begins at one. An error of any kind puts all layers back.

    Args:
        model_path: the unquantized model's folder, or its safetensors file; by default where the model came from.
        callback: called with the model and a module's name after that module is replaced; where the answer is false,
            the module's former tensors come back, bit for bit.

    Raises:
        AdapterNotFoundError: no such adapter.
        TargetError: no layer of it is quantized, or the files have no weight for one, or one of another shape.
        CheckpointError: there are no such files.
    """
    if adapter_name not in model.peft_config:
        raise AdapterNotFoundError(f"Adapter {adapter_name} does not exist")
    layers = {
        name: layer
        for name, layer in model.layers.items()
        if layer.has_factors(adapter_name) and is_quantized(layer.base_layer)
    }
    if not layers:
        raise TargetError("No bnb LoRA module found on the model")
    tensors = TensorFolder(_source_folder(model.model) if model_path is None else model_path)
    prefix = getattr(model.model, "base_model_prefix", "")
    renames = getattr(model.model, "_checkpoint_conversion_mapping", None) or {}
    before: dict[str, list[Tensor]] = {}
    try:
        for name, layer in layers.items():
            before[name] = [tensor.detach().clone() for tensor in layer.tensors(adapter_name).tensors()]
            _replace(layer, adapter_name, find_weight(tensors, name, prefix=prefix, renames=renames))
            if callback is not None and not callback(model, name):
                _restore(layer, adapter_name, before[name])
    except BaseException:
        for name, values in before.items():
            _restore(layers[name], adapter_name, values)
        raise


def _source_folder(model: nn.Module) -> str:
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path or not Path(path).is_dir():
        raise CheckpointError(
            f"The model does not say from which local folder it came (`config._name_or_path` is {path!r}): pass "
            "`model_path`, the folder of the unquantized model's safetensors files"
        )
    return str(path)


@torch.no_grad()
def _replace(layer: LoraLayer, adapter_name: str, weight: Tensor) -> None:
    part, scaling = layer.tensors(adapter_name), layer.scaling[adapter_name]
    quantized = dequantized_weight(layer.base_layer)
    if weight.shape != quantized.shape:
        raise TargetError(f"the files' weight is {list(weight.shape)}, the quantized one {list(quantized.shape)}")
    lora_a, lora_b = low_rank(weight.to(quantized) - quantized, part.rank, scaling)
    part.lora_A.copy_(lora_a)
    part.lora_B.copy_(lora_b)
    layer.reset_magnitude(adapter_name)


@torch.no_grad()
def _restore(layer: LoraLayer, adapter_name: str, values: list[Tensor]) -> None:
    for own, value in zip(layer.tensors(adapter_name).tensors(), values, strict=True):
        own.copy_(value)
