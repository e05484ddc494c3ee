"""Which form of weights a model is loaded in: its own, or 4 or 8 bits by bitsandbytes while it is read.

transformers reads one tensor at a time and quantizes it before the next, so the whole model is never held in full
precision. A checkpoint that says itself how it is quantized is loaded that way; asking for another way is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from lora_core.quant import quiet_bitsandbytes
from server.errors import InvalidRequestError

__all__ = ["Quantization", "checkpoint_quantization", "loading_options"]

NEEDED_PACKAGES = ("bitsandbytes", "accelerate")
DEVICES = frozenset({"cpu", "cuda"})
FOUR_BITS = frozenset({"nf4", "fp4"})


@dataclass(frozen=True, slots=True)
class Quantization:
    """How to quantize while loading.

    Attributes:
        kind: of the linear layers but the head; "none" leaves a checkpoint as it is, quantized or not.
        double_quant: with 4 bits, quantize their scales as well (0.4 bits a weight less on a GPU).
    """

    kind: Literal["none", "nf4", "fp4", "int8"] = "none"
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
    options: dict[str, Any] = {"device_map": {"": str(device)}}
    if wanted in FOUR_BITS or wanted == "int8":
        _check_bitsandbytes(wanted, device)
        if own is None:
            options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    return options


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
