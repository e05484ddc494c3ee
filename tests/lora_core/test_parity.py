"""Every kind of layer and every option of LoraConfig gives PEFT's numbers, gradients, merged weights and files."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_core import (
    LoraConfig,
    LoraModel,
    Route,
    Router,
    Run,
    attach_slots,
    fold_adapter,
    get_peft_model_state_dict,
    load_adapter,
    wrap_linears,
)
from tests.lora_core.parity import by_peft, loaded, make_inputs, make_model, ours, run, saved

Q = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
CAUSAL = Q | {"task_type": "CAUSAL_LM"}
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 3}
CONVOLUTIONS = ["conv1d", "conv2d", "conv3d", "point"]
# Name -> model, settings of peft.LoraConfig.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"r": 4, "target_modules": ["lin0", "lin1"]}),
    "mlp_regex": ("mlp", {"r": 4, "target_modules": "lin.", "use_rslora": True, "lora_alpha": 3}),
    "mlp_dora": ("mlp", {"r": 4, "target_modules": ["lin0"], "use_dora": True, "lora_alpha": 3}),
    "mlp_lora_bias": ("mlp", {"r": 4, "target_modules": ["lin0"], "lora_bias": True}),
    "mlp_bias_all": ("mlp", {"r": 4, "target_modules": ["lin0"], "bias": "all"}),
    "mlp_bias_lora_only": ("mlp", {"r": 4, "target_modules": ["lin0"], "bias": "lora_only"}),
    "mlp_bias_dora": ("mlp", {"r": 4, "target_modules": ["lin0", "lin1"], "bias": "lora_only", "use_dora": True}),
    "mlp_modules_to_save": ("mlp", {"r": 4, "target_modules": ["lin0"], "modules_to_save": ["lin1", "norm"]}),
    "mlp_high_rank": ("mlp", {"r": 40, "target_modules": ["lin0", "lin1"]}),
    "conv": ("conv", {"r": 4, "target_modules": CONVOLUTIONS, "lora_alpha": 3}),
    "conv_dora": ("conv", {"r": 4, "target_modules": CONVOLUTIONS, "use_dora": True}),
    "conv_bias": ("conv", {"r": 4, "target_modules": ["conv2d"], "lora_bias": True}),
    "embedding": ("embedding", {"r": 4, "target_modules": ["table", "lin"], "lora_alpha": 3}),
    "embedding_dora": ("embedding", {"r": 4, "target_modules": ["table"], "use_dora": True}),
    "embedding_saved": ("embedding", {"r": 4, "target_modules": ["lin"], "modules_to_save": ["table"]}),
    "llama_all_linear": ("llama", {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama_layers": ("llama", CAUSAL | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "llama_excluded": ("llama", CAUSAL | {"exclude_modules": ["0.self_attn.q_proj"]}),
    "llama_patterns": ("llama", CAUSAL | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*": 9}}),
    "llama_embedding": ("llama", CAUSAL | {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "llama_embedding_dora": ("llama", CAUSAL | {"target_modules": ["embed_tokens"], "use_dora": True}),
    "llama_saved": ("llama", CAUSAL | {"modules_to_save": ["norm", "lm_head", "embed_tokens"]}),
    "llama_tokens": ("llama", CAUSAL | {"trainable_token_indices": [5, 3, 9]}),
    "llama_named_tokens": ("llama", CAUSAL | {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]}}),
    "llama_replicated": ("llama", CAUSAL | {"layer_replication": [(0, 2), (0, 1), (1, 2)]}),
    "llama_nothing_else": ("llama", {"target_modules": "dummy-target-modules", "modules_to_save": ["lm_head"]}),
    "gemma2_tokens_tied": ("gemma2", CAUSAL | {"trainable_token_indices": [5, 3, 9]}),
    "gemma3_embedding": ("gemma3", CAUSAL | {"target_modules": ["embed_tokens", "v_proj"]}),
    "gpt2": ("gpt2", {"r": 4, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "gpt2_bias": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    "gpt2_dora": ("gpt2", {"r": 4, "target_modules": ["c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "opt_bias": ("opt", {"r": 4, "target_modules": ["q_proj", "fc1"], "bias": "all", "task_type": "CAUSAL_LM"}),
    "t5": ("t5", {"r": 4, "task_type": "SEQ_2_SEQ_LM"}),
    "t5_shared": ("t5", {"r": 4, "target_modules": ["q", "wo"], "modules_to_save": ["lm_head"]}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe_rslora": ("qwen3_moe", Q | EXPERTS | {"target_modules": ["q_proj"], "use_rslora": True}),
    "qwen3_moe_one": ("qwen3_moe", EXPERTS | {"target_parameters": ["mlp.experts.down_proj"], "lora_alpha": 5}),
    "qwen3_moe_router": ("qwen3_moe", EXPERTS | {"target_parameters": ["mlp.gate.weight"]}),
    "qwen3_moe_patterns": ("qwen3_moe", EXPERTS | {"rank_pattern": {"experts.down_proj": 2}}),
    "mixtral": ("mixtral", EXPERTS | {"lora_alpha": 5}),
}


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * max(float(wanted.abs().max()), 1.0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_and_outputs_equal_peft(variant: str, seed: int, tmp_path: Path) -> None:
    name, settings = VARIANTS[variant]
    base = make_model(name, seed)
    theirs = by_peft(base, settings)
    folder = saved(theirs, tmp_path / "theirs")
    inputs = make_inputs(name)
    wanted = run(theirs, inputs).detach()
    mine = loaded(base, folder)
    close(run(mine, inputs).detach(), wanted)
    assert not torch.allclose(wanted, run(base, inputs), atol=1e-3) or settings.get("layer_replication")

    mine.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    close(run(back, inputs).detach(), wanted)
    if not settings.get("layer_replication"):
        mine.disable_adapter_layers()
        without, wanted = run(mine, inputs), run(base, inputs)
        if name == "t5":  # its products change their last bits with where in memory their inputs lie
            torch.testing.assert_close(without, wanted, rtol=1e-5, atol=5e-5)
        else:
            assert torch.equal(without, wanted)


def same_files(ours_: Path, theirs: Path) -> None:
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (ours_, theirs))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = [peft.LoraConfig.from_pretrained(str(folder)).to_dict() for folder in (ours_, theirs)]
    for config in configs:
        config.pop("peft_version")
        if isinstance(config["layers_pattern"], str):
            config["layers_pattern"] = [config["layers_pattern"]]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not VARIANTS[v][1].get("layer_replication")])
def test_merging_equals_peft(variant: str, seed: int, tmp_path: Path) -> None:
    name, settings = VARIANTS[variant]
    base = make_model(name, seed)
    theirs = by_peft(base, settings)
    mine = loaded(base, saved(theirs, tmp_path))
    before = copy.deepcopy(mine.model.state_dict())
    inputs = make_inputs(name)
    wanted = run(mine, inputs).detach()
    mine.merge_adapter(safe_merge=True)
    assert mine.merged_adapters == ["default"]
    # T5 does not scale its scores down, so that the rounding of merged weights is amplified.
    tolerance = 5e-5 if name == "t5" else 1e-5
    close(run(mine, inputs).detach(), wanted, tolerance)
    mine.unmerge_adapter()
    after = mine.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    merged = mine.merge_and_unload()
    assert type(merged) is type(base)
    close(run(merged, inputs).detach(), wanted, tolerance)
    assert {n for n, _ in merged.named_modules()} == {n for n, _ in base.named_modules()}
    if "tied" in variant or "embedding" in variant:
        return  # PEFT adds the change of a tied embedding to the output embedding as well
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = theirs.merge_and_unload()
    for key, value in reference.state_dict().items():
        close(merged.state_dict()[key], value)


def gradients(model: nn.Module, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    (run(model, inputs) * upstream).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_peft(variant: str, seed: int, tmp_path: Path) -> None:
    name, settings = VARIANTS[variant]
    base = make_model(name, seed)
    theirs = by_peft(base, settings)
    mine = loaded(base, saved(theirs, tmp_path))
    inputs = make_inputs(name)
    upstream = torch.randn_like(run(theirs, inputs))
    wanted, found = gradients(theirs, inputs, upstream), gradients(mine, inputs, upstream)
    assert len(found) == len(wanted) > 0
    by_norm = [sorted(float(g.double().norm()) for g in grads.values()) for grads in (found, wanted)]
    assert by_norm[0] == pytest.approx(by_norm[1], rel=2e-4, abs=1e-5)
    for key, value in wanted.items():  # those whose names in memory are PEFT's
        own = key.removeprefix("base_model.")
        if own in found:
            torch.testing.assert_close(found[own], value, rtol=1e-4, atol=1e-4 * max(float(value.abs().max()), 1e-3))
    if "lora_A" in str(list(wanted)):
        assert any(key.removeprefix("base_model.") in found for key in wanted)


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if "bias" not in v and not VARIANTS[v][1].get("layer_replication") and "tokens" not in v],
)
def test_a_new_adapter_starts_as_under_peft(variant: str, seed: int) -> None:
    name, settings = VARIANTS[variant]
    base = make_model(name, seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    mine = ours(base, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.get_peft_model_state_dict(theirs)
    found = get_peft_model_state_dict(mine)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        close(found[key], value.detach())
    trainable = sorted(p.numel() for p in mine.parameters() if p.requires_grad)
    assert trainable == sorted(p.numel() for p in theirs.parameters() if p.requires_grad)


MIXED = [v for v in VARIANTS if not VARIANTS[v][1].get("layer_replication")]


@pytest.mark.parametrize("variant", MIXED)
def test_a_mixed_batch_gives_every_row_its_own(variant: str, seed: int, tmp_path: Path) -> None:
    """Of every kind of layer, where PEFT refuses most; the mix is the weighted sum of the merged weights' changes."""
    name, settings = VARIANTS[variant]
    base = make_model(name, seed)
    folders = []
    for i in range(2):
        torch.manual_seed(seed + i)
        folders.append(saved(by_peft(base, settings), tmp_path / str(i)))
    mine = LoraModel(copy.deepcopy(base)).eval()
    mine.load_adapter(folders[0], "a")
    mine.load_adapter(folders[1], "b")
    inputs = make_inputs(name, num_rows=5)
    mixed = run(mine, inputs, adapter_names=["a", "__base__", {"a": 0.5, "b": -0.75}, "b", "a"]).detach()
    base_out = run(base, inputs).detach()
    alone = [run(loaded(base, folder), inputs).detach() for folder in folders]
    for row, wanted in ((0, alone[0]), (1, base_out), (3, alone[1]), (4, alone[0])):
        close(mixed[row], wanted[row])
    close(mixed[2], run(summed(base, folders, [0.5, -0.75]), inputs)[2].detach())
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


SERVED = [v for v in MIXED if VARIANTS[v][0] not in ("mlp", "conv", "embedding", "t5")]


@pytest.mark.parametrize("variant", SERVED)
def test_slots_give_every_row_its_own(variant: str, seed: int, tmp_path: Path) -> None:
    """The server's entrance: packed rows, adapters that come and go in slots."""
    name, settings = VARIANTS[variant]
    base = make_model(name, seed)
    folders = [saved(by_peft(base, settings), tmp_path / str(i)) for i in range(2)]
    served, router = copy.deepcopy(base), Router()
    bank = attach_slots(wrap_linears(served, router), 3, dtype=torch.float32, model=served)
    for slot in (2, 0, 1):
        bank.load(slot, fold_adapter(load_adapter(folders[slot % 2]), served, dtype=torch.float32))
    bank.free(1)
    bank.free(0)
    bank.load(1, fold_adapter(load_adapter(folders[1]), served, dtype=torch.float32))
    bank.check_integrity()
    inputs = make_inputs(name, num_rows=4)
    tokens = inputs["input_ids"].shape[1]
    weights = [{1: 1.0}, {}, {2: 0.5, 1: -0.75}, {2: 1.0}]
    with router.use(Route(Run(row, tokens) for row in weights)), torch.no_grad():
        mixed = run(served, inputs)
    alone = [run(loaded(base, folder), inputs).detach() for folder in folders]
    close(mixed[0], alone[1][0])
    close(mixed[1], run(base, inputs)[1].detach())
    close(mixed[2], run(summed(base, folders, [0.5, -0.75]), inputs)[2].detach())
    close(mixed[3], alone[0][3])
    bank.free(1)
    bank.free(2)
    assert bank.num_bytes == 0
    with router.use(Route.uniform({})), torch.no_grad():
        close(run(served, inputs), run(base, inputs).detach())


def summed(base: nn.Module, folders: list[Path], weights: list[float]) -> nn.Module:
    """The base plus the weighted sum of what each adapter changes in its weights. Tied weights are parted first."""
    out = copy.deepcopy(base)
    for module in out.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter.detach().clone()))
    old = {key: value.clone() for key, value in out.state_dict().items()}
    total = {key: value.clone() for key, value in old.items()}
    for folder, weight in zip(folders, weights, strict=True):
        merged = loaded(base, folder).merge_and_unload().state_dict()
        for key, value in old.items():
            total[key] += weight * (merged[key] - value)
    out.load_state_dict(total)
    return out


INITS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", True, False]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_initialisations_equal_peft(name: str, init: Any, use_rslora: bool, seed: int) -> None:
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": init, "use_rslora": use_rslora}
    settings |= {"target_modules": ["lin0", "lin1"]} if name == "mlp" else {"target_modules": ["c_attn"]}
    base = make_model(name, seed)
    if (name, init) == ("gpt2", "olora"):  # PEFT factors the stored weight [I, O], and its forward fails
        mine, inputs = ours(base, settings), make_inputs(name)
        assert not torch.equal(mine.model.transformer.h[0].attn.c_attn.weight, base.transformer.h[0].attn.c_attn.weight)
        torch.testing.assert_close(run(mine.eval(), inputs), run(base, inputs), rtol=1e-4, atol=1e-4)
        return
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**settings | {"fan_in_fan_out": name == "gpt2"})
        )
    torch.manual_seed(seed)
    mine = ours(base, settings)
    wanted = {key.removeprefix("base_model."): value for key, value in theirs.state_dict().items()}
    found = mine.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    inputs = make_inputs(name)
    if init is not False:
        torch.testing.assert_close(run(mine.eval(), inputs), run(base, inputs), rtol=1e-4, atol=1e-4)


def test_the_file_of_an_adapter_says_what_was_asked_for(tmp_path: Path, seed: int) -> None:
    model = ours(make_model("llama", seed), {"r": 4})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    assert LoraConfig.from_json((tmp_path / "adapter_config.json").read_bytes()).target_modules == ("q_proj", "v_proj")
