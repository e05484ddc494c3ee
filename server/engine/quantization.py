"""Which form of weights a model is loaded in: its own, 4 or 8 bits by bitsandbytes while it is read, or `int4`.

With bitsandbytes transformers reads one tensor at a time and quantizes it before the next, so the whole model is never
held in full precision. A checkpoint that says itself how it is quantized is loaded that way; asking for another way is
an error. `int4` is for speed on a CPU: the loaded weights are rounded, and with C inputs are too, as they come
(`lora_core.packing.Int4Weight`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_core.layer import is_conv1d, linear_weight
from lora_core.packing import can_be_int4, has_int4, round_to_int4
from lora_core.quant import quiet_bitsandbytes
from server.errors import InvalidRequestError

__all__ = ["OwnLinear", "Quantization", "checkpoint_quantization", "loading_options", "round_weights", "settle_layers"]

NEEDED_PACKAGES = ("bitsandbytes", "accelerate")
# By a checkpoint's method: what Python imports, and what pip installs for it. transformers names others' itself.
PACKAGES_OF_METHODS = {
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "torchao": {"torchao": "torchao"},
}
DEVICES = frozenset({"cpu", "cuda"})
FOUR_BITS = frozenset({"nf4", "fp4"})


@dataclass(frozen=True, slots=True)
class Quantization:
    """How to quantize while loading.

    Attributes:
        kind: of the linear layers but the head; "none" leaves a checkpoint as it is, quantized or not.
        double_quant: with 4 bits, quantize their scales as well (0.4 bits a weight less on a GPU).
    """

    kind: Literal["none", "nf4", "fp4", "int8", "int4"] = "none"
    double_quant: bool = False


def checkpoint_quantization(config: Any) -> str | None:
    """What a model's configuration says of its files: "nf4", "fp4", "int8", another method's name, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    options: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = str(getattr(options.get("quant_method"), "value", options.get("quant_method") or "bitsandbytes"))
    if method.partition("_")[0] != "bitsandbytes":
        return method
    return str(options.get("bnb_4bit_quant_type", "fp4")) if options.get("load_in_4bit") else "int8"


def loading_options(
    config: Any, quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model with this configuration; none for weights in floating point.

    Raises:
        InvalidRequestError: `quantization_conflict`, the files are quantized in another way; `quantization_missing`, a
            package is not installed; `quantization_unsupported`, bitsandbytes does not compute on the device.
    """
    own = checkpoint_quantization(config)
    kind = quantization.kind
    if own is not None and kind not in ("none", own):
        raise InvalidRequestError(
            f"the model's files are quantized already ({own}), which `--quantization {kind}` cannot change: leave the "
            "flag out, or take the model in full precision",
            code="quantization_conflict",
        )
    wanted = own or kind
    if wanted == "none":
        return {}
    if kind == "int4":
        _check_int4(dtype, device)
        return {}
    options: dict[str, Any] = {"device_map": {"": str(device)}}
    _check_method(wanted)
    if wanted in FOUR_BITS or wanted == "int8":
        _check_bitsandbytes(wanted, device)
        if own is None:
            options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    return options


def round_weights(model: nn.Module) -> None:
    """Give the linear layers but the head, in place, the numbers that `int4` computes with."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for module in model.modules():
        if module is head or not (type(module) is nn.Linear or is_conv1d(module)):
            continue
        weight = linear_weight(module)
        if can_be_int4(weight):
            rounded = round_to_int4(weight)
            module.get_parameter("weight").data = rounded if type(module) is nn.Linear else rounded.T.contiguous()


class OwnLinear(nn.Linear):
    """A linear layer whose forward is its own, as one that rounds its inputs: not to be computed from its weight."""


def settle_layers(model: nn.Module) -> None:
    """Give the layers of compressed-tensors, in place, the form that they have from their first forward pass on.

    The package decompresses them then, to the model's dtype. Of layers with rounded weights only nothing remains but a
    linear layer of those numbers; others, which round their inputs as well, stay what they are. Models of other kinds
    are left alone.

    Raises:
        InvalidRequestError: `quantization_unsupported`, the weights are in the files as they were before rounding.
    """
    layers = [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
    if not layers or checkpoint_quantization(getattr(model, "config", None)) != "compressed-tensors":
        return
    loaded: Any = model
    if hasattr(loaded, "ct_decompress_hook"):
        loaded.hf_quantizer.compressor.decompress_model(model)
    for layer in layers:
        status = getattr(layer, "quantization_status", None)
        scheme: Any = layer.quantization_scheme
        if type(layer) is not nn.Linear or getattr(status, "value", status) != "decompressed":
            raise InvalidRequestError(
                f"compressed-tensors holds a {type(layer).__name__} as {getattr(status, 'value', status)}: only "
                "compressed linear layers are served",
                code="quantization_unsupported",
            )
        if scheme.input_activations is None and scheme.output_activations is None:
            del layer.forward
        else:
            layer.__class__ = OwnLinear


def _check_method(method: str) -> None:
    missing = [pip for name, pip in PACKAGES_OF_METHODS.get(method, {}).items() if find_spec(name) is None]
    if missing:
        raise InvalidRequestError(
            f"the model's files are quantized ({method}), which needs a package: pip install {' '.join(missing)}",
            code="quantization_missing",
        )


def _check_int4(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu" or dtype != torch.bfloat16 or not has_int4():
        raise InvalidRequestError(
            f"int4 is computed with on CPUs in bfloat16, not on {device.type} in {str(dtype).removeprefix('torch.')}",
            code="quantization_unsupported",
        )


def _check_bitsandbytes(kind: str, device: torch.device) -> None:
    missing = [name for name in NEEDED_PACKAGES if find_spec(name) is None]
    if missing:
        raise InvalidRequestError(
            f"{kind} weights need {' and '.join(missing)}: pip install 'loramux[bnb]'", code="quantization_missing"
        )
    if device.type not in DEVICES:
        raise InvalidRequestError(
            f"{kind} weights are computed with on {' and '.join(sorted(DEVICES))} only, not on {device.type}",
            code="quantization_unsupported",
        )
    quiet_bitsandbytes()


def _bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
