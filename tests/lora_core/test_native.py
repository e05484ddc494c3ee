"""Products, adapters and small operators in C against float64, and that a row's result is its own."""

import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lora_core import Route, Run, SlotBank, native
from lora_core.maths import Folded
from lora_core.native.linear import NativeInt4Weight, NativeWeight
from lora_core.native.small import native_maxima, native_rms_norm, native_silu_gate
from lora_core.ops import reference
from lora_core.ops.native import NativeGroup
from lora_core.slots import LayerSlots
from tests.native_kinds import native_kind

__all__ = ["native_kind"]

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 1e-2, "atol": 2e-2}}
DTYPES = pytest.mark.parametrize("dtype", list(native.DTYPES))


@pytest.fixture
def c_only(native_kind: str) -> None:
    if native_kind == "off":
        pytest.skip("about C")


@DTYPES
@pytest.mark.usefixtures("c_only")
def test_products_for_all_numbers_of_rows(dtype: torch.dtype) -> None:
    for _ in range(6):
        num_out, num_in = random.randint(1, 150), random.randint(1, 90)
        weight, bias = torch.randn(num_out, num_in).to(dtype), torch.randn(num_out).to(dtype)
        own = NativeWeight(weight)
        assert torch.equal(own.unpack(), weight)
        first = random.randint(0, num_out)
        assert torch.equal(own.unpack(slice(first, first + 20)), weight[first : first + 20])
        for num_rows in (*range(14), 25, 61, 130):
            x = torch.randn(num_rows, num_in + 3).to(dtype)[:, :num_in]
            given = random.choice([None, bias])
            expected = F.linear(x.double(), weight.double(), None if given is None else given.double())
            torch.testing.assert_close(own(x, given).double(), expected, **CLOSE[dtype])


def _in_whole_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """[.., I] as tile_bf16.h says: groups of 32 are multiples of the power of two that makes the largest of 13 bits."""
    groups = F.pad(numbers.double(), (0, -numbers.shape[-1] % 32)).unflatten(-1, (-1, 32))
    step = torch.exp2(groups.abs().amax(-1, keepdim=True).log2().floor() - 12).clamp(min=2.0**-126)
    return ((groups / step).round() * step).flatten(-2)[..., : numbers.shape[-1]]


def _with_outliers(*shape: int) -> torch.Tensor:
    """Numbers of very different sizes."""
    return (torch.randn(shape) * torch.exp2(10 * torch.randn(shape))).bfloat16()


@pytest.mark.usefixtures("c_only")
def test_bfloat16_is_multiplied_in_whole_numbers_of_13_bits() -> None:
    for size in (1, 31, 32, 200):
        weight, x = _with_outliers(40, size), _with_outliers(7, size)
        x[3] = 0
        own = NativeWeight(weight)
        assert torch.equal(own.unpack().view(torch.int16), weight.view(torch.int16))
        rounded_x, rounded = _in_whole_numbers(x), _in_whole_numbers(weight)
        # Sums of groups are exact: what is left is adding them up in float32, and the result's own rounding.
        sums = rounded_x.abs() @ rounded.abs().T
        expected = rounded_x @ rounded.T
        assert ((own(x).double() - expected).abs() <= expected.abs() * 2.0**-8 + sums * 2.0**-22).all()
        # Rounding costs little beside what makes up a group.
        exact = x.double() @ weight.double().T
        norms = [F.pad(part.double(), (0, -size % 32)).unflatten(-1, (-1, 32)).norm(dim=-1) for part in (x, weight)]
        assert ((expected - exact).abs() <= 2.0**-9 * norms[0] @ norms[1].T).all()


@pytest.mark.usefixtures("c_only")
def test_very_small_and_very_large_numbers() -> None:
    tiny, huge, least = 2.0**-60, 2.0**62, 2.0**-130
    weight = torch.tensor([[1.0, 0.0], [0.0, huge], [tiny, 0.0], [-0.0, least]]).bfloat16()
    own = NativeWeight(weight)
    assert torch.equal(own.unpack().view(torch.int16), weight.view(torch.int16))
    x = torch.tensor([[2.0, 1.0], [huge, 0.0], [tiny, 1.0]]).bfloat16()
    expected = torch.tensor([[2.0, huge, 2 * tiny, 0.0], [huge, 0.0, 4.0, 0.0], [0.0, huge, 0.0, 0.0]])
    assert torch.equal(own(x).float(), expected)


@DTYPES
@pytest.mark.usefixtures("c_only")
def test_a_rows_product_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    own = NativeWeight(torch.randn(200, 77).to(dtype))
    x = torch.randn(150, 77).to(dtype)
    together = own(x)
    for _ in range(20):
        rows = slice(start := random.randrange(150), start + random.randint(1, 70))
        assert torch.equal(own(x[rows]), together[rows])


@DTYPES
@pytest.mark.usefixtures("c_only")
def test_products_with_weights_in_4_bits(dtype: torch.dtype) -> None:
    for _ in range(4):
        num_out, num_groups = random.randint(1, 100), random.randint(1, 5)
        codes = torch.randint(0, 16, (num_out, num_groups, 32))
        scale, middle = (torch.randn(num_out, num_groups).to(dtype) for _ in range(2))
        weight = ((codes.double() - 8) * scale.double()[..., None] + middle.double()[..., None]).flatten(1)
        own = NativeInt4Weight(codes, scale, middle)
        torch.testing.assert_close(own.unpack().double(), weight, **CLOSE[dtype])
        x, bias = torch.randn(70, 32 * num_groups).to(dtype), torch.randn(num_out).to(dtype)
        x[1, :32] = 0
        groups = x.double().unflatten(1, (num_groups, 32))
        worth = groups.abs().amax(-1, keepdim=True) / 127
        rounded = (groups / worth.clamp(min=1e-30)).round().mul(worth).flatten(1)
        # Half of the largest is between two steps.
        step = float(worth.max() * weight.abs().max()) + 1e-3 * float(weight.norm(dim=1).max())
        for num_rows in (0, 1, 2, 3, 4, 11, 70):
            out = own(x[:num_rows], bias)
            expected = F.linear(rounded[:num_rows], weight, bias.double())
            torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=step)
            assert torch.equal(out, own(x, bias)[:num_rows])


@pytest.mark.usefixtures("c_only")
def test_infinities_and_nan_are_kept() -> None:
    for dtype in native.DTYPES:
        half = torch.randint(0, 16, (24, 2, 32)), torch.rand(24, 2).to(dtype), torch.rand(24, 2).to(dtype)
        x = torch.randn(3, 64).to(dtype)
        x[0, 40], x[1, 3] = torch.nan, torch.inf
        y = NativeInt4Weight(*half)(x)
        assert y[:2].isnan().all()
        assert y[2].isfinite().all()
        own = NativeWeight(torch.eye(24).to(dtype))
        x = torch.zeros(3, 24).to(dtype)
        x[0, 1], x[1, 2] = torch.nan, torch.inf
        y = own(x)
        assert y[0].isnan().all()
        assert y[1, 2].isnan() or y[1, 2].isinf()
        assert torch.equal(y[2], x[2])


def _group(dtype: torch.dtype, num_in: int, sizes: list[int]) -> tuple[NativeGroup, list[dict[int, Folded]]]:
    """Layers with five adapters: of any rank, some with gains or biases, some without any part in a layer."""
    layers = {
        str(i): LayerSlots(num_in, size, 8, dtype=dtype, device=torch.device("cpu")) for i, size in enumerate(sizes)
    }
    bank = SlotBank(layers, 8)
    adapters: list[dict[int, Folded]] = [{} for _ in sizes]
    for slot in random.sample(range(8), 5):
        modules = {}
        for i, size in enumerate(sizes):
            if random.random() < 0.8:
                rank = random.choice([0, 1, 3, 8, 16, 21, 64])
                gain = torch.randn(size) / 5 if random.random() < 0.4 else None
                bias = torch.randn(size) if random.random() < 0.3 or rank == 0 else None
                a, b = torch.randn(rank, num_in) / num_in**0.5, torch.randn(rank, size) / max(rank, 1) ** 0.5
                modules[str(i)] = adapters[i][slot] = Folded(a, b, gain, bias).to(dtype)
        bank.load(slot, modules)
    return NativeGroup(list(layers.values())), adapters


class _Source:
    def __init__(self, adapters: dict[int, Folded]) -> None:
        self._adapters = adapters

    def folded(self, key: object) -> Folded | None:
        found = self._adapters.get(key)  # type: ignore[call-overload]
        return None if found is None else found.to(torch.float64)


def _route(longest: int) -> Route:
    def weights() -> dict[int, float]:
        return {
            slot: random.choice([1.0, 0.5, -0.7]) for slot in random.sample(range(8), random.choice([0, 1, 1, 2, 3]))
        }

    return Route([Run(weights(), random.choice([1, 1, 1, random.randint(1, longest)])) for _ in range(14)])


@DTYPES
@pytest.mark.parametrize("longest", [3, 90])
@pytest.mark.usefixtures("c_only")
def test_adapters_agree_with_the_definition_and_rows_with_themselves_alone(dtype: torch.dtype, longest: int) -> None:
    for _ in range(4):
        num_in, sizes = random.randint(1, 100), [random.randint(1, 130) for _ in range(random.randint(1, 3))]
        group, adapters = _group(dtype, num_in, sizes)
        route = _route(longest)
        x, y = torch.randn(route.num_rows, num_in).to(dtype), torch.randn(route.num_rows, sum(sizes)).to(dtype)
        bias = random.choice([None, torch.randn(sum(sizes)).to(dtype)])
        out = y.clone()
        group.apply(out, x, route, bias)
        parts = zip(sizes, adapters, y.split(sizes, 1), out.split(sizes, 1), strict=True)
        biases = [None] * len(sizes) if bias is None else list(bias.double().split(sizes))
        for (_, own, before, after), own_bias in zip(parts, biases, strict=True):
            expected = reference.apply(before.double(), x.double(), _Source(own), route, own_bias)
            torch.testing.assert_close(after.double(), expected, **CLOSE[dtype])
        row = random.randrange(route.num_rows)
        alone = y[row : row + 1].clone()
        group.apply(alone, x[row : row + 1], route.select([row]), bias)
        assert torch.equal(alone[0], out[row])


@DTYPES
@pytest.mark.usefixtures("c_only")
def test_a_row_of_a_route_may_stand_for_several_tokens(dtype: torch.dtype) -> None:
    group, adapters = _group(dtype, 20, [33])
    route = Route([Run({slot: 1.0}, 1) for slot in range(8)])
    x, y = torch.randn(24, 20).to(dtype), torch.zeros(24, 33).to(dtype)
    expected = reference.apply(y.double(), x.double(), _Source(adapters[0]), _longer(route, 3), None)
    group.apply(y, x, route, None)
    torch.testing.assert_close(y.double(), expected, **CLOSE[dtype])


def _longer(route: Route, times: int) -> Route:
    return Route([Run(weights, times * num_rows) for weights, num_rows in route.runs])


@DTYPES
@pytest.mark.usefixtures("c_only")
def test_small_operators(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        for size in (1, 7, 64, 100, 576):
            x, weight = 3 * torch.randn(2, 90, size).to(dtype), torch.randn(size).to(dtype)
            normed = native_rms_norm(x, weight, 1e-5)
            assert normed is not None
            expected = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
            torch.testing.assert_close(normed.double(), expected, **CLOSE[dtype])
            both = 40 * torch.randn(90, 2 * size).to(dtype)
            gated = native_silu_gate(both)
            assert gated is not None
            gate, up = both.double().split(size, 1)
            torch.testing.assert_close(gated.double(), F.silu(gate) * up, **CLOSE[dtype])
        assert native_rms_norm(torch.randn(4, 6).T, torch.ones(4), 1e-5) is None
        assert native_silu_gate(torch.randn(4, 6).double()) is None


@DTYPES
@pytest.mark.usefixtures("c_only")
@pytest.mark.parametrize("size", [1, 7, 8, 33, 4_000])
def test_maxima_of_rows(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(40, size).to(dtype)
    x[5] = x[6] = -torch.inf
    x[6, size // 2] = torch.inf
    for row in range(10, 30):  # equals, at any places
        x[row, torch.randint(size, (5,))] = x[row].max()
    x[30:35] = 0
    x[35, random.randrange(size)] = torch.nan
    found = native_maxima(x)
    assert found is not None
    peaks, places = found
    assert peaks.dtype == torch.float32
    assert peaks[35].isnan()
    others = torch.arange(40) != 35
    assert torch.equal(peaks[others], x.float().amax(1)[others])
    first = (x == x.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(places[others], first[others])
    assert native_maxima(x.T) is None or size == 1
    assert native_maxima(x.double()) is None


def test_without_a_compiler_pytorch_serves_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.processor() is None:
        pytest.skip("there is no library for this processor")
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    native.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert native.library(torch.float32) is None
    assert "gcc is not installed" in caplog.text
    native.library.cache_clear()


def test_libraries_are_kept_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = native.processor()
    if kind is None:
        pytest.skip("there is no library for this processor")
    built = tmp_path / "built.so"
    native.build(torch.float32, kind, built, "-O0")
    monkeypatch.setattr(native, "build", lambda dtype, kind, path: shutil.copy(built, path))
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    for mode, num_kept in ((0o777, 0), (0o700, 1)):
        (tmp_path / "native").mkdir(exist_ok=True)
        (tmp_path / "native").chmod(mode)
        native.library.cache_clear()
        assert native.library(torch.float32) is not None
        assert len(list((tmp_path / "native").iterdir())) == num_kept
    native.library.cache_clear()


@pytest.mark.slow
def test_libraries_for_all_processors_are_built_for_images(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "lora_core.native", str(tmp_path)], check=True)
    wanted = {native.library_name(dtype, kind) for dtype in native.DTYPES for kind in native.PROCESSORS.values()}
    assert {path.name for path in tmp_path.iterdir()} == wanted
