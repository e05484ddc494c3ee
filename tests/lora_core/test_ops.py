"""`apply_lora` agrees with its definition in every form, and LoraLinear's gradients are PEFT's."""

import copy
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core import LoraLinear, Route, Router, Run, apply_lora
from lora_core.maths import Folded
from lora_core.ops import cpu, reference
from lora_core.slots import LayerSlots, SlotBank

I, O, SLOTS = 24, 20, 12  # noqa: E741 - the names of the literature
RANKS = [1, 2, 4, 8, 16, 64]
# Kinds of adapter by what they have beside A and B.
KINDS = {"lora": (False, False), "dora": (True, False), "bias": (False, True), "both": (True, True)}
# Per dtype of the arithmetic: allowed difference from the definition in float64, for outputs of about 1 to 50.
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 8e-2},
}
FORMS = {"segments": -(1 << 60), "dense": 1 << 60}


@dataclass(frozen=True)
class Resident:
    """A layer's slots with adapters in them, and the same arrays for the definition."""

    slots: LayerSlots
    adapters: Mapping[int, Folded]

    def folded(self, key: Any) -> Folded | None:
        """The adapter in float64 (`AdapterSource`)."""
        return self.adapters[key].to(torch.float64) if key in self.adapters else None


def random_folded(rank: int, kind: str, dtype: torch.dtype) -> Folded:
    has_gain, has_bias = KINDS[kind]
    return Folded(
        torch.randn(rank, I) / I**0.5,
        torch.randn(rank, O) / rank**0.5,
        0.3 * torch.randn(O) if has_gain else None,
        torch.randn(O) if has_bias else None,
    ).to(dtype)


def resident(dtype: torch.dtype, kinds: tuple[str, ...] = tuple(KINDS)) -> Resident:
    """Adapters of ragged ranks in all slots but three, one of which was never used, with holes from freed ones."""
    slots = LayerSlots(I, O, SLOTS, dtype=dtype, device=torch.device("cpu"))
    bank = SlotBank({"layer": slots}, SLOTS)
    order = random.sample(range(SLOTS), SLOTS - 1)
    adapters = {}
    for i, slot in enumerate(order):
        adapters[slot] = random_folded(random.choice(RANKS), kinds[i % len(kinds)], dtype)
        bank.load(slot, {"layer": adapters[slot]})
    for slot in order[3:5]:
        bank.free(slot)
        del adapters[slot]
    bank.check_integrity()
    return Resident(slots, adapters)


def workload(name: str, keys: list[int]) -> Route:
    """A route of 24 to 40 rows, by the name of its kind of traffic."""

    def rows(choice: Any) -> Route:
        return Route([Run(choice(i), random.randint(0, 3)) for i in range(20)] + [Run(choice(20), 4)])

    zipf = [1 / (1 + i) for i in range(len(keys))]
    mixes: dict[str, Any] = {
        "base_only": lambda i: {},
        "identical": lambda i: {keys[0]: 1.0},
        "distinct": lambda i: {keys[i % len(keys)]: 1.0},
        "skewed": lambda i: {keys[0] if random.random() < 0.8 else random.choice(keys): 1.0},
        "zipf": lambda i: {random.choices(keys, zipf)[0]: 1.0},
        "half_base": lambda i: {keys[i % 3]: 1.0} if i % 2 else {},
        "uniform_mix": lambda i: dict.fromkeys(random.sample(keys, 3), 1 / 3),
        "mix_of_all": lambda i: {key: random.uniform(-1, 1) for key in keys},
        "negative": lambda i: {keys[i % len(keys)]: -1.5, keys[0]: 0.5},
        "absent": lambda i: {99: 1.0, keys[i % len(keys)]: 1.0} if i % 3 else {98: 1.0},
        "zero_weights": lambda i: {keys[0]: 0.0, keys[1]: 1.0},
    }
    return rows(mixes[name])


WORKLOADS = [
    "base_only",
    "identical",
    "distinct",
    "skewed",
    "zipf",
    "half_base",
    "uniform_mix",
    "mix_of_all",
    "negative",
    "absent",
    "zero_weights",
]


def definition(y: Tensor, x: Tensor, adapters: Any, route: Route, bias: Tensor | None) -> Tensor:
    """The reference in float64."""
    return reference.apply(y.double(), x.double(), adapters, route, None if bias is None else bias.double())


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one of the two forms."""
    monkeypatch.setattr(cpu, "SEGMENT_ROWS", FORMS[request.param])
    return request.param


def assert_took(form: str, route: Route) -> None:
    assert len(route.cache) == 1
    (plan,) = route.cache.values()
    assert (plan == cpu.SEGMENTS) == (form == "segments")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_slots_agree_with_the_definition(name: str, dtype: torch.dtype, form: str) -> None:
    adapters = resident(dtype)
    route = workload(name, list(adapters.adapters))
    x, y = torch.randn(route.num_rows, I).to(dtype), torch.randn(route.num_rows, O).to(dtype)
    base_bias = torch.randn(O).to(dtype)
    wanted = definition(y, x, adapters, route, base_bias)
    with torch.no_grad():
        out = apply_lora(y.clone(), x, adapters.slots, route, base_bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, **TOLERANCES[dtype])
    plain = torch.tensor([not any(weights.values()) for weights, n in route.runs for _ in range(n)], dtype=torch.bool)
    assert torch.equal(out[plain], y[plain])
    if name == "base_only":
        assert torch.equal(out, y)
    else:
        assert_took(form, route)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_base_bias", [True, False])
def test_each_kind_alone(kind: str, has_base_bias: bool, form: str) -> None:
    adapters = resident(torch.float32, (kind,))
    route = workload("mix_of_all", list(adapters.adapters))
    x, y = torch.randn(route.num_rows, I), torch.randn(route.num_rows, O)
    base_bias = torch.randn(O) if has_base_bias else None
    wanted = definition(y, x, adapters, route, base_bias)
    with torch.no_grad():
        out = apply_lora(y.clone(), x, adapters.slots, route, base_bias)
    torch.testing.assert_close(out.double(), wanted, **TOLERANCES[torch.float32])
    assert_took(form, route)


@pytest.mark.parametrize("stored", TOLERANCES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_slots_of_another_dtype_than_the_model(dtype: torch.dtype, stored: torch.dtype) -> None:
    adapters = resident(stored)
    route = workload("distinct", list(adapters.adapters))
    x, y = torch.randn(route.num_rows, I).to(dtype), torch.randn(route.num_rows, O).to(dtype)
    wanted = definition(y, x, adapters, route, None)
    with torch.no_grad():
        out = apply_lora(y.clone(), x, adapters.slots, route, None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("has_gain", [False, True])
def test_a_row_keeps_its_bits_beside_an_adapter_that_overflows(has_gain: bool, form: str) -> None:
    adapters = resident(torch.float32)
    keys = list(adapters.adapters)
    poisoned = adapters.slots.folded(keys[1])
    assert poisoned is not None
    for tensor in poisoned.tensors()[: 3 if has_gain else 2]:
        tensor.fill_(1e30)
    runs = [Run({}, 3), Run({keys[1]: 1.0}, 3), Run({keys[0]: 1.0}, 2), Run({99: 1.0}, 2), Run({keys[1]: -1.0}, 1)]
    route = Route(runs)
    x, y = torch.randn(route.num_rows, I), torch.randn(route.num_rows, O)
    wanted = definition(y, x, adapters, route, None)
    with torch.no_grad():
        out = apply_lora(y.clone(), x, adapters.slots, route, None)
    assert_took(form, route)
    for rows in (slice(0, 3), slice(8, 10)):
        assert torch.equal(out[rows].view(torch.int32), y[rows].view(torch.int32))
    torch.testing.assert_close(out[6:8].double(), wanted[6:8], **TOLERANCES[torch.float32])
    assert not torch.isfinite(out[3:6]).any()


@pytest.mark.parametrize("tokens_per_row", [1, 2, 5])
def test_rows_of_several_tokens(tokens_per_row: int, form: str) -> None:
    adapters = resident(torch.float32)
    route = workload("negative", list(adapters.adapters))
    longer = Route([Run(weights, n * tokens_per_row) for weights, n in route.runs])
    x, y = torch.randn(longer.num_rows, I), torch.randn(longer.num_rows, O)
    with torch.no_grad():
        out = apply_lora(y.clone(), x, adapters.slots, route, None)
        assert torch.equal(out, apply_lora(y.clone(), x, adapters.slots, longer, None))
    torch.testing.assert_close(out.double(), definition(y, x, adapters, route, None), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("contiguous", [True, False])
def test_leading_dimensions(contiguous: bool, form: str) -> None:
    adapters = resident(torch.float32)
    keys = list(adapters.adapters)
    x, y = torch.randn(3, 5, I), torch.randn(3, 5, O)
    if not contiguous:
        x, y = torch.randn(5, 3, I).transpose(0, 1), torch.randn(5, 3, O).transpose(0, 1)
    route = Route([Run({keys[0]: 1.0}, 1), Run({}, 1), Run({keys[1]: 0.5, keys[2]: 2.0}, 1)])
    wanted = definition(y.reshape(15, O), x.reshape(15, I), adapters, route, None).view(3, 5, O)
    with torch.no_grad():
        out = apply_lora(y.clone(), x, adapters.slots, route, None)
    assert out.shape == (3, 5, O)
    torch.testing.assert_close(out.double(), wanted, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(3, 4), (3, 2), (5, 1), (2, 7)])
def test_tokens_that_do_not_divide_into_rows(num_rows: int, num_tokens: int) -> None:
    adapters = resident(torch.float32)
    route = Route([Run(dict.fromkeys(adapters.adapters, 1.0), num_rows)])
    with pytest.raises(ValueError, match=f"{num_tokens} tokens cannot be split over {num_rows} rows"):
        apply_lora(torch.zeros(num_tokens, O), torch.zeros(num_tokens, I), adapters.slots, route, None)


def test_no_tokens(form: str) -> None:
    adapters = resident(torch.float32)
    route = Route.uniform(dict.fromkeys(adapters.adapters, 1.0))
    with torch.no_grad():
        assert apply_lora(torch.zeros(0, O), torch.zeros(0, I), adapters.slots, route, None).shape == (0, O)


class Unused:
    """Adapters that nobody may ask for."""

    def folded(self, key: Any) -> Folded | None:
        raise AssertionError("asked for an adapter")


@pytest.mark.parametrize("runs", [[], [Run({}, 4)], [Run({1: 0.0}, 4)], [Run({1: 1.0}, 0)]], ids=str)
def test_nothing_is_computed_for_the_base_model(runs: list[Run]) -> None:
    x, y = torch.randn(4, I), torch.randn(4, O)
    assert apply_lora(y, x, Unused(), Route(runs), None) is y
    router = Router()
    base = nn.Linear(I, O)
    layer = LoraLinear(base, router)
    layer.folded = Unused().folded  # type: ignore[method-assign]
    calls: list[Tensor] = []
    base.register_forward_hook(lambda module, args, out: calls.append(out))
    with router.use(Route(runs)):
        assert layer(x) is calls[-1]
    assert layer(x) is calls[-1]


def test_the_output_of_the_base_layer_is_kept_for_autograd() -> None:
    adapters = resident(torch.float32)
    x, y = torch.randn(4, I), torch.randn(4, O)
    before = y.clone()
    out = apply_lora(y, x, adapters.slots, Route.uniform({next(iter(adapters.adapters)): 1.0}), None)
    assert torch.equal(y, before)
    assert not torch.equal(out, before)


@dataclass(frozen=True)
class Parameters:
    """Adapters of all kinds as leaves of an autograd graph."""

    adapters: Mapping[int, Folded]

    def folded(self, key: Any) -> Folded | None:
        """The adapter (`AdapterSource`)."""
        return self.adapters.get(key)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "base_only"])
def test_gradients_of_a_mixed_batch_are_those_of_the_definition(name: str) -> None:
    adapters = Parameters({i: random_folded(RANKS[i], kind, torch.float64) for i, kind in enumerate(KINDS)})
    leaves = [tensor.requires_grad_() for adapter in adapters.adapters.values() for tensor in adapter.tensors()]
    route = workload(name, list(adapters.adapters))
    for bias in (None, torch.randn(O, dtype=torch.float64)):
        gradients = []
        x, y = torch.randn(route.num_rows, I, dtype=torch.float64), torch.randn(route.num_rows, O, dtype=torch.float64)
        upstream = torch.randn_like(y)
        for apply in (apply_lora, reference.apply):
            inputs = [x.clone().requires_grad_(), y.clone().requires_grad_(), *leaves]
            out = apply(inputs[1], inputs[0], adapters, route, bias)
            gradients.append(torch.autograd.grad(out, inputs, upstream, materialize_grads=True, allow_unused=True))
        for mine, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, wanted)


GRADIENTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "lora_bias": {"r": 4, "lora_alpha": 6, "lora_bias": True},
    "lora_dropout": {"r": 4, "lora_alpha": 6, "lora_dropout": 0.4},
    "dora_dropout": {"r": 4, "lora_alpha": 6, "lora_dropout": 0.4, "use_dora": True},
}


@pytest.mark.parametrize("variant", GRADIENTS)
@pytest.mark.parametrize("base", [nn.Linear(I, O), nn.Linear(I, O, bias=False), Conv1D(O, I)], ids=str)
def test_outputs_and_gradients_equal_peft(base: nn.Module, variant: str, seed: int) -> None:
    config = GRADIENTS[variant]
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_()
    theirs = nn.ModuleDict({"layer": copy.deepcopy(base)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, and of a bias without a base bias
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["layer"], **config), theirs)
    router = Router()
    ours = LoraLinear(copy.deepcopy(base), router)
    ours.requires_grad_(False)
    ours.add_adapter(
        "default",
        config["r"],
        config["lora_alpha"],
        theirs["layer"].scaling["default"],
        use_dora=config.get("use_dora", False),
        lora_bias=config.get("lora_bias", False),
        dropout=config.get("lora_dropout", 0.0),
    )
    for name, parameter in theirs["layer"].named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    ours.load_state_dict(theirs["layer"].state_dict())

    x, upstream = torch.randn(3, 5, I), torch.randn(3, 5, O)
    results = []
    for layer in (ours.train(), theirs["layer"].train()):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(seed)  # of the dropout
        with router.use(Route.uniform({"default": 1.0})):
            y = layer(leaf)
        (y * upstream).sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": leaf.grad} | gradients)
    mine, wanted = results
    assert mine.keys() == wanted.keys()
    assert len(mine) == 4 + ("dora" in variant) + ("bias" in variant)
    for name in wanted:
        torch.testing.assert_close(mine[name], wanted[name], rtol=1e-5, atol=1e-5 * float(wanted[name].abs().max()))
