"""LoraModel and served slots compute what PEFT computes, and train as PEFT trains."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core import (
    AdapterNotFoundError,
    ConfigError,
    LoraConfig,
    LoraError,
    LoraLinear,
    LoraModel,
    Route,
    Router,
    Run,
    TargetError,
    attach_slots,
    fold_adapter,
    load_adapter,
    wrap_linears,
)
from lora_core.checkpoint import WEIGHTS_NAME
from tests import peft_adapters
from tests.tiny_models import VOCABULARY, tiny_model

ARCHITECTURES = ["llama", "gpt2", "opt", "phi3"]
VARIANTS = peft_adapters.VARIANTS | {
    "lora_bias": {"r": 4, "lora_bias": True},
    "head": {"r": 4, "use_dora": True, "target_modules": ["lm_head"]},
}
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 2e-5}


def random_ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def num_wrapped(model: nn.Module) -> int:
    return sum(isinstance(module, LoraLinear) for module in model.modules())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_equals_peft(architecture: str, variant: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model(architecture, seed)
    theirs = peft_adapters.peft_model(base, architecture, seed, **VARIANTS[variant])
    ours = LoraModel(copy.deepcopy(base)).eval()
    ours.load_adapter(peft_adapters.save(theirs, tmp_path), "mine")
    ids = random_ids(2, 9)
    assert torch.equal(logits(ours, ids), logits(base, ids))  # inactive yet
    ours.set_adapter("mine")
    wanted = logits(theirs, ids)
    torch.testing.assert_close(logits(ours, ids), wanted, **CLOSE)
    assert not torch.allclose(wanted, logits(base, ids), atol=1e-2)

    ours.save_pretrained(tmp_path / "ours", "mine")
    assert (tmp_path / "ours" / WEIGHTS_NAME).read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()
    ours.load_adapter(tmp_path / "ours", "again")
    ours.set_adapter("again")
    torch.testing.assert_close(logits(ours, ids), wanted, **CLOSE)
    ours.set_adapter([])
    assert torch.equal(logits(ours, ids), logits(base, ids))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_active_adapters_equal_peft(architecture: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model(architecture, seed)
    theirs: Any = peft_adapters.peft_model(base, architecture, seed, **VARIANTS["rank4"])
    ours = LoraModel(copy.deepcopy(base)).eval()
    ours.load_adapter(peft_adapters.save(theirs, tmp_path / "rank4"), "default")
    for name in ("rank8", "patterns"):
        other = peft_adapters.peft_model(base, architecture, seed + 1, **VARIANTS[name])
        folder = peft_adapters.save(other, tmp_path / name)
        ours.load_adapter(folder, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.load_adapter(str(folder), name)
    ids = random_ids(2, 9)
    seen = []
    for names in (["default"], ["rank8", "default"], ["default", "rank8", "patterns"], ["patterns"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        seen.append(logits(ours, ids))
        torch.testing.assert_close(seen[-1], logits(theirs.eval(), ids), **CLOSE)
        assert all(not torch.allclose(seen[-1], before, atol=1e-3) for before in seen[:-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slots_serve_every_row_its_own_adapter(architecture: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model(architecture, seed)
    names = ["rank4", "rslora", "patterns", "dora", "head"]
    references = {n: peft_adapters.peft_model(base, architecture, seed + 1, **VARIANTS[n]) for n in names}
    served, router = copy.deepcopy(base), Router()
    layers = wrap_linears(served, router)
    bank = attach_slots(layers, len(names), dtype=torch.float32)
    for slot, name in enumerate(names):
        adapter = load_adapter(peft_adapters.save(references[name], tmp_path / name))
        bank.load(slot, fold_adapter(adapter, served, dtype=torch.float32))
    bank.check_integrity()
    ids = random_ids(len(names) + 1, 7)
    route = Route([Run({slot: 1.0}, 1) for slot in range(len(names))] + [Run({}, 1)])
    with router.use(route):
        mixed = logits(served, ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], logits(references[name], ids)[row], **CLOSE)
    with router.use(Route.uniform({})):
        assert torch.equal(mixed[-1], logits(served, ids)[-1])
    torch.testing.assert_close(mixed[-1], logits(base, ids)[-1], **CLOSE)


def losses(model: Any, parameters: list[nn.Parameter], ids: Tensor) -> list[float]:
    """Of a few Adam steps."""
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    out = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


@pytest.mark.parametrize("variant", ["rank4", "rslora", "patterns", "dora", "head"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_equals_peft(architecture: str, variant: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model(architecture, seed)  # in evaluation mode: some have a dropout of their own
    theirs = peft_adapters.peft_model(base, architecture, seed, **VARIANTS[variant])
    ours = LoraModel(copy.deepcopy(base))
    ours.load_adapter(peft_adapters.save(theirs, tmp_path), "default")
    ours.set_adapter("default")
    for name, module in theirs.named_modules():
        module.training = "lora_" in name
    ids = random_ids(2, 12)
    wanted = losses(theirs, [p for p in theirs.parameters() if p.requires_grad], ids)
    found = losses(ours, [p for p in ours.parameters() if p.requires_grad], ids)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert wanted[-1] < 0.98 * wanted[0]
    for (name, before), after in zip(base.named_parameters(), ours_of_base(ours), strict=True):
        assert torch.equal(before, after), name


def ours_of_base(model: LoraModel) -> list[Tensor]:
    return [p for name, p in model.model.named_parameters() if ".lora_" not in name]


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_new_adapter_changes_nothing_yet(use_dora: bool, seed: int) -> None:
    base = tiny_model("llama", seed)
    model = LoraModel(copy.deepcopy(base), LoraConfig(use_dora=use_dora, target_modules="all-linear")).eval()
    ids = random_ids(1, 5)
    torch.testing.assert_close(logits(model, ids), logits(base, ids), **CLOSE)
    assert model.active_adapters == ["default"]
    assert num_wrapped(model) == 2 * 7


def trainable(model: nn.Module) -> set[str]:
    """The last two parts of names, without `weight`."""
    return {".".join(name.split(".")[-3:-1]) for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_parameters_of_active_adapters_are_trainable(seed: int) -> None:
    model = LoraModel(tiny_model("llama", seed))
    assert trainable(model) == set()
    model.add_adapter("a", LoraConfig(use_dora=True))
    assert trainable(model) == set()
    model.set_adapter("a")
    of_a = {"lora_A.a", "lora_B.a", "lora_magnitude_vector.a"}
    assert trainable(model) == of_a
    model.add_adapter("b", LoraConfig(target_modules=["q_proj", "up_proj"], lora_bias=True))
    assert trainable(model) == of_a
    model.set_adapter("b")
    assert trainable(model) == {"lora_A.b", "lora_B.b"}
    model.set_adapter(["a", "b"])
    assert trainable(model) == {"lora_A.b", "lora_B.b"} | of_a


@pytest.mark.parametrize("variant", ["rank4", "dora", "lora_bias"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_in_memory_are_those_of_peft(architecture: str, variant: str, seed: int) -> None:
    base = tiny_model(architecture, seed)
    theirs = peft_adapters.peft_model(base, architecture, seed, **VARIANTS[variant])
    config = theirs.peft_config["default"]
    fields = {"target_modules": sorted(config.target_modules)} | VARIANTS[variant]
    ours = LoraModel(copy.deepcopy(base), LoraConfig(**fields))
    wanted = {name.removeprefix("base_model."): value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == wanted
    parts = [name for name, module in ours.model.named_modules() if isinstance(module, LoraLinear)]
    for name in parts:
        layer, other = ours.model.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert list(layer.state_dict()) == list(other.state_dict())
        assert layer.get_base_layer() is layer.base_layer


@pytest.mark.parametrize("name", ["a", "", "a.b", "keys", "pop", "training", "forward"])
def test_names_that_no_adapter_can_have(name: str, seed: int) -> None:
    model = LoraModel(tiny_model("llama", seed), LoraConfig(), "a")
    with pytest.raises(ConfigError, match=r"already exists|adapter names may not"):
        model.add_adapter(name, LoraConfig(target_modules=["up_proj"]))
    assert (list(model.peft_config), num_wrapped(model)) == (["a"], 4)


def test_adapters_that_are_not_there(seed: int, tmp_path: Path) -> None:
    model = LoraModel(tiny_model("llama", seed), LoraConfig(), "a")
    for act in (
        lambda: model.set_adapter("b"),
        lambda: model.set_adapter(["a", "b"]),
        lambda: model.adapter_weights("b"),
        lambda: model.save_pretrained(tmp_path / "new"),
        lambda: model.layers["model.layers.0.self_attn.q_proj"].tensors("b"),
    ):
        with pytest.raises(AdapterNotFoundError, match=r"Adapter (b|default) does not exist"):
            act()
    assert model.active_adapters == ["a"]
    assert not (tmp_path / "new").exists()


def without(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if prefix not in key}


def moved(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value.clone() for key, value in tensors.items()}


def of_shape(tensors: dict[str, Tensor], part: str, *shape: int) -> dict[str, Tensor]:
    return {key: torch.ones(shape) if part in key else value for key, value in tensors.items()}


MISFITS: dict[str, Any] = {
    "module missing": lambda tensors: without(tensors, "layers.1.self_attn.q_proj"),
    "module too many": lambda tensors: tensors | moved(tensors, "q_proj", "o_proj"),
    "layer too many": lambda tensors: tensors | moved(tensors, "layers.1", "layers.2"),
    "inputs": lambda tensors: of_shape(tensors, "lora_A", 4, 33),
    "inputs that broadcast": lambda tensors: of_shape(tensors, "lora_A", 4, 1),
    "outputs": lambda tensors: of_shape(tensors, "q_proj.lora_B", 31, 4),
    "outputs that broadcast": lambda tensors: of_shape(tensors, "lora_B", 1, 4),
    "rank": lambda tensors: of_shape(of_shape(tensors, "lora_A", 5, 32), "q_proj.lora_B", 32, 5),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(name: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    folder = peft_adapters.save(peft_adapters.peft_model(base, "llama", seed, r=4), tmp_path)
    save_file(MISFITS[name](load_file(folder / WEIGHTS_NAME)), folder / WEIGHTS_NAME)
    model = LoraModel(base)
    with pytest.raises(TargetError) as caught:
        model.load_adapter(folder, "x")
    assert caught.value.code == "adapter_mismatch"
    assert (model.peft_config, num_wrapped(model)) == ({}, 0)


@pytest.mark.parametrize(
    ("change", "dtype", "code"),
    [
        (lambda tensors: tensors | moved(tensors, "layers.1", "layers.2"), torch.float32, "adapter_mismatch"),
        (lambda tensors: tensors | moved(tensors, "self_attn.q_proj", "norm"), torch.float32, "adapter_mismatch"),
        (lambda tensors: of_shape(tensors, "lora_A", 4, 1), torch.float32, "adapter_mismatch"),
        (lambda tensors: {key: 1e5 * value for key, value in tensors.items()}, torch.float16, "adapter_not_finite"),
        (lambda tensors: {key: 1e38 * value for key, value in tensors.items()}, torch.float32, "adapter_not_finite"),
    ],
)
def test_folding_refuses_what_does_not_fit(
    change: Any, dtype: torch.dtype, code: str, seed: int, tmp_path: Path
) -> None:
    base = tiny_model("llama", seed)
    adapter = peft_adapters.peft_model(base, "llama", seed, r=4, lora_alpha=64)
    folder = peft_adapters.save(adapter, tmp_path)
    save_file(change(load_file(folder / WEIGHTS_NAME)), folder / WEIGHTS_NAME)
    with pytest.raises(LoraError) as caught:
        fold_adapter(load_adapter(folder), base, dtype=dtype)
    assert caught.value.code == code


def test_a_forward_pass_that_fails_leaves_no_route(seed: int) -> None:
    base = tiny_model("llama", seed)
    model = LoraModel(copy.deepcopy(base), LoraConfig()).eval()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[VOCABULARY]]), adapter_names=["__base__"])
    assert model.router.route is model.router.default
    ids = random_ids(1, 4)
    torch.testing.assert_close(logits(model, ids), logits(base, ids), **CLOSE)


def test_wrapping_twice_keeps_the_layers(seed: int) -> None:
    model, router = tiny_model("opt", seed), Router()
    layers = wrap_linears(model, router)
    assert num_wrapped(model) == len(layers) == 2 * 6 + 1
    assert [name for name, layer in layers.items() if layer.is_head] == ["lm_head"]
    again = wrap_linears(model, router, ["lm_head", "model.decoder.layers.0.fc1"])
    assert again == {name: layers[name] for name in ("lm_head", "model.decoder.layers.0.fc1")}
    assert num_wrapped(model) == len(layers)


def test_adapters_of_a_bfloat16_base_are_trained_in_float32(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed).to(torch.bfloat16)
    theirs = peft_adapters.peft_model(base, "llama", seed, r=4, use_dora=True)
    ours = LoraModel(copy.deepcopy(base)).eval()
    ours.load_adapter(peft_adapters.save(theirs, tmp_path), "default")
    ours.set_adapter("default")
    assert {t.dtype for m in ours.adapter_weights().modules.values() for t in m.tensors()} == {torch.float32}
    ids = random_ids(2, 6)
    found, wanted = logits(ours, ids), logits(theirs, ids)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=5e-2, atol=0.15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(logits(again, ids), wanted)
