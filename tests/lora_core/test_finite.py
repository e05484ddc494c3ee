"""`is_finite` says of every tensor what PyTorch's `isfinite` says of its elements."""

import math
import random

import pytest
import torch

from lora_core.maths import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [None, math.nan, -math.nan, math.inf, -math.inf], ids=str)
def test_one_element_in_many(dtype: torch.dtype, bad: float | None) -> None:
    for shape in ((1,), (7, 33), (64, 256)):
        tensor = torch.randn(shape).to(dtype)
        if bad is not None:
            tensor.view(-1)[random.randrange(tensor.numel())] = bad
        for one in (tensor, tensor.T if tensor.dim() == 2 else tensor):
            assert is_finite(one) is bool(one.isfinite().all()) is (bad is None)


def test_extremes_and_nothing() -> None:
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.tensor([torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]).bfloat16())
    assert not is_finite(torch.tensor([math.inf, -math.inf, math.nan]))
