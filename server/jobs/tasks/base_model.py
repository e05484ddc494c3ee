"""The base model as a job sees it: its structure, with weights that are read from the files where they are touched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.layer import is_conv1d
from lora_core.quant_files import DequantizedTensors, has_quantized_weights
from lora_core.tensor_folder import TensorFolder
from server.errors import InvalidRequestError
from server.gguf import MARK
from server.jobs.original import quantization_method

__all__ = ["OpenBase", "base_tensors", "file_keys", "open_base", "quantization_of", "read_base"]


class OpenBase(NamedTuple):
    """A base and its files.

    Attributes:
        model: in evaluation mode; its parameters are views of the files, and layers that bitsandbytes has quantized are
            its own.
        tensors: by the files' keys, in floating point: what is quantized is dequantized where it is asked for.
        keys: of the files, by parameter name; parameters that are tied to others may be missing.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]


def open_base(folder: Path) -> nn.Module:
    """The model of `read_base`."""
    return read_base(folder).model


def base_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of `read_base`."""
    tensors = TensorFolder(folder)
    return read_base(folder).tensors if has_quantized_weights(tensors) else tensors


def read_base(folder: Path) -> OpenBase:
    """Open a model without making a copy of its weights.

    Raises:
        InvalidRequestError: code `not_supported`, the files hold the weights in another form than the model, and not in
            bitsandbytes'.
        CheckpointError: there are no safetensors files.
        UnsupportedError: they are quantized, and bitsandbytes is not installed or cannot read them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - seconds to import; some jobs do without

    method = quantization_method(folder)
    if method not in (None, "bitsandbytes") and not (folder / MARK).is_file():
        raise InvalidRequestError(
            f"the base's files are quantized by {method}, in a form that jobs do not read", code="not_supported"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    tensors: Mapping[str, Tensor] = TensorFolder(folder)
    keys = file_keys(model, tensors)
    if has_quantized_weights(tensors):
        transposed = [key for name, key in keys.items() if is_conv1d(model.get_submodule(name.rpartition(".")[0]))]
        tensors = DequantizedTensors(tensors, config.dtype or torch.float32, transposed)
    for name, key in keys.items():
        module, _, attribute = name.rpartition(".")
        if isinstance(tensors, DequantizedTensors) and tensors.is_quantized(key):
            model.set_submodule(module, tensors.layer(key, model.get_submodule(module).bias))
            continue
        value = tensors[key]
        if value.shape != model.get_parameter(name).shape:
            raise InvalidRequestError(f"the base's files hold {name!r} in another shape", code="not_supported")
        setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    missing = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if missing is not None:
        raise InvalidRequestError(f"the base's files do not hold {missing!r} as it is", code="not_supported")
    _compute_buffers(model)
    return OpenBase(model.eval(), tensors, keys)


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
