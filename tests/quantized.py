"""Models whose linear layers bitsandbytes holds in 4 or 8 bits, quantized on the CPU."""

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

KINDS = ["nf4", "fp4", "nf4-nested", "int8"]


def quantized_linear(linear: nn.Linear, kind: str) -> nn.Linear:
    """The layer quantized; float32 is computed in float32."""
    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach().clone()
    out: Any
    if kind == "int8":
        out = bnb.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
        out.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        quant_type, _, nested = kind.partition("-")
        options = {"quant_type": quant_type, "compress_statistics": bool(nested)}
        out = bnb.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=torch.float32, **options)
        out.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=out, **options)
    if has_bias:
        out.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return out.to(linear.weight.device).train(linear.training)


def quantized_model(model: Any, kind: str) -> Any:
    """A copy with every linear layer but the head quantized, marked as transformers marks such models.

    Repacking is switched off: after it PEFT's own results are wrong, and tiny layers make it fail.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            quantized = quantized_linear(module, kind)
            if hasattr(quantized, "support_avx512bf16_for_cpu"):
                quantized.support_avx512bf16_for_cpu = False
            setattr(model.get_submodule(parent), child, quantized)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    return model
