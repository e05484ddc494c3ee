"""Combining adapters: PEFT's results under equal seeds, and the identities that every method owes."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_core import (
    AdapterNotFoundError,
    ConfigError,
    LoraConfig,
    LoraModel,
    Route,
    UnsupportedError,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from lora_core.mixing import COMBINATION_TYPES, MixOptions, MixPart, mix_module, svd_factors
from lora_core.patterns import pattern_fields
from lora_core.targets import match_targets
from lora_core.weighted import add_weighted_adapter
from lora_core.weights import LoraTensors
from tests.peft_adapters import peft_model, save
from tests.tiny_models import VOCABULARY, tiny_model

FACTOR_TYPES = [kind for kind in COMBINATION_TYPES if kind != "svd" and not kind.endswith("_svd")]
SVD_TYPES = [kind for kind in COMBINATION_TYPES if kind not in FACTOR_TYPES]
SOURCES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 13},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "wide": {"r": 6, "lora_alpha": 3},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2, "c_proj": 6}, "alpha_pattern": {"q_proj": 16}},
    "bias": {"r": 4, "lora_alpha": 6, "lora_bias": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


def both(
    architecture: str, names: list[str], seed: int, tmp_path: Path, dtype: torch.dtype = torch.float32
) -> tuple[LoraModel, Any]:
    """Our model and PEFT's, with the same adapters."""
    base = tiny_model(architecture, seed).to(dtype)
    theirs: Any = None
    ours = LoraModel(copy.deepcopy(base)).eval()
    for i, name in enumerate(names):
        folder = save(peft_model(base, architecture, seed + i, **SOURCES[name]), tmp_path / name)
        ours.load_adapter(folder, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if theirs is None:
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name)
            else:
                theirs.load_adapter(folder, adapter_name=name)
    return ours, theirs.base_model


def mix_both(ours: LoraModel, theirs: Any, seed: int, *args: Any, **options: Any) -> None:
    """Mix in both under the same seed.

    Both draw the new adapter's starting values first, equally many but in float64; there both are seeded again after.
    """
    add, freeze = ours.add_adapter, peft.tuners.lora.model._freeze_adapter

    def seeded_again(function: Any) -> Any:
        def call(*args: Any) -> None:
            function(*args)
            if next(ours.model.parameters()).dtype == torch.float64:
                torch.manual_seed(seed)

        return call

    with (
        warnings.catch_warnings(),
        mock.patch.object(ours, "add_adapter", seeded_again(add)),
        mock.patch.object(peft.tuners.lora.model, "_freeze_adapter", seeded_again(freeze)),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        add_weighted_adapter(ours, *args, **options)
        torch.manual_seed(seed)
        theirs.add_weighted_adapter(*args, **options)


def matrix(model: Any, name: str, adapter: str) -> Tensor:
    """PEFT's delta of a layer as [O, I]."""
    layer = model.model.get_submodule(name)
    delta = layer.get_delta_weight(adapter).detach()
    return delta.T if layer.fan_in_fan_out else delta


def assert_equal_deltas(ours: LoraModel, theirs: Any, adapter: str, factor: float = 1.0) -> None:
    names = [name for name, layer in ours.layers.items() if layer.has_factors(adapter)]
    assert names == [n for n, m in theirs.model.named_modules() if adapter in getattr(m, "lora_A", {})]
    for name in names:
        wanted = matrix(theirs, name, adapter) * factor
        found = ours.layers[name].delta_matrix(adapter)
        assert_near(found, wanted)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() <= 1e-5 * wanted.norm(), float((found - wanted).norm() / wanted.norm())


def svd_dtype(kind: str) -> torch.dtype:
    """An SVD that is cut where two singular values are close says little in float32."""
    return torch.float64 if kind in SVD_TYPES else torch.float32


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_type_equals_peft(architecture: str, kind: str, seed: int, tmp_path: Path) -> None:
    ours, theirs = both(architecture, ["lora", "alpha", "rslora"], seed, tmp_path, svd_dtype(kind))
    for method in ("total", "frequency") if "ties" in kind else ("total",):
        options = {"combination_type": kind, "density": 0.6, "majority_sign_method": method}
        args = (["lora", "alpha", "rslora"], [0.7, -1.3, 0.4], method)
        mix_both(ours, theirs, seed, *args, **options)
        assert_equal_deltas(ours, theirs, method)
        assert all(layer.scaling[method] == 1.0 for layer in ours.layers.values())


class Shapes(nn.Module):
    """An embedding and convolutions of two kernel sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.wide = nn.Conv2d(3, 8, (3, 2), padding=1)
        self.point = nn.Conv2d(8, 10, 1)
        self.line = nn.Conv1d(10, 7, 3)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(ids), self.line(self.point(self.wide(image)).flatten(2))


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_embeddings_and_convolutions_equal_peft(kind: str, seed: int, tmp_path: Path) -> None:
    base = Shapes().to(svd_dtype(kind))
    targets = ["table", "wide", "point"] + (["line"] if kind in FACTOR_TYPES else [])  # PEFT's SVD of Conv1d fails
    theirs: Any = peft.LoraModel(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=targets), "a")
    theirs.peft_config["b"] = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    theirs.inject_adapter(theirs.model, "b")
    ours = LoraModel(
        base, {name: LoraConfig(r=4, lora_alpha=a, target_modules=targets) for name, a in (("a", 8), ("b", 6))}
    )
    for name in ("a", "b"):
        state = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(ours, adapter_name=name).items()}
        set_peft_model_state_dict(ours, state, adapter_name=name)
        peft.set_peft_model_state_dict(theirs, {k.removeprefix("base_model."): v for k, v in state.items()}, name)
    mix_both(ours, theirs, seed, ["a", "b"], [0.7, -1.2], "mix", combination_type=kind, density=0.6)
    for name in targets:
        layer, other = ours.layers[name], theirs.model.get_submodule(name)
        assert_near(layer.get_delta_weight("mix"), other.get_delta_weight("mix").detach())
    inputs = torch.randint(30, (2, 5)), torch.randn(2, 3, 6, 6, dtype=base.point.weight.dtype)
    ours.set_adapter("mix")
    theirs.set_adapter("mix")
    for found, wanted in zip(ours(*inputs), theirs(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in SVD_TYPES if "dare" not in kind])
def test_svd_of_what_peft_cannot_mix(kind: str) -> None:
    """Conv1d, and DoRA on an embedding and on convolutions: the weighted sum of whole deltas."""
    targets = ["table", "wide", "point", "line"]
    ours = LoraModel(Shapes(), {name: LoraConfig(r=3, target_modules=targets, use_dora=True) for name in ("a", "b")})
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".lora_" in name or "magnitude" in name:
                parameter.copy_(torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a density of 1 prunes nothing
        add_weighted_adapter(ours, ["a", "b"], [0.7, 0.4], "mix", kind, svd_rank=40, density=1.0)
    if kind != "ties_svd":
        for layer in ours.layers.values():
            assert_near(layer.delta_matrix("mix"), 0.7 * layer.delta_matrix("a") + 0.4 * layer.delta_matrix("b"))


def test_convolutions_with_groups_are_refused() -> None:
    model = LoraModel(nn.Sequential(nn.Conv2d(4, 6, 1, groups=2)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UnsupportedError, match="groups"):
        add_weighted_adapter(model, ["default"], [1.0], "mix", "cat")
    assert list(model.peft_config) == ["default"]


def test_full_weights_are_refused_by_name(seed: int) -> None:
    for field, value in (("modules_to_save", ["norm"]), ("trainable_token_indices", [3]), ("bias", "all")):
        model = LoraModel(tiny_model("opt", seed), LoraConfig(**{field: value}))
        with pytest.raises(UnsupportedError, match=field):
            add_weighted_adapter(model, ["default"], [1.0], "mix")


@pytest.mark.parametrize("options", [{}, {"svd_rank": 3}, {"svd_rank": 2, "svd_clamp": 0.9}, {"svd_rank": 10}], ids=str)
def test_svd_options_equal_peft(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    ours, theirs = both("llama", ["lora", "wide"], seed, tmp_path, torch.float64)
    for full in (True, False):
        mix_both(ours, theirs, seed, ["lora", "wide"], [0.5, 0.8], str(full), svd_full_matrices=full, **options)
        assert_equal_deltas(ours, theirs, str(full))


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "dare_linear_svd"])
def test_unequal_ranks_equal_peft_and_are_saved(kind: str, seed: int, tmp_path: Path) -> None:
    names = ["patterns", "wide"]
    ours, theirs = both("llama", names, seed, tmp_path, svd_dtype(kind))
    mix_both(ours, theirs, seed, names, [0.5, -0.8], "mix", combination_type=kind, density=0.5)
    assert_equal_deltas(ours, theirs, "mix")
    ours.float()
    assert_loads_in_peft(ours, seed, tmp_path)


def assert_loads_in_peft(ours: LoraModel, seed: int, tmp_path: Path) -> None:
    """The saved mix is the same adapter to PEFT."""
    ours.save_pretrained(tmp_path / "saved", "mix")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for what it has deprecated
        reloaded = peft.PeftModel.from_pretrained(tiny_model("llama", seed), tmp_path / "saved").eval()
    ours.set_adapter("mix")
    ids = torch.randint(3, VOCABULARY, (2, 7))
    with torch.no_grad():
        wanted = ours(input_ids=ids).logits
        torch.testing.assert_close(reloaded(input_ids=ids).logits, wanted, rtol=1e-5, atol=2e-5)
        ours.set_adapter([])
        assert not torch.allclose(ours(input_ids=ids).logits, wanted, atol=1e-2)


@pytest.mark.parametrize("kind", FACTOR_TYPES)
def test_a_mix_of_rank_patterns_can_be_saved(kind: str, seed: int, tmp_path: Path) -> None:
    """PEFT's own result of equal rank patterns says the largest rank everywhere and cannot be loaded."""
    ours, _ = both("llama", ["patterns"], seed, tmp_path)
    ours.load_adapter(tmp_path / "patterns", "twin")
    add_weighted_adapter(ours, ["patterns", "twin"], [0.5, 0.25], "mix", kind, density=0.7)
    assert {layer.tensors("mix").rank for layer in ours.layers.values()} == ({2, 4} if kind != "cat" else {4, 8})
    assert_loads_in_peft(ours, seed, tmp_path)


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
@pytest.mark.parametrize("source", ["lora", "alpha", "rslora", "patterns", "bias", "dora"])
def test_one_adapter_with_weight_1_returns_itself(source: str, kind: str, seed: int, tmp_path: Path) -> None:
    """PEFT's result of a single rsLoRA adapter is √r times too large."""
    ours, _ = both("llama", [source], seed, tmp_path)
    add_weighted_adapter(ours, [source], [1.0], "mix", kind, density=0.5)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    logits = []
    for name in (source, "mix"):
        ours.set_adapter(name)
        logits.append(ours(input_ids=ids).logits)
        assert all(layer.scaling["mix"] == 1.0 for layer in ours.layers.values())
    torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)
    for layer in ours.layers.values():
        assert_near(layer.delta_matrix("mix"), layer.delta_matrix(source))


def test_the_defect_of_a_single_rslora_adapter_is_peft_s(seed: int, tmp_path: Path) -> None:
    ours, theirs = both("llama", ["rslora"], seed, tmp_path)
    mix_both(ours, theirs, seed, ["rslora"], [1.0], "mix")
    assert_equal_deltas(ours, theirs, "mix", 1 / math.sqrt(SOURCES["rslora"]["r"]))


def weighted_sum(model: LoraModel, name: str, weights: dict[str, float]) -> Tensor:
    layer = model.layers[name]
    return torch.stack([weight * layer.delta_matrix(adapter) for adapter, weight in weights.items()]).sum(dim=0)


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("cat", ["lora", "wide", "rslora"]),
        ("svd", ["lora", "wide", "rslora"]),
        ("svd", ["dora", "rslora"]),
        ("ties_svd", ["lora"] * 2),
        ("magnitude_prune_svd", ["dora", "wide"]),
        ("dare_linear_svd", ["dora", "alpha"]),
    ],
    ids=str,
)
def test_at_full_rank_a_mix_is_the_weighted_sum(kind: str, sources: list[str], seed: int, tmp_path: Path) -> None:
    ours, _ = both("llama", list(dict.fromkeys(sources)), seed, tmp_path)
    weights = [0.5, -0.8, 1.4][: len(sources)]
    if len(set(sources)) < len(sources):
        weights = [0.75, 0.25]  # the same one twice: TIES' mean of the two is half of their sum
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a density of 1 prunes nothing
        add_weighted_adapter(ours, sources, weights, "mix", kind, svd_rank=48, density=1.0)
    share = 0.5 if kind == "ties_svd" else 1.0
    total: dict[str, float] = {}
    for source, weight in zip(sources, weights, strict=True):
        total[source] = total.get(source, 0.0) + weight * share
    for name, layer in ours.layers.items():
        assert_near(layer.delta_matrix("mix"), weighted_sum(ours, name, total))
    ids = torch.randint(3, VOCABULARY, (2, 7))
    logits = []
    for route in ({"mix": 1.0}, total):
        with ours.router.use(Route.uniform(route)), torch.no_grad():
            logits.append(ours.model(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", FACTOR_TYPES)
def test_factor_types_refuse_dora_by_name(kind: str, seed: int, tmp_path: Path) -> None:
    ours, _ = both("llama", ["dora", "lora"], seed, tmp_path)
    for sources, weights in ((["lora", "dora"], [1.0, 1.0]), (["dora"], [0.5])):
        with pytest.raises(UnsupportedError, match="DoRA"):
            add_weighted_adapter(ours, sources, weights, "mix", kind, density=0.5)
    assert sorted(ours.peft_config) == ["dora", "lora"]


def test_biases_are_summed(seed: int, tmp_path: Path) -> None:
    ours, _ = both("llama", ["bias", "lora"], seed, tmp_path)
    add_weighted_adapter(ours, ["lora", "bias"], [2.0, -0.5], "mix", "cat")
    for layer in ours.layers.values():
        wanted = -0.5 * layer.scaling["bias"] * layer.tensors("bias").bias
        torch.testing.assert_close(layer.tensors("mix").bias, wanted)
    assert_loads_in_peft(ours, seed, tmp_path)


def test_adapters_on_different_layers(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    ours = LoraModel(copy.deepcopy(base)).eval()
    targets: dict[str, Any] = {"list": ["q_proj"], "regex": r".*\.1\.mlp\.up_proj", "late": ["v_proj", "q_proj"]}
    for name, target in targets.items():
        more = {"layers_to_transform": [1]} if name == "late" else {}
        folder = save(peft_model(base, "llama", seed, r=4, target_modules=target, **more), tmp_path / name)
        ours.load_adapter(folder, name)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    weights = {"list": 0.3, "regex": 2.0, "late": -1.0}
    add_weighted_adapter(ours, list(weights), list(weights.values()), "mix", "cat")
    ranks = {name: layer.tensors("mix").rank for name, layer in ours.layers.items()}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.self_attn.v_proj": 4,
        "model.layers.1.mlp.up_proj": 4,
    }
    for name, layer in ours.layers.items():
        own = {adapter: weight for adapter, weight in weights.items() if layer.has_factors(adapter)}
        assert_near(layer.delta_matrix("mix"), weighted_sum(ours, name, own))
    assert_loads_in_peft(ours, seed, tmp_path)
    after = dict(ours.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(p.requires_grad for name, p in after.items() if ".mix." in name)


def test_an_error_leaves_nothing_behind(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both("llama", ["lora", "wide"], seed, tmp_path)
    ours.set_adapter("lora")
    before = {name: (p.clone(), p.requires_grad) for name, p in ours.named_parameters()}
    calls = []

    def fails_late(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mix_module(*args, **options)

    monkeypatch.setattr("lora_core.weighted.mix_module", fails_late)
    with pytest.raises(KeyboardInterrupt):
        add_weighted_adapter(ours, ["lora", "wide"], [1.0, 1.0], "mix")
    monkeypatch.undo()
    after = {name: (p, p.requires_grad) for name, p in ours.named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[name][0]) and g == after[name][1] for name, (p, g) in before.items())
    assert ours.active_adapters == ["lora"]
    add_weighted_adapter(ours, ["lora", "wide"], [1.0, 1.0], "mix")
    assert ours.active_adapters == ["lora"]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"adapter_name": "lora"}, ConfigError, "already exists"),
        ({"adapters": ["lora", "zz"]}, AdapterNotFoundError, "Adapter zz does not exist"),
        ({"adapters": []}, ConfigError, "0 adapters"),
        ({"weights": [1.0]}, ConfigError, "1 weights"),
        ({"combination_type": "nope"}, ConfigError, "Invalid combination_type: nope"),
        ({"combination_type": "linear"}, ConfigError, "All adapters must have the same r value"),
        ({"combination_type": "ties_svd"}, ConfigError, "needs `density`"),
        ({"combination_type": "ties_svd", "density": -0.1}, ConfigError, "Density should be >= 0"),
        ({"combination_type": "dare_linear_svd", "density": 0.0}, ConfigError, "above 0"),
        ({"svd_rank": 0}, ConfigError, "svd_rank"),
        ({"svd_clamp": 1.5}, ConfigError, "svd_clamp"),
        ({"svd_driver": "zz"}, ConfigError, "svd_driver"),
        ({"svd_driver": "gesvd"}, ConfigError, "CUDA"),
        ({"majority_sign_method": "zz"}, ConfigError, "mask method"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], match: str, seed: int, tmp_path: Path
) -> None:
    ours, _ = both("llama", ["lora", "wide"], seed, tmp_path)
    arguments = {"adapters": ["lora", "wide"], "weights": [1.0, 1.0], "adapter_name": "mix"} | changes
    with pytest.raises(error, match=match):
        add_weighted_adapter(ours, **arguments)
    assert sorted(ours.peft_config) == ["lora", "wide"]


def test_the_fast_svd_equals_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        MixPart(LoraTensors(torch.randn(r, 40).double(), torch.randn(30, r).double()), scaling, weight)
        for r, scaling, weight in ((4, 0.5, 1.0), (6, 2.0, -0.7))
    ]
    for rank in (1, 4, 10, 30):  # in float64: where two singular values are close, the cut is unstable
        fast = mix_module(parts, MixOptions(), rank)
        delta = sum(part.weight * part.scaling * part.tensors.lora_B @ part.tensors.lora_A for part in parts)
        dense = svd_factors(delta, rank)
        assert fast.lora_A.shape == dense.lora_A.shape == (rank, 40)
        assert_near(fast.lora_B @ fast.lora_A, dense.lora_B @ dense.lora_A)
        kept = min(rank, 10)
        signs = (fast.lora_A * dense.lora_A)[:kept].sum(dim=1).sign()
        torch.testing.assert_close(fast.lora_A[:kept] * signs[:, None], dense.lora_A[:kept], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fast.lora_B[:, :kept] * signs, dense.lora_B[:, :kept], rtol=1e-3, atol=1e-3)


def test_half_precision_is_mixed_in_float32(seed: int) -> None:
    parts = [
        MixPart(LoraTensors(torch.randn(4, 40).bfloat16(), torch.randn(30, 4).bfloat16()), 0.5, weight)
        for weight in (1.0, -0.5)
    ]
    for kind in COMBINATION_TYPES:
        mixed = mix_module(parts, MixOptions(combination_type=kind, density=0.7), 8)
        assert mixed.lora_A.dtype == mixed.lora_B.dtype == torch.bfloat16
        assert torch.isfinite(mixed.lora_B @ mixed.lora_A).all()


def test_exact_patterns_name_every_module() -> None:
    modules = {"a.q": (4, 4), "b.a.q": (2, 2), "b.v": (4, 8), "v": (6, 4), "x+y.q": (3, 4)}
    config = LoraConfig(target_modules=list(modules), **pattern_fields(modules))
    for target in match_targets(config, modules):
        assert (target.r, target.scaling * target.r) == pytest.approx(modules[target.name])
