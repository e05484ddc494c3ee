"""Layers computed as one give what each gives alone, whoever is in the batch and whatever is loaded and freed."""

import random
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core import LoraLinear, Route, Router, Run, SlotBank, attach_slots, packing
from lora_core.maths import Folded
from lora_core.ops import reference
from lora_core.packing import PackedWeight
from lora_core.shared import PackedLinear, find_shared_inputs, share_inputs
from tests.native_kinds import native_kind

__all__ = ["native_kind"]

I = 40  # noqa: E741 - the name of the literature
SIZES = {"q": 48, "k": 16, "v": 16, "alone": 24}
SLOTS = 8
TOLERANCES = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 3e-2, "atol": 1.5e-1}}


class Block(nn.Module):
    """q, k and v read x itself; `alone` reads a tensor of its own."""

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        for name, size in SIZES.items():
            self.add_module(name, nn.Linear(I, size, bias=bias, dtype=dtype))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x if name != "alone" else x * 1.0) for name in SIZES}


class Model:
    """A block before and after its layers are joined, with the same adapters for the definition."""

    def __init__(self, dtype: torch.dtype, bias: bool = True) -> None:
        self.block = Block(dtype, bias)
        self.weights = {name: getattr(self.block, name).weight.detach().clone() for name in SIZES}
        self.biases = {name: getattr(self.block, name).bias for name in SIZES}
        self.router = Router()
        self.layers = {name: LoraLinear(getattr(self.block, name), self.router) for name in SIZES}
        for name, layer in self.layers.items():
            setattr(self.block, name, layer)
        self.bank: SlotBank = attach_slots(self.layers, SLOTS, dtype=dtype)
        self.dtype = dtype
        self.adapters: dict[int, dict[str, Folded]] = {}
        x = torch.randn(2, I).to(dtype)
        self.names = find_shared_inputs(self.layers, lambda: self.block(x))
        self.groups = share_inputs(self.layers, self.names)

    def load(self, slot: int) -> None:
        """A random adapter: LoRA, DoRA or with biases, on some of the layers."""
        modules = {}
        for name in random.sample(sorted(SIZES), random.randint(1, len(SIZES))):
            size, rank = SIZES[name], random.choice([1, 3, 8, 16])
            gain = 0.3 * torch.randn(size) if random.random() < 0.5 else None
            bias = torch.randn(size) if random.random() < 0.3 else None
            a, b = torch.randn(rank, I) / I**0.5, torch.randn(rank, size) / rank**0.5
            modules[name] = Folded(a, b, gain, bias).to(self.dtype)
        self.bank.load(slot, modules)
        self.adapters[slot] = modules

    def free(self, slot: int) -> None:
        self.bank.free(slot)
        del self.adapters[slot]

    def definition(self, name: str, x: Tensor, route: Route) -> Tensor:
        bias = self.biases[name]
        y = nn.functional.linear(x, self.weights[name], bias).double()
        return reference.apply(
            y, x.double(), _Source(self.adapters, name), route, None if bias is None else bias.double()
        )


class _Source:
    def __init__(self, adapters: Mapping[int, Mapping[str, Folded]], name: str) -> None:
        self._adapters, self._name = adapters, name

    def folded(self, key: object) -> Folded | None:
        folded = self._adapters[key].get(self._name) if isinstance(key, int) else None
        return None if folded is None else folded.to(torch.float64)


def random_route(slots: list[int]) -> Route:
    """Runs of one row first, as in a batch that decodes, then longer ones."""

    def weights() -> dict[int, float]:
        kind = random.random()
        if kind < 0.25 or not slots:
            return {}
        if kind < 0.7:
            return {random.choice(slots): 1.0}
        return {slot: random.uniform(-1, 1) for slot in random.sample(slots, min(3, len(slots)))}

    longer = [Run(weights(), random.randint(2, 9)) for _ in range(random.randint(0, 3))]
    return Route([Run(weights(), 1) for _ in range(random.randint(0, 9))] + longer + [Run({}, 1)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.usefixtures("native_kind")
def test_joined_layers_agree_with_the_definition_through_loads_and_frees(dtype: torch.dtype, bias: bool) -> None:
    model = Model(dtype, bias)
    assert model.names == [["q", "k", "v"], ["alone"]]
    assert [len(group.members) for group in model.groups] == [3, 1]
    for _ in range(40):
        slot = random.randrange(SLOTS)
        if slot in model.adapters:
            model.free(slot)
        else:
            model.load(slot)
        route = random_route(list(model.adapters))
        for _ in range(2):  # a route is used again by the steps that follow
            x = torch.randn(route.num_rows, I).to(dtype)
            with torch.inference_mode():
                plain = model.block(x)
                with model.router.use(route):
                    mixed = model.block(x)
            for name, out in mixed.items():
                expected = model.definition(name, x, route)
                torch.testing.assert_close(out.double(), expected, **TOLERANCES[dtype], msg=name)
                start = 0
                for weights, num_rows in route.runs:
                    if not weights:
                        assert torch.equal(out[start : start + num_rows], plain[name][start : start + num_rows])
                    start += num_rows


@pytest.mark.usefixtures("native_kind")
def test_a_kept_route_does_not_keep_a_slots_former_adapter() -> None:
    model = Model(torch.float32)
    for slot in range(4):
        model.load(slot)
    route = Route([*(Run({slot: 1.0}, 1) for slot in range(4)), Run({0: 0.5, 3: -0.7}, 1), Run({2: 1.0}, 9)])
    for _ in range(12):
        slot = random.randrange(4)
        model.free(slot)
        model.load(slot)
        x = torch.randn(route.num_rows, I)
        with torch.inference_mode(), model.router.use(route):
            out = model.block(x)
        for name, y in out.items():
            torch.testing.assert_close(y.double(), model.definition(name, x, route), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.usefixtures("native_kind")
def test_another_adapters_infinity_stays_its_own() -> None:
    model = Model(torch.float32)
    model.bank.load(0, {name: Folded(torch.full((2, I), 3e38), torch.ones(2, size)) for name, size in SIZES.items()})
    model.bank.load(1, {name: Folded(torch.ones(2, I), torch.ones(2, size)) for name, size in SIZES.items()})
    x = torch.rand(3, I) + 1
    with torch.inference_mode(), model.router.use(Route([Run({0: 1.0}, 1), Run({1: 1.0}, 1), Run({}, 1)])):
        out = model.block(x)
    for y in out.values():
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()


def test_a_joined_layer_called_out_of_turn_is_computed_for_its_own_input() -> None:
    model = Model(torch.float32)
    x, other = torch.randn(3, I), torch.randn(3, I)
    alone = {name: nn.functional.linear(x, model.weights[name], model.biases[name]) for name in SIZES}
    with torch.inference_mode():
        model.layers["q"](other)
        torch.testing.assert_close(model.layers["v"](x), alone["v"])
        q = model.layers["q"](x)
        q.zero_()  # the caller may do with its part what it likes
        torch.testing.assert_close(model.layers["k"](x), alone["k"])
        torch.testing.assert_close(model.layers["q"](x), alone["q"])
    torch.testing.assert_close(model.layers["k"](x), alone["k"])  # with autograd on: by itself


def test_the_weights_read_back_bit_for_bit() -> None:
    for dtype in TOLERANCES:
        model = Model(dtype)
        for name, layer in model.layers.items():
            assert isinstance(layer.base_layer, PackedLinear)
            assert torch.equal(layer.weight, model.weights[name])
            assert layer.bias is model.biases[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("has_onednn", [True, False])
def test_a_packed_weight_is_the_weight(
    dtype: torch.dtype, has_onednn: bool, native_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_onednn:
        monkeypatch.setattr(packing, "_packers", lambda: None)
    is_packable = dtype in packing.PACKABLE and (native_kind != "off" or packing._packers() is not None)
    weight, bias = torch.randn(37, 19).to(dtype), torch.randn(37).to(dtype)
    packed_weight = PackedWeight(weight)
    assert packed_weight.is_packed == is_packable
    assert torch.equal(packed_weight.unpack(), weight)
    for num_rows in (0, 1, 5, 64):
        x = torch.randn(num_rows, 19).to(dtype)
        for b in (None, bias):
            expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            torch.testing.assert_close(packed_weight(x, b).double(), expected, rtol=2e-2, atol=5e-2)


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    class Other(nn.Linear):
        pass

    router = Router()
    layers = {"a": LoraLinear(Other(8, 8), router), "b": LoraLinear(Conv1D(6, 8), router)}
    attach_slots(layers, 2, dtype=torch.float32)
    weight = layers["b"].base_layer.weight.detach().clone()
    assert len(share_inputs(layers, [["a"], ["b"]])) == 1
    assert isinstance(layers["a"].base_layer, Other)
    x = torch.randn(3, 8)
    with torch.inference_mode():
        torch.testing.assert_close(layers["b"](x), x @ weight + layers["b"].bias)
