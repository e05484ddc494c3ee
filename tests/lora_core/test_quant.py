"""Quantized base weights: read right at any time, written back in kind, and adapters on them equal PEFT's."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_core import LoraLinear, LoraModel, Route, Router, TargetError, UnsupportedError
from lora_core.quant import (
    dequantized_weight,
    is_quantized,
    keep_layout,
    prepare_model_for_kbit_training,
    quantized_like,
    replace_weight,
)
from tests.peft_adapters import VARIANTS, peft_model, save
from tests.quantized import KINDS, quantized_linear, quantized_model
from tests.tiny_models import VOCABULARY, tiny_model

CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 2e-5}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_dequantized_weight_is_what_the_layer_computes_with(kind: str) -> None:
    full = nn.Linear(192, 96)
    layer = quantized_linear(full, kind)
    keep_layout(layer)
    x = torch.randn(5, 192)
    before = dequantized_weight(layer)
    assert before.dtype == torch.float32
    assert 0 < (before - full.weight).norm() < 0.2 * full.weight.norm()
    # An int8 layer quantizes its input as well, to half of 1/127 of its largest entry.
    tolerance: dict[str, float] = {"rtol": 0.0, "atol": 0.05} if kind == "int8" else CLOSE
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(layer.train(mode)(x), x @ before.T + full.bias, **tolerance)
        assert torch.equal(dequantized_weight(layer), before)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-nested"])
def test_a_repacked_weight_is_still_read_right(kind: str) -> None:
    layer: Any = quantized_linear(nn.Linear(192, 96, bias=False), kind).eval()
    before = dequantized_weight(layer)
    layer(torch.randn(2, 192))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU does not repack")
    # Repacking rounds every block's scale to bfloat16: at most half of its last place, 2^-8 in all.
    assert ((dequantized_weight(layer) - before).abs() <= before.abs() * 2.0**-8 + 1e-12).all()
    replace_weight(layer, quantized_like(layer, before))
    torch.testing.assert_close(dequantized_weight(layer), before, rtol=0.02, atol=0.02 * before.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_requantizing_is_in_kind_and_can_be_taken_back(kind: str) -> None:
    first, second = nn.Linear(192, 96), nn.Linear(192, 96)
    layer: Any = quantized_linear(first, kind)
    keep_layout(layer)
    x = torch.randn(4, 192)
    with torch.no_grad():
        wanted = layer(x)
        former = replace_weight(layer, quantized_like(layer, second.weight))
        other = quantized_linear(second, kind)
        assert torch.equal(dequantized_weight(layer), dequantized_weight(other))
        assert type(layer.weight) is type(other.weight)
        other.bias = first.bias
        torch.testing.assert_close(layer(x), other(x), **CLOSE)
        if kind != "int8":
            ours, theirs = layer.weight.quant_state, other.weight.quant_state
            assert (ours.blocksize, ours.quant_type, ours.nested) == (
                theirs.blocksize,
                theirs.quant_type,
                theirs.nested,
            )
        replace_weight(layer, former)
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("out_features", [64, 48])  # repacking fails on 48
def test_a_layer_with_adapters_keeps_its_weight_as_it_is(out_features: int) -> None:
    full = nn.Linear(64, out_features, bias=False)
    base: Any = quantized_linear(full, "nf4").eval()
    layer = LoraLinear(base, Router())
    x = torch.randn(2, 64)
    torch.testing.assert_close(layer(x), x @ dequantized_weight(base).T, **CLOSE)
    assert torch.equal(dequantized_weight(base), dequantized_weight(quantized_linear(full, "nf4")))


def test_what_is_not_quantized_is_said_so() -> None:
    linear = nn.Linear(64, 64)
    assert not is_quantized(linear)
    assert not is_quantized(nn.ReLU())
    with pytest.raises(UnsupportedError, match="Linear"):
        dequantized_weight(linear)
    with pytest.raises(UnsupportedError, match="Linear"):
        quantized_like(linear, linear.weight)
    with pytest.raises(TargetError, match="shape"):
        quantized_like(quantized_linear(linear, "nf4"), torch.zeros(64, 32))


# Not DoRA on int8: PEFT loses an int8 layer's scales when DoRA reads it on a CPU.
CASES = [(kind, variant) for kind in KINDS for variant in ("rank4", "rslora", "patterns", "dora")]
CASES.remove(("int8", "dora"))


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_adapters_on_a_quantized_base_equal_peft(kind: str, variant: str, seed: int, tmp_path: Path) -> None:
    base = quantized_model(tiny_model("llama", seed), kind)
    theirs = peft_model(base, "llama", seed, **VARIANTS[variant])
    ours = LoraModel(base).eval()
    ours.load_adapter(save(theirs, tmp_path), "default")
    ours.set_adapter("default")
    for name, layer in ours.layers.items():
        x = torch.randn(3, layer.in_features)
        with ours.router.use(Route.uniform({"default": 1.0})):
            torch.testing.assert_close(layer(x), theirs.base_model.model.get_submodule(name)(x), **CLOSE)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    # Where int8 layers round their inputs the last bits decide, and differences grow from layer to layer.
    slack = 0.05 if kind == "int8" else 0.0
    wanted = logits(theirs, ids)
    assert_near(logits(ours, ids), wanted, slack)
    ours.set_adapter([])
    assert not torch.allclose(logits(ours, ids), wanted, atol=1e-2)
    ours.set_adapter("default")
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.grad is not None] for model in (ours, theirs)]
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        assert_near(one, other, slack)


def test_dora_on_int8_scales_what_the_layer_computes() -> None:
    full = nn.Linear(64, 96)
    base, layer = quantized_linear(full, "int8"), LoraLinear(quantized_linear(full, "int8"), Router())
    layer.add_adapter("default", 4, 8, 2.0, use_dora=True)
    layer.reset_magnitude("default")
    with torch.no_grad():
        for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
            parameter.normal_()
    layer.reset_magnitude("default")
    with torch.no_grad():
        layer.tensors("default").magnitude.mul_(torch.rand(96) + 0.5)
    part, x = layer.tensors("default"), torch.randn(5, 64)
    merged = dequantized_weight(base) + 2.0 * part.lora_B @ part.lora_A
    gain = part.magnitude / merged.norm(dim=1)
    wanted = gain * (base(x) - full.bias + 2.0 * x @ part.lora_A.T @ part.lora_B.T) + full.bias
    for _ in range(2):
        with layer.router.use(Route.uniform({"default": 1.0})):
            torch.testing.assert_close(layer(x), wanted, **CLOSE)


def assert_near(found: Tensor, wanted: Tensor, slack: float = 0.0) -> None:
    scale = wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=1e-5 + slack, atol=(2e-5 + slack) * scale)


def test_dora_on_nf4_is_dora_on_the_dequantized_weight(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    quantized = quantized_model(base, "nf4")
    full = copy.deepcopy(base)
    for name, module in quantized.named_modules():
        if is_quantized(module):
            full.get_submodule(name).weight.data = dequantized_weight(module)
    folder = save(peft_model(full, "llama", seed, **VARIANTS["dora"]), tmp_path)
    models = [LoraModel(model).eval() for model in (quantized, full)]
    for model in models:
        model.load_adapter(folder, "default")
        model.set_adapter("default")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    torch.testing.assert_close(logits(models[0], ids), logits(models[1], ids), **CLOSE)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_kbit_training_is_prepared_as_peft_does(use_reentrant: bool, seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed).to(torch.bfloat16)
    options = {"use_reentrant": use_reentrant}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT uses a name that transformers has deprecated
        theirs = peft.prepare_model_for_kbit_training(
            quantized_model(base, "nf4"), gradient_checkpointing_kwargs=dict(options)
        )
    prepared = prepare_model_for_kbit_training(quantized_model(base, "nf4"), gradient_checkpointing_kwargs=options)
    for (name, one), other in zip(prepared.named_parameters(), theirs.parameters(), strict=True):
        assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad), name
    assert prepared.is_activation_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft_model(theirs, "llama", seed, r=4)
        ours = LoraModel(prepared)
    ours.load_adapter(save(theirs, tmp_path), "default")
    ours.set_adapter("default")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of use_cache and of checkpoints without gradients
        theirs.train()(input_ids=ids, labels=ids).loss.backward()
        with ours.train().router.use(Route.uniform({"default": 1.0})):  # recomputing needs the route again
            ours.model(input_ids=ids, labels=ids).loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.grad is not None] for model in (ours, theirs)]
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        assert_near(one, other)


def test_a_model_without_checkpointing_is_named() -> None:
    model = nn.Sequential(quantized_linear(nn.Linear(64, 64), "nf4"))
    with pytest.raises(UnsupportedError, match="Sequential"):
        prepare_model_for_kbit_training(model)
    assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=False) is model
