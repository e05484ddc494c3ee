"""Weights in 4 bits: what is held, and that few rows and many compute with the same numbers."""

import random

import pytest
import torch

from lora_core.packing import INT4_GROUP, MAX_INT4_ROWS, Int4Weight, can_be_int4, has_int4, round_to_int4

pytestmark = pytest.mark.skipif(not has_int4(), reason="this PyTorch has no products of 4 bits")


def make_weight() -> torch.Tensor:
    rows, groups = 16 * random.randint(1, 12), random.randint(1, 20)
    return (torch.randn(rows, groups * INT4_GROUP) * random.uniform(0.01, 3) + random.uniform(-0.1, 0.1)).bfloat16()


def test_each_group_is_rounded_to_its_nearest_sixteen_numbers() -> None:
    weight = make_weight()
    rounded = round_to_int4(weight)
    groups, found = (w.float().unflatten(1, (-1, INT4_GROUP)) for w in (weight, rounded))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    assert ((groups - found).abs() <= 0.5 * step * 1.02 + 0.02 * groups.abs().amax(-1, keepdim=True)).all()
    assert all(len(group.unique()) <= 16 for group in found.flatten(0, 1))
    again = round_to_int4(rounded).float()
    assert (again - rounded.float()).norm() <= 0.01 * rounded.float().norm()


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_and_many_compute_with_the_same_numbers(bias: bool) -> None:
    weight = make_weight()
    packed, b = Int4Weight(weight), torch.randn(weight.shape[0]).bfloat16() if bias else None
    rounded = packed.unpack()
    assert torch.equal(rounded, round_to_int4(weight))
    for shape in [(1,), (1, 1), (1, MAX_INT4_ROWS), (2, 2), (1, MAX_INT4_ROWS + 1), (40,)]:
        x = torch.randn(*shape, weight.shape[1]).bfloat16()
        wanted = torch.nn.functional.linear(x.double(), rounded.double(), None if b is None else b.double())
        found = packed(x, b)
        assert found.shape == wanted.shape
        assert found.dtype == torch.bfloat16
        assert (found - wanted).norm() <= 1.5e-2 * wanted.norm()  # C rounds inputs to 8 bits


def test_weights_of_other_forms_are_not_taken() -> None:
    weight = make_weight()
    assert can_be_int4(weight)
    assert not can_be_int4(weight.float())
    assert not can_be_int4(weight[:, 1:])
    assert not can_be_int4(weight[1:])
    assert not can_be_int4(weight[:0])
