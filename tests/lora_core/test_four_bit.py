"""Few rows by a weight in 4 bits: what its dequantization by bitsandbytes gives, row by row; interpreted on the CPU."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LoraLinear, Router, attach_slots, quant_product
from lora_core.ops import four_bit
from lora_core.ops.four_bit import MAX_ROWS, FourBitConfig, can_multiply, four_bit_product, pair_table
from lora_core.quant import dequantized_weight, quiet_bitsandbytes
from lora_core.quant_product import FourBitWeight, joined_weight, quantized_form
from lora_core.shared import share_inputs
from tests.device import DEVICE

bnb = pytest.importorskip("bitsandbytes")
CLOSE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 2e-6}
SMALL = FourBitConfig(block_t=8, block_o=16, units=2, num_warps=2, num_stages=2)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet_bitsandbytes()


def quantized(num_outputs: int, num_inputs: int, quant_type: str) -> tuple[Any, ...]:
    """Codes, scales, what they stand for in float64, and the table of their kind."""
    weight = torch.randn(num_outputs, num_inputs, device=DEVICE) * torch.rand(num_outputs, 1, device=DEVICE)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    return codes, state.absmax, bnb.functional.dequantize_4bit(codes, state).double(), state.code


def assert_close(y: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest of a row: its numbers are sums of as many, and as large, roundings."""
    assert y.dtype == dtype
    error = (y.double() - wanted).abs().amax(dim=1)
    assert (error <= CLOSE[dtype] * wanted.abs().amax(dim=1)).all(), error / wanted.abs().amax(dim=1)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_products_are_those_of_the_dequantized_weight(quant_type: str, dtype: torch.dtype, num_rows: int) -> None:
    num_outputs, num_inputs = random.choice([16, 40, 75, 96]), 64 * random.choice([1, 3, 8, 16])
    codes, absmax, weight, code = quantized(num_outputs, num_inputs, quant_type)
    x = torch.randn(num_rows, num_inputs, device=DEVICE).to(dtype)
    bias = torch.randn(num_outputs, device=DEVICE).to(dtype) if random.random() < 0.5 else None
    y = four_bit_product(x, codes, absmax, pair_table(code, dtype), bias)
    assert_close(y, x.double() @ weight.T + (0 if bias is None else bias.double()), dtype)


def test_every_code_is_told_from_the_others() -> None:
    """Rows of the unit matrix read the weight back: exactly what the table and the scales say."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).roll(random.randrange(256)).view(-1, 1)
    absmax = 2.0 ** torch.randint(-4, 4, (8,), device=DEVICE)
    code = bnb.functional.get_4bit_type("nf4", device=DEVICE)
    pairs = pair_table(code, torch.bfloat16)
    x = torch.eye(64, 128, device=DEVICE, dtype=torch.bfloat16)
    wanted = pairs[codes.view(-1).long()].view(4, 128) * absmax.repeat_interleave(64).view(4, 128)
    y = [four_bit_product(x.roll(64 * half, 1), codes, absmax, pairs, config=SMALL) for half in range(2)]
    assert torch.equal(torch.cat(y).T.float(), wanted)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # in the interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    codes, absmax, _, code = quantized(48, 320, "nf4")
    x = torch.randn(64, 320, device=DEVICE).to(dtype)
    pairs = pair_table(code, dtype)
    together = four_bit_product(x, codes, absmax, pairs)
    place = random.randrange(64)
    # The interpreter's products are BLAS's, in which the number of rows does count.
    close = {"rtol": 0, "atol": 0} if DEVICE.type == "cuda" else {"rtol": 1e-2, "atol": 1e-2}
    for rows in (slice(place, place + 1), slice(0, place + 1)):
        torch.testing.assert_close(four_bit_product(x[rows], codes, absmax, pairs), together[rows], **close)
    x[torch.arange(64) != place] = torch.tensor([torch.inf, torch.nan, 3e4]).repeat(107)[:320].to(DEVICE, dtype)
    assert torch.equal(four_bit_product(x, codes, absmax, pairs)[place], together[place])


def test_every_choice_gives_the_same() -> None:
    codes, absmax, weight, code = quantized(50, 448, "nf4")
    x = torch.randn(19, 900, device=DEVICE).bfloat16()
    x = random.choice([x[:, :448], x[:, 2:898:2], x[:, 450:898]])
    pairs = pair_table(code, torch.bfloat16)
    for config in {FourBitConfig.default(rows, outputs) for rows in four_bit.ROW_BLOCKS for outputs in (50, 10_000)}:
        y = four_bit_product(x, codes, absmax, pairs, config=config)
        assert_close(y, x.double() @ weight.T, torch.bfloat16)


def test_what_the_kernel_takes() -> None:
    x = torch.zeros(2, 3, 512, dtype=torch.bfloat16)
    assert can_multiply(x, 512, 64)
    assert not can_multiply(x, 512, 32)
    assert not can_multiply(x, 512, 128)
    assert not can_multiply(x, 1_024, 64)
    assert not can_multiply(x[..., :64], 64, 64)
    assert not can_multiply(x.float(), 512, 64)
    assert not can_multiply(x[:0], 512, 64)
    assert can_multiply(x[:1, :1].expand(MAX_ROWS, 1, 512), 512, 64)
    assert not can_multiply(x[:1, :1].expand(MAX_ROWS + 1, 1, 512), 512, 64)


def layer(size: int, kind: str, *, has_bias: bool) -> Any:
    quant_type, _, nested = kind.partition("-")
    options = {"quant_type": quant_type, "compress_statistics": bool(nested)}
    out: Any = bnb.nn.Linear4bit(512, size, bias=has_bias, compute_dtype=torch.bfloat16, **options)
    out.weight = bnb.nn.Params4bit(torch.randn(size, 512), requires_grad=False, module=out, **options)
    if has_bias:
        out.bias = nn.Parameter(torch.randn(size), requires_grad=False)
    if hasattr(out, "support_avx512bf16_for_cpu"):
        out.support_avx512bf16_for_cpu = False
    return out.to(DEVICE).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product by the kernel, which the CPU interprets here as if it were a GPU."""
    seen: list[int] = []
    own: Callable[..., torch.Tensor] = four_bit.four_bit_product

    def noting(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(x))
        return own(x, *args)

    monkeypatch.setattr(quant_product, "_is_for_gpu", lambda _: True)
    monkeypatch.setattr(four_bit, "four_bit_product", noting)
    return seen


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-nested", "fp4-nested"])
def test_layers_on_a_gpu_are_joined_and_multiplied_by_the_kernel(kind: str, calls: list[int]) -> None:
    has_bias = random.random() < 0.5
    layers = [layer(size, kind, has_bias=has_bias) for size in (64, 32, 96)]
    weights = [dequantized_weight(part) for part in layers]
    biases = [part.bias.detach().float() if has_bias else 0 for part in layers]
    router = Router()
    wrapped = {name: LoraLinear(part, router) for name, part in zip("qkv", layers, strict=True)}
    attach_slots(wrapped, 2, dtype=torch.bfloat16)
    (group,) = share_inputs(wrapped, [list("qkv")])
    assert calls[:3] == list(four_bit.ROW_BLOCKS)  # the trial of the joined weight
    calls.clear()
    with torch.inference_mode():
        for shape in ((1, 1, 512), (2, 7, 512), (1, MAX_ROWS + 1, 512)):
            x = torch.randn(shape, device=DEVICE).bfloat16()
            for part, weight, bias in zip(wrapped.values(), weights, biases, strict=True):
                wanted = x.double() @ weight.double().T + bias
                assert_close(part(x).flatten(0, 1), wanted.flatten(0, 1), torch.bfloat16)
    assert calls == [1, 14]
    for index, weight in enumerate(weights):
        assert torch.equal(group.weight(index), weight)


def test_nested_scales_are_dequantized_once(calls: list[int]) -> None:
    nested, flat = layer(32, "nf4-nested", has_bias=False), layer(32, "nf4", has_bias=False)
    assert quantized_form(nested) == quantized_form(flat)
    weights = [dequantized_weight(part) for part in (nested, flat)]
    joined = joined_weight([nested, flat])
    assert isinstance(joined, FourBitWeight)
    assert torch.equal(joined.unpack(), torch.cat(weights))
    assert torch.equal(joined.unpack(slice(32, 64)), weights[1])
    assert torch.equal(dequantized_weight(nested), weights[0])
    x = torch.randn(3, 512, device=DEVICE)
    calls.clear()
    with torch.inference_mode():
        y = joined(x)
    assert y.dtype == torch.float32
    assert_close(y.bfloat16(), x.bfloat16().double() @ torch.cat(weights).double().T, torch.bfloat16)
    assert calls == [3]


@pytest.mark.parametrize("fault", ["other numbers", "no launch"])
def test_a_kernel_that_does_not_do_it_is_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
        if fault == "no launch":
            raise RuntimeError("Triton Error [CUDA]: invalid argument")
        return x.new_ones(len(x), codes.numel() * 2 // x.shape[1])

    monkeypatch.setattr(quant_product, "_is_for_gpu", lambda _: True)
    monkeypatch.setattr(four_bit, "four_bit_product", broken)
    own = layer(32, "nf4", has_bias=False)
    weight, joined = dequantized_weight(own), joined_weight([own])
    assert "bitsandbytes'" in caplog.text
    x = torch.randn(3, 512, device=DEVICE).bfloat16()
    assert_close(joined(x), x.double() @ weight.double().T, torch.bfloat16)
