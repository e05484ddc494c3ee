"""LoraModel's life: who is active, trainable, merged; changed bases; checkpointing; PEFT's functions."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_core import (
    AdapterNotFoundError,
    ConfigError,
    LoftQConfig,
    LoraConfig,
    LoraError,
    LoraModel,
    TargetError,
    UnsupportedError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from lora_core.adapter_module import base_of
from tests.lora_core.parity import Mlp, by_peft, loaded, make_inputs, make_model, ours, randomise, run, saved

LINEAR = {"r": 4, "target_modules": ["lin0", "lin1"]}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def mlp_with(names: str = "ab", seed: int = 0, **settings: Any) -> tuple[nn.Module, LoraModel]:
    base = make_model("mlp", seed)
    model = LoraModel(copy.deepcopy(base), {name: LoraConfig(**LINEAR | settings) for name in names}).eval()
    model.set_adapter(list(names))
    randomise(model)
    model.set_adapter(names[0])
    return base, model


def names_of(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_states_of_adapters(seed: int) -> None:
    base, model = mlp_with("ab", seed)
    inputs = make_inputs("mlp")
    a = run(model, inputs)
    assert model.active_adapters == ["a"]
    model.set_adapter(["b"], inference_mode=True)
    assert names_of(model) == set()
    model.set_adapter("b")
    trainable = names_of(model)
    b = run(model, inputs)
    with model.disable_adapter():
        torch.testing.assert_close(run(model, inputs), run(base, inputs))
        assert names_of(model) == trainable
    torch.testing.assert_close(run(model, inputs), b)
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    torch.testing.assert_close(run(model, inputs), run(base, inputs))  # it was off before
    model.enable_adapter_layers()
    model.delete_adapter("b")
    assert (model.active_adapters, list(model.peft_config)) == (["a"], ["a"])
    torch.testing.assert_close(run(model, inputs), a)
    assert not any(".b." in name for name in model.state_dict())
    for act in (model.delete_adapter, model.set_adapter, model.adapter_weights, lambda n: model.merge_adapter([n])):
        with pytest.raises(AdapterNotFoundError, match="Adapter b does not exist"):
            act("b")  # type: ignore[operator]
    model.delete_adapter("a")
    assert model.active_adapters == []
    torch.testing.assert_close(run(model, inputs), run(base, inputs))


def test_merging_one_after_the_other(seed: int) -> None:
    base, model = mlp_with("abc", seed, use_dora=True)
    inputs = make_inputs("mlp")
    model.set_adapter(["a", "b"])
    both = run(model, inputs)
    model.merge_adapter(["b"])
    model.merge_adapter()
    assert model.merged_adapters == ["b", "a"]
    torch.testing.assert_close(run(model, inputs), both, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="while they are merged"):
        model.delete_adapter("a")
    with pytest.raises(UnsupportedError, match="when there are merged adapters"):
        model(**inputs, adapter_names=["a", "b", "c"])
    with pytest.raises(TypeError, match="should be a list of strings"):
        model.merge_adapter("a")
    model.set_adapter("c")
    assert model.merged_adapters == []
    assert torch.equal(model.model.lin0.weight, base.lin0.weight)


def test_a_broken_adapter_is_not_merged(seed: int) -> None:
    _, model = mlp_with("ab", seed)
    model.merge_adapter(["b"])
    merged = {key: value.clone() for key, value in model.model.state_dict().items()}
    with torch.no_grad():
        model.layers["lin1"].tensors("a").lora_B[0, 0] = float("nan")
    with pytest.raises(LoraError, match="The adapter a seems to be broken"):
        model.merge_adapter(["a"], safe_merge=True)
    assert model.merged_adapters == ["b"]
    after = model.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in merged.items() if ".lora_" not in key)


def test_a_bias_cannot_be_merged_where_there_is_none(seed: int) -> None:
    base = Mlp()
    base.lin0 = nn.Linear(10, 20, bias=False)
    model = ours(base, LINEAR | {"lora_bias": True})
    with pytest.raises(UnsupportedError, match="because the base layer has no bias"):
        model.merge_and_unload()
    assert model.merged_adapters == []


def test_merging_shows_its_progress(capsys: pytest.CaptureFixture[str], seed: int) -> None:
    _, model = mlp_with("a", seed)
    model.merge_and_unload(progressbar=True)
    assert capsys.readouterr().err.endswith("merged 2/2\n")


def test_tied_embeddings_part_when_one_of_them_changes(seed: int, tmp_path: Path) -> None:
    """PEFT adds the embedding's change to the output embedding as well."""
    base: Any = make_model("gemma2", seed)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = ours(base, {"r": 4, "target_modules": ["embed_tokens"]}).eval()
    randomise(model)
    inputs = make_inputs("gemma2")
    wanted = run(model, inputs)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(run(merged, inputs), wanted, rtol=1e-5, atol=1e-4)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(again, inputs), wanted, rtol=1e-5, atol=1e-4)


def test_unloading_gives_the_base_back(seed: int) -> None:
    base = make_model("llama", seed)
    model = ours(base, {"r": 4, "modules_to_save": ["lm_head"], "bias": "all"})
    randomise(model)
    model.merge_adapter()
    plain = model.unload()
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in plain.state_dict().items())


def test_replicated_layers_share_weights_and_cannot_be_merged(seed: int) -> None:
    base: Any = make_model("llama", seed)
    settings = {"r": 4, "target_modules": ["q_proj"], "layer_replication": [(0, 2), (0, 2)]}
    model = ours(base, settings)
    layers = model.model.model.layers
    assert len(layers) == model.model.config.num_hidden_layers == 4
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    model.add_adapter("second", LoraConfig(**settings))
    assert len(model.model.model.layers) == 4
    with pytest.raises(ConfigError, match="first adapter"):
        model.add_adapter("third", LoraConfig(**settings | {"layer_replication": [(0, 1)]}))
    with pytest.raises(UnsupportedError, match="Cannot merge LORA layers when base model layers are replicated"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="goes beyond"):
        ours(base, settings | {"layer_replication": [(0, 3)]})


def train(model: LoraModel, inputs: dict[str, Tensor], num_steps: int = 4) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(num_steps):
        (run(model, inputs) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"rank_pattern": {"lin1": 2}}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_8"])
def test_an_adapter_of_a_changed_base_comes_home(init: str, extra: dict[str, Any], seed: int, tmp_path: Path) -> None:
    """Trained, converted with the initial adapter, or rebuilt from the base while loading: the same on the original."""
    base = make_model("mlp", seed)
    model = ours(base, LINEAR | {"lora_alpha": 6, "init_lora_weights": init} | extra)
    assert not torch.equal(model.model.lin0.weight, base.lin0.weight)
    model.save_pretrained(tmp_path / "initial")
    inputs = make_inputs("mlp")
    torch.testing.assert_close(run(model, inputs), run(base, inputs), rtol=1e-4, atol=1e-5)
    train(model, inputs)
    wanted = run(model, inputs).detach()
    assert not torch.allclose(wanted, run(base, inputs), atol=1e-2)
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    torch.testing.assert_close(run(loaded(base, tmp_path / "plain"), inputs), wanted, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "plain")).eval()
    torch.testing.assert_close(run(theirs, inputs), wanted, rtol=1e-4, atol=1e-4)
    if init == "pissa_niter_8":  # random, so it cannot be computed again
        with pytest.raises(UnsupportedError) as caught:
            loaded(base, tmp_path / "raw")
        assert caught.value.code == "adapter_needs_conversion"
        return
    mine = loaded(base, tmp_path / "raw")
    assert torch.equal(mine.model.lin0.weight, base.lin0.weight)
    torch.testing.assert_close(run(mine, inputs), wanted, rtol=1e-4, atol=1e-4)


def test_subtracting_an_adapter_of_the_model(seed: int) -> None:
    _, model = mlp_with("ab", seed)
    inputs = make_inputs("mlp")
    state = model.subtract_mutated_init(get_peft_model_state_dict(model, "a"), "b")
    model.add_adapter("a-b", LoraConfig(**LINEAR | {"r": 8, "lora_alpha": 16}))
    assert set_peft_model_state_dict(model, state, "a-b") == ([], [])
    model.set_adapter("a-b")
    mixed = model(**inputs, adapter_names=[{"a": 1.0, "b": -1.0}] * 3)
    torch.testing.assert_close(run(model, inputs), mixed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loftq_gives_back_what_quantizing_takes(bits: int, seed: int) -> None:
    base = make_model("mlp", seed)
    errors = []
    for r, iterations in ((1, 1), (4, 1), (4, 5)):
        settings = {"r": r, "lora_alpha": 6, "loftq_config": LoftQConfig(loftq_bits=bits, loftq_iter=iterations)}
        model = ours(base, LINEAR | settings | {"init_lora_weights": "loftq"})
        weight = model.model.lin0.base_layer.weight
        assert not torch.equal(weight, base.lin0.weight)
        error = base.lin0.weight - weight - model.layers["lin0"].get_delta_weight("default")
        errors.append(error.norm().item())
        assert errors[-1] < (base.lin0.weight - weight).norm() or iterations > 1
    assert errors[1] < errors[0]


def test_gradient_checkpointing_changes_no_gradient(seed: int) -> None:
    base: Any = make_model("llama", seed)
    model = ours(base, {"r": 4, "use_dora": True, "target_modules": "all-linear"}).train()
    randomise(model)
    ids = torch.randint(3, 100, (2, 9))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    model.model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        model(input_ids=ids, adapter_names=["default", "__base__"])


def test_a_mixed_batch_trains_every_row_s_own_adapter(seed: int) -> None:
    _, model = mlp_with("ab", seed)
    model.set_adapter(["a", "b"])
    inputs = make_inputs("mlp", 4)
    out = model(**inputs, adapter_names=["a", "__base__", "a", "b"])
    out[:3].sum().backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert grads == {name for name, _ in model.named_parameters() if ".a." in name}


def test_generating_with_beams_and_rows(seed: int) -> None:
    base: Any = make_model("t5", seed)
    model = LoraModel(copy.deepcopy(base), {n: LoraConfig(r=4) for n in "ab"}).eval()
    model.set_adapter(["a", "b"])
    randomise(model)
    ids = torch.randint(3, 100, (3, 6))
    base.generation_config.decoder_start_token_id = 0
    model.model.generation_config.decoder_start_token_id = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    rows = ["b", "__base__", "a"]
    with torch.no_grad():
        mixed = model.generate(input_ids=ids, adapter_names=rows, **options)
        for row, name in enumerate(rows):
            model.set_adapter([name] if name != "__base__" else [])
            alone = model.generate(input_ids=ids[row : row + 1], **options)
            assert torch.equal(mixed[row], alone[0]), name
    with pytest.raises(AdapterNotFoundError, match=r"Trying to infer with non-existing adapter\(s\): c"):
        model.generate(input_ids=ids, adapter_names=["a", "b", "c"])
    with pytest.raises(ConfigError, match="Length of `adapter_names` should be the same as the number of inputs"):
        model(input_ids=ids, decoder_input_ids=ids, adapter_names=["a", "b"])


def test_the_functions_of_peft(seed: int, tmp_path: Path) -> None:
    base = make_model("mlp", seed)
    theirs = by_peft(base, LINEAR)
    wanted = peft.get_peft_model_state_dict(theirs)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**LINEAR)).eval()
    assert set_peft_model_state_dict(model, wanted) == ([], [])
    inputs = make_inputs("mlp")
    torch.testing.assert_close(run(model, inputs), run(theirs, inputs))
    found = get_peft_model_state_dict(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())

    plain = inject_adapter_in_model(LoraConfig(**LINEAR), copy.deepcopy(base)).eval()
    inject_adapter_in_model(LoraConfig(**LINEAR), plain, "other")
    result = set_peft_model_state_dict(plain, {**wanted, "lin0.lora_C.weight": torch.zeros(1)}, "default")
    assert result == ([], ["lin0.lora_C.weight"])
    torch.testing.assert_close(run(plain, inputs), run(theirs, inputs))
    bare = get_peft_model_state_dict(plain)
    assert {f"base_model.model.{key}" for key in bare} == wanted.keys()
    clone = copy.deepcopy(plain)
    torch.testing.assert_close(run(clone, inputs), run(plain, inputs))
    with pytest.raises(TargetError, match="size mismatch"):
        set_peft_model_state_dict(plain, {"lin0.lora_A.weight": torch.zeros(5, 10)})
    with pytest.raises(AdapterNotFoundError):
        get_peft_model_state_dict(base)


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "whole and tokens": ("llama", {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]}, "in part"),
    "token outside": ("llama", {"trainable_token_indices": [10_000]}, "outside of the vocabulary"),
    "no such whole module": ("llama", {"modules_to_save": ["score"]}, "no module 'score'"),
    "no such parameter": ("llama", {"target_parameters": ["experts.w9"]}, "no parameter 'experts.w9'"),
    "nothing at all": ("llama", {"target_modules": []}, "No `target_modules` passed|not found"),
    "a convolution with pissa": ("conv", {"target_modules": ["conv2d"], "init_lora_weights": "pissa"}, "convolution"),
    "eva needs data": ("llama", {"init_lora_weights": "eva"}, "computed from data"),
    "corda needs data": ("llama", {"init_lora_weights": "corda"}, "computed from data"),
    "dora on experts": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_dora": True},
        "use_dora",
    ),
    "odd orthogonal": ("mlp", {"target_modules": ["lin0"], "r": 3, "init_lora_weights": "orthogonal"}, "even"),
    "no layers": (
        "mlp",
        {"target_modules": ["lin0"], "layer_replication": [(0, 1)]},
        "Could not locate",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(case: str, seed: int) -> None:
    name, settings, message = CONTRADICTIONS[case]
    base = make_model(name, seed)
    model = LoraModel(copy.deepcopy(base))
    with pytest.raises(LoraError, match=message):
        model.add_adapter("x", LoraConfig(**{"r": 4} | settings))
    assert model.peft_config == {}
    assert model.model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.model.state_dict().items())
    assert [n for n, _ in model.model.named_modules()] == [n for n, _ in base.named_modules()]


def test_a_saved_embedding_of_another_model_is_refused(seed: int, tmp_path: Path) -> None:
    theirs = by_peft(make_model("llama", seed), {"r": 4, "target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"})
    folder = saved(theirs, tmp_path)
    with pytest.raises(TargetError, match="another model"):
        loaded(make_model("llama", seed + 1), folder)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, EXPERTS], ids=["whole module", "experts"])
def test_a_module_runs_once_for_all_who_have_nothing_of_their_own_there(settings: dict[str, Any], seed: int) -> None:
    """Not once for every other adapter in the batch."""
    base: Any = make_model("qwen3_moe", seed)
    model = LoraModel(
        copy.deepcopy(base), LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings), "own"
    ).eval()
    for name in ("a", "b", "c"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["own", "a", "b", "c"])
    randomise(model)
    inner = base_of(
        model.model.get_submodule("lm_head" if "modules_to_save" in settings else "model.layers.1.mlp.experts")
    )
    calls: list[int] = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    inputs = make_inputs("qwen3_moe", 5)
    with torch.no_grad():
        plain = run(model, inputs, adapter_names=["a", "__base__", "b", "c", {"a": 0.5, "b": 0.5}])
        assert len(calls) == 1
        calls.clear()
        mixed = run(model, inputs, adapter_names=["a", "own", "b", "c", "own"])
        assert len(calls) == (1 if "modules_to_save" in settings else 2)  # a whole module's copy is another one
        close = {"rtol": 1e-5, "atol": 1e-4}
        for row in (0, 2, 3):
            torch.testing.assert_close(mixed[row], plain[row], **close)
        alone = run(model, inputs, adapter_names=["own"] * 5)
        torch.testing.assert_close(mixed[4], alone[4], **close)


def test_a_half_precision_dora_layer_gives_the_same_with_and_without_autograd(seed: int) -> None:
    base = nn.Sequential(nn.Linear(64, 48)).bfloat16()
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = LoraModel(base, config).model  # its gain is float32, its base is not
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 2 * torch.rand_like(parameter)  # far from 1
    x = torch.randn(9, 64).bfloat16()
    with torch.no_grad():
        alone = model(x)
    assert torch.equal(model(x).detach(), alone)
