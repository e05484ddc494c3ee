"""The best low-rank part of a layer's loss, for the inputs that it sees; against brute force and exact cases."""

import pytest
import torch
from torch import nn

from lora_core import ConfigError, UnsupportedError
from lora_core.compensation import compensate, each_input
from lora_core.quant import dequantized_weight, keep_layout, quantized_linear, round_trip
from tests.quantized import KINDS
from tests.quantized import quantized_linear as reference_layer


def error(residual: torch.Tensor, part: object, inputs: torch.Tensor) -> float:
    return float((inputs @ (residual - part.lora_B @ part.lora_A).T).square().sum())


def test_it_is_the_best_of_its_rank_for_these_inputs(seed: int) -> None:
    weight, quantized = torch.randn(24, 16), torch.randn(24, 16)
    inputs = torch.randn(400, 16) * torch.logspace(-2, 1, 16) @ torch.randn(16, 16)
    residual = weight - quantized
    found = compensate(weight, quantized, 4, inputs)
    assert (found.lora_A.shape, found.lora_B.shape) == ((4, 16), (24, 4))
    # The outputs' best rank-4 part is a lower bound, which only damping keeps it from.
    outputs = inputs @ residual.T
    least = float(torch.linalg.svdvals(outputs)[4:].square().sum())
    assert least <= error(residual, found, inputs) < 1.2 * least + 1e-3
    plain = compensate(weight, quantized, 4)
    assert error(residual, plain, inputs) > error(residual, found, inputs)
    assert float((residual - plain.lora_B @ plain.lora_A).square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(residual)[4:].square().sum()), rel=1e-4
    )


def test_all_of_it_comes_back_at_full_rank_and_missing_rank_is_zero(seed: int) -> None:
    weight, quantized, inputs = torch.randn(12, 20), torch.randn(12, 20), torch.randn(7, 20)
    found = compensate(weight, quantized, 15, inputs)
    torch.testing.assert_close(found.lora_B @ found.lora_A, weight - quantized, rtol=1e-3, atol=1e-3)
    assert not found.lora_A[12:].any()
    nothing = compensate(weight, weight, 3, inputs)
    assert not (nothing.lora_B @ nothing.lora_A).any()


def test_large_layers_take_randomised_factors_that_are_near_the_best(seed: int) -> None:
    residual = torch.randn(300, 200) @ torch.diag(torch.logspace(0, -2, 200)) @ torch.randn(200, 200)
    before = torch.random.get_rng_state()
    found = compensate(residual, torch.zeros_like(residual), 8)
    assert torch.equal(before, torch.random.get_rng_state())
    least = float(torch.linalg.svdvals(residual)[8:].square().sum())
    assert float((residual - found.lora_B @ found.lora_A).square().sum()) < 1.02 * least


def test_very_wide_layers_weigh_features_apart(seed: int) -> None:
    weight, inputs = torch.randn(16, 5000), 0.1 * torch.randn(64, 5000)
    inputs[:, :20] *= 100
    found, plain = compensate(weight, torch.zeros(16, 5000), 2, inputs), compensate(weight, torch.zeros(16, 5000), 2)
    assert error(weight, found, inputs) < error(weight, plain, inputs)


def test_inputs_of_modules_are_seen_within_the_block_only(seed: int) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    seen: dict[str, torch.Tensor] = {}
    x = torch.randn(2, 5, 4)
    with each_input(model, ["1"], seen.__setitem__):
        model(x)
    torch.testing.assert_close(seen.pop("1"), model[0](x).flatten(0, 1))
    model(x)
    assert not seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_is_what_a_quantized_layer_holds(seed: int, kind: str) -> None:
    linear = nn.Linear(128, 64)
    name, _, nested = kind.partition("-")
    reference = reference_layer(linear, kind).eval()
    keep_layout(reference)
    held = dequantized_weight(reference)
    assert torch.equal(round_trip(linear.weight.data, name, double_quant=bool(nested)), held)
    made = quantized_linear(linear, linear.weight.data, name, double_quant=bool(nested))
    assert torch.equal(dequantized_weight(made), held)
    x = torch.randn(3, 128)
    torch.testing.assert_close(made(x), reference(x))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="int4"):
        round_trip(torch.zeros(2, 2), "int4")
    with pytest.raises(ConfigError, match="rank"):
        compensate(torch.zeros(2, 2), torch.zeros(2, 2), 0)
    with pytest.raises(UnsupportedError, match="in a form that cannot be read"):
        dequantized_weight(nn.Linear(2, 2))
