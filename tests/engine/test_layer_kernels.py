"""What lies between a layer's products, against PyTorch's operators; interpreted without a GPU."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.ops import few_rows
from lora_core.ops.triton import Delta
from server.engine import layer_kernels as kernels
from server.engine.attention.interface import Rotations
from server.engine.kv_cache import KVCache, LayerShape
from server.engine.norm import RmsNorm
from tests.device import DEVICE

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
BLOCK = 4


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def with_delta(y: Tensor, bias: Tensor | None) -> tuple[Delta, Tensor]:
    """What adapters may add to y, and y with it; what no flag asks for is NaN."""
    flags = torch.tensor([0, 1, 2, *random.choices([0, 1, 2], k=len(y) - 3)], dtype=torch.int32, device=DEVICE)
    added, gains = torch.randn_like(y), 0.3 * torch.randn_like(y)
    base = y.float() - (0 if bias is None else bias.float())
    whole = y.float() + added.float() + torch.where(flags[:, None] == 2, gains.float() * base, 0)
    whole = torch.where(flags[:, None] > 0, whole.to(y.dtype).float(), y.float())
    added[flags == 0] = torch.nan
    gains[flags < 2] = torch.nan
    return Delta(flags, added, gains), whole.to(y.dtype)


Case = tuple[Tensor, Delta | None, Tensor | None, Tensor]


@pytest.fixture(params=["plain", "adapters", "adapters and biases"])
def make(request: pytest.FixtureRequest) -> Callable[[int, int, torch.dtype], Case]:
    """An output, what is to be added to it, its bias, and the sum."""

    def made(num_tokens: int, size: int, dtype: torch.dtype) -> Case:
        y = randn(num_tokens, size, dtype=dtype)
        bias = randn(size, dtype=dtype) if "biases" in request.param else None
        if request.param == "plain":
            return y, None, bias, y
        delta, whole = with_delta(y, bias)
        return y, delta, bias, whole

    return made


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_gates(make: Callable[..., Case], dtype: torch.dtype) -> None:
    y, delta, bias, whole = make(6, 2 * 40, dtype)
    own, up = whole.float().split(40, dim=1)
    torch.testing.assert_close(kernels.gate(y, delta, bias), (F.silu(own) * up).to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_sums_and_norms(make: Callable[..., Case], dtype: torch.dtype, has_norm: bool) -> None:
    y, delta, bias, whole = make(5, 48, dtype)
    hidden, weight = randn(5, 48, dtype=dtype), randn(48, dtype=dtype) if has_norm else None
    total = (hidden.float() + whole.float()).to(dtype)
    out = kernels.add_norm(hidden, y, delta, bias, weight, 1e-5)
    torch.testing.assert_close(hidden, total, **CLOSE[dtype])
    wanted = hidden if weight is None else F.rms_norm(hidden.float(), (48,), weight.float(), 1e-5).to(dtype)
    torch.testing.assert_close(out, wanted, **CLOSE[dtype])


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_rotations_and_the_cache(make: Callable[..., Case], dtype: torch.dtype, has_norms: bool) -> None:
    """Of more heads than a program takes; a token of nobody's is not written."""
    num_heads, num_kv_heads, dim, num_tokens = 9, 3, random.choice([8, 12]), 5
    heads, delta, bias, whole = make(num_tokens, (num_heads + 2 * num_kv_heads) * dim, dtype)
    cache = KVCache([LayerShape(num_kv_heads, dim, dim)], 4, BLOCK, dtype=dtype, device=DEVICE)
    keys, values = cache.heads(0)
    keys.fill_(7)
    values.fill_(7)
    places = [*random.sample(range(BLOCK, 4 * BLOCK), num_tokens - 1), -1]
    angles = torch.rand(1, num_tokens, dim // 2, device=DEVICE).repeat(1, 1, 2) * 6
    embeddings = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = [RmsNorm(nn.Parameter(randn(dim, dtype=dtype)), random.choice([1e-6, 1e-2])) for _ in range(2)]
    own = (norms[0], norms[1]) if has_norms else None
    query = kernels.rotate(heads, delta, bias, own, embeddings, keys, values, torch.tensor(places, device=DEVICE))
    turned = whole.view(num_tokens, -1, dim)
    wanted_values = turned[:, -num_kv_heads:].clone()
    if has_norms:
        with torch.no_grad():
            turned[:, :num_heads] = norms[0](turned[:, :num_heads].contiguous())
            turned[:, num_heads:-num_kv_heads] = norms[1](turned[:, num_heads:-num_kv_heads].contiguous())
    turned = turned.float()
    Rotations().rotate(turned[:, :-num_kv_heads], tuple(part.float() for part in embeddings))  # type: ignore[arg-type]
    wanted_query, wanted_keys, _ = turned.to(dtype).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    torch.testing.assert_close(query, wanted_query, **CLOSE[dtype])
    for pool, wanted in ((keys, wanted_keys), (values, wanted_values)):
        rows = pool.flatten(1, 2).transpose(0, 1)
        torch.testing.assert_close(rows[places[:-1]], wanted[:-1], **CLOSE[dtype])
        others = [place for place in range(4 * BLOCK) if place not in places]
        assert (rows[others] == 7).all()


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, few_rows.MAX_ROWS])
def test_products_of_few_rows(num_rows: int) -> None:
    dtype = random.choice([torch.bfloat16, torch.float16])
    num_outputs, num_inputs = random.choice([(64, 256), (128, 768), (192, 512)])
    weight = randn(num_outputs, num_inputs, dtype=dtype) / num_inputs**0.5
    x = randn(num_rows, 2 * num_inputs, dtype=dtype)
    x = random.choice([x[:, :num_inputs], x[:, ::2]])
    bias = random.choice([None, randn(num_outputs, dtype=dtype)])
    wanted = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    y = few_rows.multiply(x, weight, bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), wanted, **CLOSE[torch.bfloat16])


def test_few_rows_are_for_what_was_measured() -> None:
    weight = torch.zeros(64, 256, dtype=torch.bfloat16, device=DEVICE)
    is_hopper = DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE) == few_rows.CAPABILITY
    assert few_rows.can_multiply(weight) == is_hopper
    for other in (weight.float(), weight[:63], weight[:, :255], weight.T, weight[None]):
        assert not few_rows.can_multiply(other)
