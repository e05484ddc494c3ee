"""The base model as a job sees it: its structure, with weights that are read from the files where they are touched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_core.tensor_folder import TensorFolder
from server.errors import InvalidRequestError

__all__ = ["file_keys", "open_base", "quantization_of"]


def open_base(folder: Path) -> nn.Module:
    """A model in evaluation mode whose parameters are views of its safetensors files: no copy of them is made.

    Raises:
        InvalidRequestError: code `not_supported`, the files hold the weights in another form than the model.
        CheckpointError: there are no safetensors files.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    tensors = TensorFolder(folder)
    for name, key in file_keys(model, tensors).items():
        module, _, attribute = name.rpartition(".")
        value = tensors[key]
        if value.shape != model.get_parameter(name).shape:
            raise InvalidRequestError(f"the base's files hold {name!r} in another shape", code="not_supported")
        setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    missing = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if missing is not None:
        raise InvalidRequestError(f"the base's files do not hold {missing!r} as it is", code="not_supported")
    _compute_buffers(model)
    return model.eval()


def _compute_buffers(model: Any) -> None:
    """Buffers that no file holds, such as rotary frequencies: by the model's own initialisation, which leaves be what
    is marked as initialised."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        pending = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in pending.items():
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        if pending:
            model._init_weights(module)


def file_keys(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Key in the files by parameter name; parameters that are tied to others may be missing."""
    prefix = f"{model.base_model_prefix}."
    keys = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        spellings = (name, name.removeprefix(prefix), prefix + name)
        found = next((spelling for spelling in spellings if spelling in tensors), None)
        if found is not None:
            keys[name] = found
    return keys


def quantization_of(task: Mapping[str, Any]) -> tuple[str, bool, torch.dtype]:
    """How the served base holds its linear layers: the kind, whether scales are quantized too, the dtype before."""
    found = task["quantization"]
    return found["kind"], found["double_quant"], getattr(torch, found["dtype"])
