"""The Triton kernels agree with the definition of `apply_lora`; without a GPU they run in Triton's interpreter."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lora_core import DeviceModelSlots, LoraLinear, Route, Router, Run, apply_lora, attach_slots
from lora_core.device_slots import DeviceSlots
from lora_core.maths import Folded
from lora_core.ops import plan as plans
from lora_core.ops import triton as kernels
from lora_core.ops.kernels import KernelGroup
from lora_core.ops.plan import PlannedRoute, RoutePlan, tiles_of
from tests.device import DEVICE
from tests.lora_core import test_ops
from tests.lora_core.test_ops import KINDS, WORKLOADS, definition

I, SIZES, SLOTS = 40, (20, 36), 8  # noqa: E741 - the names of the literature
RANKS = [1, 3, 8, 16, 40, 70]
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-5},
    torch.float16: {"rtol": 4e-3, "atol": 2e-2},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-1},
}


@dataclass(frozen=True)
class Member:
    """One layer's adapters for the definition (`AdapterSource`)."""

    adapters: Mapping[int, Folded]

    def folded(self, key: Any) -> Folded | None:
        return self.adapters[key].to(torch.float64) if key in self.adapters else None


@dataclass(frozen=True)
class Layers:
    """Layers that read one input, with adapters of ragged ranks in slots that were used before."""

    bank: DeviceModelSlots
    members: list[Member]
    dtype: torch.dtype

    @property
    def slots(self) -> list[DeviceSlots]:
        return [cast(DeviceSlots, slots) for slots in self.bank.layers.values()]

    @property
    def keys(self) -> list[int]:
        return sorted(self.bank.loaded_slots)

    def definition(self, y: Tensor, x: Tensor, route: Route, bias: Tensor | None) -> Tensor:
        """Of all members side by side, in float64."""
        biases = [None] * len(SIZES) if bias is None else bias.split(SIZES)
        parts = zip(self.members, y.split(SIZES, dim=1), biases, strict=True)
        return torch.cat([definition(part, x, member, route, b) for member, part, b in parts], dim=1)


def random_folded(rank: int, size: int, kind: str, dtype: torch.dtype) -> Folded:
    has_gain, has_bias = KINDS[kind]
    return Folded(
        torch.randn(rank, I) / I**0.5,
        torch.randn(rank, size) / max(rank, 1) ** 0.5,
        0.3 * torch.randn(size) if has_gain else None,
        torch.randn(size) if has_bias else None,
    ).to(dtype)


def make_layers(dtype: torch.dtype, kinds: tuple[str, ...] = tuple(KINDS)) -> Layers:
    router = Router()
    layers = {str(i): LoraLinear(nn.Linear(I, size, device=DEVICE), router) for i, size in enumerate(SIZES)}
    bank = attach_slots(layers, SLOTS, dtype=dtype, use_kernels=True)
    assert isinstance(bank, DeviceModelSlots)
    adapters: list[dict[int, Folded]] = [{} for _ in SIZES]
    for slot in [*range(SLOTS - 1), 0, 2]:
        if slot in bank.loaded_slots:
            bank.free(slot)
        parts = {}
        for i, size in enumerate(SIZES):
            adapters[i].pop(slot, None)
            if random.random() < 0.85:
                adapters[i][slot] = random_folded(random.choice(RANKS), size, kinds[slot % len(kinds)], dtype)
                parts[str(i)] = adapters[i][slot]
        bank.load(slot, parts)
    bank.check_integrity()
    on_device = [Member({slot: _to(folded) for slot, folded in own.items()}) for own in adapters]
    return Layers(bank, on_device, dtype)


def _to(folded: Folded) -> Folded:
    gain, bias = (None if t is None else t.to(DEVICE) for t in (folded.gain, folded.bias))
    return Folded(folded.a.to(DEVICE), folded.b.to(DEVICE), gain, bias)


def inputs(route: Route, dtype: torch.dtype, *, per_row: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and a base bias."""
    count = route.num_rows * per_row
    x, y, bias = torch.randn(count, I), torch.randn(count, sum(SIZES)), torch.randn(sum(SIZES))
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def workload(name: str, keys: list[int]) -> Route:
    """The named traffic on fewer runs, as every program costs milliseconds in the interpreter."""
    route = test_ops.workload(name, keys)
    return Route([*random.sample(route.runs[:-1], 7), route.runs[-1]])


def rows_of_the_base(route: Route) -> Tensor:
    wanted = [any(weights.values()) for weights, n in route.runs for _ in range(n)]
    return ~torch.tensor(wanted, dtype=torch.bool, device=DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_group_of_layers_agrees_with_the_definition(name: str, dtype: torch.dtype) -> None:
    layers = make_layers(dtype)
    route = workload(name, layers.keys)
    x, y, bias = inputs(route, dtype)
    base_bias = random.choice([bias, None])
    wanted = layers.definition(y, x, route, base_bias)
    out = y.clone()
    with torch.no_grad():
        KernelGroup(layers.slots).apply(out, x, route, base_bias)
    torch.testing.assert_close(out.double(), wanted, **TOLERANCES[dtype])
    plain = rows_of_the_base(route)
    assert torch.equal(out[plain], y[plain])


@pytest.mark.parametrize("kind", KINDS)
def test_apply_lora_takes_the_kernels_where_the_slots_are_on_a_device(kind: str) -> None:
    layers = make_layers(torch.float32, (kind,))
    route = workload("mix_of_all", layers.keys)
    x, y, bias = inputs(route, torch.float32)
    for member, slots, part, own_bias in zip(
        layers.members, layers.slots, y.split(SIZES, dim=1), bias.split(SIZES), strict=True
    ):
        wanted = definition(part, x, member, route, own_bias)
        with torch.no_grad():
            out = apply_lora(part.clone(), x, slots, route, own_bias)
        assert any(isinstance(found, RoutePlan) for found in route.cache.values())
        torch.testing.assert_close(out.double(), wanted, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("per_row", [2, 5])
def test_rows_of_several_tokens_and_large_tiles(per_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MANY_TOKENS", 64)
    layers = make_layers(torch.float32)
    route = workload("skewed", layers.keys)
    x, y, bias = inputs(route, torch.float32, per_row=per_row)
    wanted = layers.definition(y, x, route, bias)
    with torch.no_grad():
        KernelGroup(layers.slots).apply(y, x, route, bias)
    (plan,) = [found for found in route.cache.values() if isinstance(found, RoutePlan)]
    assert plan.tile_tokens == (plans.LARGE_TILE if len(x) >= 64 else plans.SMALL_TILE)
    torch.testing.assert_close(y.double(), wanted, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_what_is_in_another_adapters_slot_never_leaks(value: float) -> None:
    layers = make_layers(torch.float32)
    poisoned, good, *_ = random.sample(layers.keys, 3)
    wanted_adapters = [Member({k: v for k, v in m.adapters.items() if k != poisoned}) for m in layers.members]
    for slots in layers.slots:
        for tensor in [] if (found := slots.folded(poisoned)) is None else found.tensors():
            tensor.fill_(value)
    route = Route([Run({}, 3), Run({poisoned: 1.0}, 3), Run({good: 1.0}, 2), Run({99: 1.0}, 2), Run({}, 1)])
    x, y, bias = inputs(route, torch.float32)
    out = y.clone()
    with torch.no_grad():
        KernelGroup(layers.slots).apply(out, x, route, bias)
    clean = Layers(layers.bank, wanted_adapters, torch.float32)
    healthy = [row for row in range(len(y)) if not 3 <= row < 6]
    wanted = clean.definition(y, x, route, bias)
    torch.testing.assert_close(out[healthy].double(), wanted[healthy], **TOLERANCES[torch.float32])
    for rows in (slice(0, 3), slice(8, 11)):
        assert torch.equal(out[rows].view(torch.int32), y[rows].view(torch.int32))


def test_an_adapter_that_does_not_touch_a_layer_leaves_its_bits() -> None:
    layers = make_layers(torch.bfloat16)
    layers.bank.load(SLOTS - 1, {"1": random_folded(8, SIZES[1], "both", torch.bfloat16)})
    route = Route([Run({SLOTS - 1: 1.0}, 4)])
    x, y, bias = inputs(route, torch.bfloat16)
    y[:2] = -0.0
    out = y.clone()
    with torch.no_grad():
        KernelGroup(layers.slots).apply(out, x, route, bias)
    before, after = y.view(torch.int16).split(SIZES, dim=1), out.view(torch.int16).split(SIZES, dim=1)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_nothing_is_launched_for_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = make_layers(torch.float32)
    untouched = SLOTS - 1
    layers.bank.load(untouched, {"1": random_folded(8, SIZES[1], "lora", torch.float32)})

    def fail(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(kernels, "apply_plan", fail)
    x, y, _ = inputs(Route([Run({}, 4)]), torch.float32)
    with torch.no_grad():
        for route in (Route([Run({}, 4)]), Route([Run({0: 0.0}, 4)])):
            assert apply_lora(y, x, layers.slots[0], route, None) is y
        KernelGroup(layers.slots[:1]).apply(y[:, : SIZES[0]], x, Route([Run({untouched: 1.0}, 4)]), None)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_adapters_of_another_dtype_than_the_model(stored: torch.dtype) -> None:
    layers = make_layers(stored)
    dtype = torch.float32 if stored == torch.bfloat16 else torch.bfloat16
    route = workload("distinct", layers.keys)
    x, y, bias = inputs(route, dtype)
    wanted = layers.definition(y, x, route, bias)
    with torch.no_grad():
        KernelGroup(layers.slots).apply(y, x, route, bias)
    torch.testing.assert_close(y.double(), wanted, **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("name", ["base_only", "distinct", "uniform_mix", "zipf"])
def test_one_plan_of_fixed_size_serves_every_batch(name: str) -> None:
    layers = make_layers(torch.float32)
    plan = RoutePlan(24, 80, plans.SMALL_TILE, DEVICE, 64)
    group = KernelGroup(layers.slots)
    address = plan.tokens.data_ptr()
    for again in ("skewed", name):
        route = workload(again, layers.keys)
        tiles = tiles_of(route, route.num_rows, plan.tile_tokens, SLOTS)
        assert plan.fits(tiles)
        plan.fill(tiles)
        x, y, bias = inputs(route, torch.float32)
        wanted = layers.definition(y, x, route, bias)
        before = y.clone()
        with torch.no_grad():
            group.apply(y, x, PlannedRoute(route.num_rows, plan, max(RANKS)), bias)
        torch.testing.assert_close(y.double(), wanted, **TOLERANCES[torch.float32])
        plain = rows_of_the_base(route)
        assert torch.equal(y[plain], before[plain])
    assert plan.tokens.data_ptr() == address


def test_tiles_hold_every_token_that_wants_an_adapter_once() -> None:
    route = workload("mix_of_all", list(range(5)))
    tiles = tiles_of(route, 3 * route.num_rows, 16, SLOTS)
    rows = [weights for weights, n in route.runs for _ in range(3 * n)]
    seen = {}
    for tile in tiles:
        assert 0 < len(tile.tokens) <= 16
        for place, token in enumerate(tile.tokens):
            assert token not in seen
            seen[token] = {slot: column[place] for slot, column in zip(tile.slots, tile.weights, strict=True)}
    assert seen == {i: weights for i, weights in enumerate(rows) if weights}
    assert not RoutePlan(1, 1, 16, DEVICE, 16).fits(tiles)
