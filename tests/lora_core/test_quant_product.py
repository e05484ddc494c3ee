"""Quantized layers that share an input are one product with the same numbers, and no row depends on another."""

import random
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LoraLinear, Route, Router, Run, attach_slots
from lora_core.maths import Folded
from lora_core.ops import reference
from lora_core.quant import dequantized_weight, quiet_bitsandbytes, settle_layout
from lora_core.quant_product import Int8Weight, joined_weight, quantized_form
from lora_core.shared import PackedLinear, share_inputs

bnb = pytest.importorskip("bitsandbytes")
SIZES = (64, 32, 96)
IN_FEATURES = 128
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["nf4", "fp4", "nf4-double", "int8"]


@pytest.fixture(autouse=True)
def seed() -> None:
    quiet_bitsandbytes()
    value = random.SystemRandom().randrange(1 << 30)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)


def quantized(kind: str, size: int, dtype: torch.dtype, *, has_bias: bool, in_features: int = IN_FEATURES) -> Any:
    """A layer as transformers makes it, with the threshold that it sets."""
    values = torch.randn(size, in_features).to(dtype) / in_features**0.5
    layer: Any
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(in_features, size, bias=has_bias, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        options = {"quant_type": kind.partition("-")[0], "compress_statistics": kind.endswith("double")}
        layer = bnb.nn.Linear4bit(in_features, size, bias=has_bias, compute_dtype=dtype, **options)
        layer.weight = bnb.nn.Params4bit(values, requires_grad=False, module=layer, **options).to("cpu")
    if has_bias:
        layer.bias = nn.Parameter(torch.randn(size).to(dtype), requires_grad=False)
    settle_layout(layer.eval(), dtype)
    return layer


def inputs(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """With a few numbers beyond the threshold, in columns of their own for each row."""
    x = torch.randn(num_rows, IN_FEATURES)
    for row in range(0, num_rows, 2):
        x[row, random.randrange(IN_FEATURES)] = random.choice([-1, 1]) * random.uniform(7, 40)
    return x.to(dtype)


def alone(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' own forward, one row at a time."""
    with torch.inference_mode():
        return torch.cat([layer(row[None]) for row in x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_give_what_they_give_apart(kind: str, dtype: torch.dtype) -> None:
    has_bias = random.random() < 0.5
    layers = [quantized(kind, size, dtype, has_bias=has_bias) for size in SIZES]
    x = inputs(7, dtype)
    wanted = [alone(layer, x) for layer in layers]
    weights = [dequantized_weight(layer) for layer in layers]
    router = Router()
    wrapped = {name: LoraLinear(layer, router) for name, layer in zip("qkv", layers, strict=True)}
    attach_slots(wrapped, 2, dtype=dtype)
    groups = share_inputs(wrapped, [list("qkv")])
    # Scales that are quantized have offsets of their own, until they are repacked for the CPU.
    is_apart = kind == "nf4-double" and not getattr(layers[0].weight.quant_state, "packing_format_for_cpu", False)
    assert len(groups) == (3 if is_apart else 1)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
    with torch.inference_mode():
        for layer, own, weight in zip(wrapped.values(), wanted, weights, strict=True):
            torch.testing.assert_close(layer(x), own, **close)
            assert isinstance(layer.base_layer, PackedLinear)
            assert torch.equal(layer.base_layer.weight, weight)
            torch.testing.assert_close(layer.base_layer(x), own, **close)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_are_added_to_the_joined_product(kind: str) -> None:
    router = Router()
    wrapped = {
        name: LoraLinear(quantized(kind, size, torch.float32, has_bias=True), router)
        for name, size in zip("qk", SIZES[:2], strict=True)
    }
    bank = attach_slots(wrapped, 3, dtype=torch.float32)
    for slot in range(2):
        parts = {
            name: Folded(
                torch.randn(3 + slot, IN_FEATURES),
                torch.randn(3 + slot, layer.out_features),
                torch.randn(layer.out_features) if slot else None,
            )
            for name, layer in wrapped.items()
        }
        bank.load(slot, parts)
    x = inputs(6, torch.float32)
    base = {name: alone(layer.base_layer, x) for name, layer in wrapped.items()}
    assert len(share_inputs(wrapped, [list("qk")])) == 1
    route = Route([Run({}, 2), Run({0: 1.0}, 2), Run({0: 0.5, 1: -0.7}, 2)])
    with torch.inference_mode(), router.use(route):
        found = {name: layer(x) for name, layer in wrapped.items()}
    for name, layer in wrapped.items():
        wanted = reference.apply(base[name].clone(), x, layer.slots, route, layer.bias)
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_int8_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    layer = quantized("int8", 48, dtype, has_bias=True)
    weight = joined_weight([layer])
    assert isinstance(weight, Int8Weight)
    x = inputs(9, dtype)
    wanted = alone(layer, x)
    together = weight(x, layer.bias)
    torch.testing.assert_close(together, wanted, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 3e-2)
    x[4:] *= 30  # most of them are large now, in every column
    torch.testing.assert_close(weight(x, layer.bias)[:4], together[:4], rtol=1e-5, atol=1e-5)
    x[5, 3], x[6, 7] = torch.inf, torch.nan
    assert torch.equal(weight(x, layer.bias)[:5].isfinite(), torch.ones(5, 48, dtype=torch.bool))
    assert not weight(x, layer.bias)[5:7].isfinite().all(dim=1).any()
    assert weight(x[:0].view(0, 1, IN_FEATURES)).shape == (0, 1, 48)


def test_layers_whose_blocks_span_rows_stay_apart() -> None:
    narrow = [quantized("nf4", size, torch.float32, has_bias=False, in_features=32) for size in (32, 16)]
    assert quantized_form(narrow[0]) != quantized_form(narrow[1])
    x = torch.randn(5, 32)
    for layer in narrow:
        with torch.inference_mode():
            assert torch.equal(joined_weight([layer])(x), layer(x))
    even = [quantized("nf4", size, torch.float32, has_bias=False, in_features=64) for size in (8, 16)]
    assert quantized_form(even[0]) == quantized_form(even[1])
    assert quantized_form(nn.Linear(4, 4)) is None
