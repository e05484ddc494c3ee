"""Base weights that are not held in floating point: reading, writing back, training beside them.

Formats: LLM.int8() (Dettmers et al. 2022), NF4 and FP4 (QLoRA, Dettmers et al. 2023). bitsandbytes is known here, in
`quant_files` and in `quant_product` only, and imported where such a weight is met. torchao's tensors tell their numbers
themselves. Layers of other packages (GPTQ, AWQ) compute, and keep their numbers to themselves: they are told by what
the layer makes of each input alone.

A trap on CPUs with AVX512-BF16: the first forward in evaluation mode repacks a 4-bit weight in place, rounding its
scales to bfloat16, after which bitsandbytes' own dequantization returns noise. `keep_layout` prevents it for layers
that carry adapters; `dequantized_weight` also reads a weight that was repacked before. The repacked form is two to four
times as fast with few rows, so a server asks for it, once and before anything reads the weight: `settle_layout`.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError, TargetError, UnsupportedError

__all__ = [
    "dequantized_4bit",
    "dequantized_weight",
    "is_opaque_linear",
    "is_quantized",
    "keep_layout",
    "num_bits",
    "prepare_model_for_kbit_training",
    "quantized_like",
    "quantized_linear",
    "quiet_bitsandbytes",
    "replace_weight",
    "round_trip",
    "scales_of",
    "settle_layout",
]

HALF = (torch.float16, torch.bfloat16)
KINDS = ("nf4", "fp4", "int8")
BLOCK_SIZE = 64  # numbers that share a scale in 4 bits; bitsandbytes' default
# Under which GPTQ, AWQ and compressed-tensors hold what they make of a weight.
OPAQUE_NAMES = ("qweight", "weight_packed")
# Inputs that such a layer is asked for at once.
ASKED_ROWS = 1024
REPACKED_ROWS = 32  # whose nibbles the CPU's kernel takes together


def is_quantized(module: nn.Module) -> bool:
    """True for a layer whose weight is not held in floating point (not for one that waits to be quantized)."""
    weight = getattr(module, "weight", None)
    return num_bits(weight) is not None or _is_torchao(weight) or is_opaque_linear(module)


def is_opaque_linear(module: nn.Module) -> bool:
    """True for a linear layer of a package whose form of weights is not known here."""
    is_linear = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    return is_linear and any(torch.is_tensor(getattr(module, name, None)) for name in OPAQUE_NAMES)


def dequantized_weight(module: nn.Module) -> Tensor:
    """The weight [O, I] that a quantized layer computes with, in float32; the layer stays as it is.

    Raises:
        UnsupportedError: the layer is not one that `is_quantized` knows.
    """
    weight: Any = getattr(module, "weight", None)
    bits = num_bits(weight)
    if _is_torchao(weight):
        return cast(Tensor, weight.dequantize()).float()
    if bits is None and is_opaque_linear(module):
        return _asked_weight(module)
    if bits is None:
        raise UnsupportedError(
            f"the weight of a {type(module).__name__} is in a form that cannot be read, which DoRA and merging need"
        )
    from bitsandbytes import functional as bnb  # noqa: PLC0415 - optional

    if bits == 8:
        return bnb.int8_vectorwise_dequant(weight.data, scales_of(module).to(weight.device)).float()
    return dequantized_4bit(weight.data, weight.quant_state)


def dequantized_4bit(values: Tensor, state: Any) -> Tensor:
    """Packed `values` and bitsandbytes' `QuantState` of them -> [O, I] in float32."""
    from bitsandbytes import functional as bnb  # noqa: PLC0415 - optional

    if getattr(state, "packing_format_for_cpu", False):
        return _dequantize_repacked(values, state)
    return bnb.dequantize_4bit(values, state).float()


def scales_of(module: nn.Module) -> Tensor:
    """The scale of each row [O] of an 8-bit weight, wherever bitsandbytes has it: the first forward moves them."""
    layer = cast(Any, module)
    return cast(Tensor, layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB)


def quantized_like(module: nn.Module, weight: Tensor) -> nn.Parameter:
    """`weight` [O, I] quantized as the layer's own weight is: bits, type, block size, nesting, storage and device.

    The layer keeps its weight until `replace_weight`.

    Raises:
        UnsupportedError: the layer is not quantized by bitsandbytes.
        TargetError: the shape is not the layer's.
    """
    own: Any = getattr(module, "weight", None)
    bits = num_bits(own)
    if bits is None:
        raise UnsupportedError(
            f"the weight of a {type(module).__name__} is not one of bitsandbytes', and others' cannot be written back: "
            "merge into the model in full precision"
        )
    wanted = [cast(Any, module).out_features, cast(Any, module).in_features]
    if list(weight.shape) != wanted:
        raise TargetError(f"a weight of shape {list(weight.shape)} cannot take the place of one of {wanted}")
    import bitsandbytes as bnb  # noqa: PLC0415 - optional

    values = weight.detach().to("cpu", torch.float32)  # both classes quantize when they leave the CPU, or stay on it
    if bits == 8:
        return bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to(own.device)
    state = own.quant_state
    out = bnb.nn.Params4bit(
        values,
        requires_grad=False,
        blocksize=own.blocksize,
        compress_statistics=own.compress_statistics,
        quant_type=own.quant_type,
        quant_storage=own.quant_storage,
    ).to(own.device)
    is_repacked = getattr(state, "packing_format_for_cpu", False)
    out.quant_state.dtype = state.original_dtype if is_repacked else state.dtype
    return out


def round_trip(weight: Tensor, kind: str, *, double_quant: bool = False) -> Tensor:
    """What a weight [O, I] becomes when a server holds it in `kind`: quantized and dequantized, in float32.

    Args:
        weight: in the dtype that the model is loaded in.
        kind: "nf4" or "fp4", with a scale for each 64 numbers, or "int8", with one for each row.
        double_quant: with 4 bits, their scales are quantized as well.

    Raises:
        ConfigError: another kind.
        UnsupportedError: bitsandbytes is not installed.
    """
    bnb = _functional(kind)
    if kind == "int8":
        values, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return bnb.int8_vectorwise_dequant(values, scales).float()
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=kind
    )
    return bnb.dequantize_4bit(packed, state).float()


def quantized_linear(linear: nn.Module, weight: Tensor, kind: str, *, double_quant: bool = False) -> nn.Module:
    """A layer that computes with a quantized `weight` [O, I], in the weight's dtype, and the bias of `linear`.

    Raises:
        ConfigError, UnsupportedError: as `round_trip`.
    """
    _functional(kind)
    import bitsandbytes as bnb  # noqa: PLC0415 - optional

    out_features, in_features = weight.shape
    bias: nn.Parameter | None = getattr(linear, "bias", None)
    values = weight.detach().contiguous()
    out: nn.Module
    if kind == "int8":
        out = bnb.nn.Linear8bitLt(in_features, out_features, bias is not None, has_fp16_weights=False, device="meta")
        out.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to(weight.device)
    else:
        options = {"compress_statistics": double_quant, "quant_type": kind}
        out = bnb.nn.Linear4bit(
            in_features, out_features, bias is not None, compute_dtype=weight.dtype, device="meta", **options
        )
        parameter = bnb.nn.Params4bit(values, requires_grad=False, blocksize=BLOCK_SIZE, module=out, **options)
        out.weight = parameter.to(weight.device)
    if bias is not None:
        out.bias = nn.Parameter(bias.detach(), requires_grad=False)
    keep_layout(out)
    return out.eval()


def _functional(kind: str) -> Any:
    if kind not in KINDS:
        raise ConfigError(f"weights are quantized to {', '.join(KINDS)}, not to {kind!r}")
    try:
        from bitsandbytes import functional  # noqa: PLC0415 - optional
    except ImportError as error:
        raise UnsupportedError("quantized weights need bitsandbytes: pip install 'loramux[bnb]'") from error
    return functional


def replace_weight(module: nn.Module, parameter: nn.Parameter) -> nn.Parameter:
    """Give a quantized layer another quantized weight, from `quantized_like` or from this function.

    Returns:
        The former one. Putting it back restores the layer bit for bit, which requantizing would not.
    """
    layer, new = cast(Any, module), cast(Any, parameter)
    former = layer.weight
    if num_bits(former) == 8:
        # The first forward moves the scales into `state`: give them back, so that the parameter is whole again.
        if former.SCB is None:
            former.SCB = layer.state.SCB
        former.CB = former.data
        layer.state.reset_grads()
        if new.CB is None:
            new.CB = new.data
        layer.weight = new
    else:
        former.module, new.module = None, layer
        layer.weight, layer.quant_state = new, new.quant_state
    return former


def keep_layout(module: nn.Module) -> None:
    """Stop bitsandbytes from repacking this layer's 4-bit weight, so that its numbers stay those of its file.

    Repacking also fails on layers whose number of outputs is no multiple of 32. Any other module is left alone.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        cast(Any, module).support_avx512bf16_for_cpu = False


def settle_layout(module: nn.Module, dtype: torch.dtype) -> bool:
    """Give a layer for inference in `dtype` the layout that is fast there, for good; returns whether it was repacked.

    That is bitsandbytes' own layout for CPUs, where it has a kernel for the layer; its scales are rounded to bfloat16,
    at most by 2^-8 of each, and `dequantized_weight` gives the numbers so rounded. All else keeps what it has.
    """
    keep_layout(module)
    weight: Any = getattr(module, "weight", None)
    if num_bits(weight) != 4 or weight.device.type != "cpu" or dtype != torch.bfloat16:
        return False
    from bitsandbytes import functional as bnb  # noqa: PLC0415 - optional

    state = weight.quant_state
    out_features, in_features = state.shape
    if out_features % REPACKED_ROWS or in_features % state.blocksize or not bnb.has_avx512bf16():
        return False
    if not getattr(state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu(weight.data, state)
    return True


def quiet_bitsandbytes() -> None:
    """Silence its warnings of every int8 product's cast to float16, and of a kernel that it would fetch from a hub."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make a quantized model ready for training adapters, in place, as PEFT does.

    All parameters are frozen; half-precision ones (norms, embeddings, head) become float32. With quantized layers and
    `use_gradient_checkpointing`, checkpointing is switched on, and unless `use_reentrant` is False the input
    embeddings' output is made to require gradients, without which no gradient would pass a checkpoint.

    Args:
        model: a transformers model, before or after adapters are in it.
        gradient_checkpointing_kwargs: given to `torch.utils.checkpoint.checkpoint`.

    Returns:
        The same model.

    Raises:
        UnsupportedError: the model has no gradient checkpointing to switch on.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in HALF and num_bits(parameter) is None:
            parameter.data = parameter.data.to(torch.float32)
    if not use_gradient_checkpointing or not any(is_quantized(module) for module in model.modules()):
        return model
    options = dict(gradient_checkpointing_kwargs or {})
    # The second name is that of transformers before 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UnsupportedError(f"a {type(model).__name__} has no gradient checkpointing: switch it off here")
    if options.get("use_reentrant", True):
        cast(Any, model).enable_input_require_grads()
    enable(options)
    return model


def num_bits(weight: Any) -> int | None:
    """4 or 8 for a weight of bitsandbytes', by the names of its classes: nothing is imported where none occurs."""
    names = {kind.__name__ for kind in type(weight).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    if "Params4bit" in names and weight.quant_state is not None:
        return 4
    if "Int8Params" in names and weight.dtype == torch.int8:
        return 8
    return None


def _is_torchao(weight: Any) -> bool:
    return any(kind.__module__.startswith("torchao.") for kind in type(weight).__mro__) and hasattr(
        weight, "dequantize"
    )


@torch.no_grad()
def _asked_weight(module: nn.Module) -> Tensor:
    """The weight [O, I] of a layer of another package, in float32: its outputs for the unit vectors, less its bias.

    As exact as the layer computes, which is in the dtype of its scales; it costs as much as a prompt of I tokens.
    """
    layer = cast(Any, module)
    packed = next(value for name in OPAQUE_NAMES if torch.is_tensor(value := getattr(layer, name, None)))
    scales: Any = getattr(layer, "scales", None)
    dtype = scales.dtype if torch.is_tensor(scales) and scales.is_floating_point() else torch.float32
    units = torch.eye(layer.in_features, dtype=dtype, device=packed.device)
    columns = torch.cat([layer(rows).float() for rows in units.split(ASKED_ROWS)])
    bias = getattr(layer, "bias", None)
    return (columns if bias is None else columns - bias.float()).T.contiguous()


def _dequantize_repacked(values: Tensor, state: Any) -> Tensor:
    """From the CPU kernel's layout: scales [I / block, O] in bfloat16, nibbles in groups of 32 rows.

    A group's byte j of columns 2k and 2k + 1 holds column 2k + (j mod 2) of row j / 2 in its low half, and of row
    16 + j / 2 in its high half. Files have column 2k in the high half and 2k + 1 in the low half of one byte.
    """
    from bitsandbytes import functional as bnb  # noqa: PLC0415 - optional

    state = copy.copy(state)
    out_features, in_features = state.shape
    num_groups = out_features // REPACKED_ROWS
    pairs = values.view(num_groups, in_features // 2, REPACKED_ROWS // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    low, high = (even << 4) | (odd & 15), (even & 240) | (odd >> 4)
    packed = torch.cat([low, high], dim=-1).transpose(1, 2).reshape(-1, 1)
    state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype = torch.float32
    return bnb.dequantize_4bit(packed, state)
