"""Adapters of changed bases, rsLoRA and DoRA as plain LoRA, and LoRA out of fine-tuned weights."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core import CheckpointError, ConfigError, LoraConfig, LoraModel, TargetError, UnsupportedError
from lora_core.checkpoint import WEIGHTS_NAME, read_adapter
from lora_core.convert import convert_to_lora, plain_lora, simplify_adapter
from lora_core.extract import extract_adapter, extract_lora, extract_modules
from lora_core.quant import dequantized_weight, is_quantized
from tests.peft_adapters import VARIANTS, peft_model, save
from tests.quantized import quantized_model
from tests.tiny_models import TARGETS, VOCABULARY, tiny_model

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"v_proj": 2, "c_proj": 6}},
    "alpha pattern": {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}},
    "dora": {"use_dora": True},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "modules to save": {"modules_to_save": ["lm_head"]},
}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def save_base(base: Any, folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {key: value.contiguous().clone() for key, value in base.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


def trained(base: Any, architecture: str, init: str, folder: Path, **config: Any) -> Any:
    """PEFT's model after a few steps; `initial/start` and `trained` in the folder hold the adapter before and after."""
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": init, "target_modules": TARGETS[architecture]} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "initial" / "start")
        model.peft_config["default"].init_lora_weights = init
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=3e-2)
        ids = torch.randint(3, VOCABULARY, (2, 12))
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / "trained")
    return model


def loaded(base: Any, folder: Path) -> LoraModel:
    model = LoraModel(copy.deepcopy(base)).eval()
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("variant", CONVERSIONS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_it_is_the_trained_model_on_the_original_base(
    init: str, variant: str, seed: int, tmp_path: Path
) -> None:
    base = tiny_model("llama", seed)
    theirs = trained(base, "llama", init, tmp_path, **CONVERSIONS[variant])
    ids = torch.randint(3, VOCABULARY, (2, 9))
    wanted = logits(theirs, ids)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "trained"), ids), wanted, **CLOSE)  # on the way in
    convert_to_lora(tmp_path / "trained", tmp_path / "initial/start", tmp_path / "out")
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), ids), wanted, **CLOSE)
    assert not torch.allclose(wanted, logits(base, ids), atol=1e-2)

    save_base(base, tmp_path / "base")
    convert_to_lora(tmp_path / "trained", None, tmp_path / "again", base_folder=tmp_path / "base")
    torch.testing.assert_close(logits(loaded(base, tmp_path / "again"), ids), wanted, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    torch.testing.assert_close(logits(reloaded, ids), wanted, **CLOSE)


@pytest.mark.parametrize("variant", ["plain", "rslora", "rank pattern", "alpha pattern"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_the_converted_file_equals_peft_s(init: str, variant: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    theirs = trained(base, "llama", init, tmp_path, **CONVERSIONS[variant])
    shutil.copytree(tmp_path / "initial", tmp_path / "copy")  # PEFT writes into the folder that it reads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(
            tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "copy" / "start")
        )
    convert_to_lora(tmp_path / "trained", tmp_path / "initial/start", tmp_path / "ours")
    found, wanted = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("ours", "peft"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"):
        assert configs[0][field] == configs[1][field], field


@pytest.mark.parametrize("source", ["initial", "base"])
def test_conv1d(source: str, seed: int, tmp_path: Path) -> None:
    """GPT-2 stores its weights as [I, O], square ones among them, and its files lack the prefix."""
    base = tiny_model("gpt2", seed)
    theirs = trained(base, "gpt2", "pissa", tmp_path, fan_in_fan_out=True)
    if source == "base":
        save_base(base.transformer, tmp_path / "base")
        convert_to_lora(tmp_path / "trained", None, tmp_path / "out", base_folder=tmp_path / "base")
    else:
        convert_to_lora(tmp_path / "trained", tmp_path / "initial/start", tmp_path / "out")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), ids), logits(theirs, ids), **CLOSE)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_on_an_nf4_base(init: str, seed: int, tmp_path: Path) -> None:
    """Trained beside the residual of what NF4 stands for, converted for the NF4 base itself."""
    quantized = quantized_model(tiny_model("llama", seed), "nf4")
    full = tiny_model("llama", seed)
    for name, module in quantized.named_modules():
        if is_quantized(module):
            full.get_submodule(name).weight.data = dequantized_weight(module)
    theirs = trained(full, "llama", init, tmp_path)
    convert_to_lora(tmp_path / "trained", tmp_path / "initial/start", tmp_path / "out")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    torch.testing.assert_close(logits(loaded(quantized, tmp_path / "out"), ids), logits(theirs, ids), **CLOSE)
    save_base(full, tmp_path / "base")
    convert_to_lora(tmp_path / "trained", None, tmp_path / "again", base_folder=tmp_path / "base")
    torch.testing.assert_close(logits(loaded(quantized, tmp_path / "again"), ids), logits(theirs, ids), **CLOSE)


def test_our_own_pissa_converts(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=TARGETS["llama"])
    ours = LoraModel(copy.deepcopy(base), config).eval()
    ours.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ours.save_pretrained(tmp_path / "trained")
    convert_to_lora(tmp_path / "trained", tmp_path / "initial", tmp_path / "out")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), ids), logits(ours, ids), **CLOSE)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "rank pattern"])
def test_our_own_initialisation_on_nf4_converts_exactly(variant: str, init: str, seed: int, tmp_path: Path) -> None:
    base = quantized_model(tiny_model("llama", seed), "nf4")
    options = CONVERSIONS[variant] | {"init_lora_weights": init, "target_modules": TARGETS["llama"]}
    ours = LoraModel(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, **options)).eval()
    ids = torch.randint(3, VOCABULARY, (2, 9))
    torch.testing.assert_close(logits(ours, ids), logits(base, ids), **CLOSE)  # it begins as the base
    ours.save_pretrained(tmp_path / "initial")
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(3):
        ours(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.save_pretrained(tmp_path / "trained")
    wanted = logits(ours, ids)
    assert not torch.allclose(wanted, logits(base, ids), atol=1e-2)
    convert_to_lora(tmp_path / "trained", tmp_path / "initial", tmp_path / "out")
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), ids), wanted, **CLOSE)
    with ours.disable_adapter():
        assert torch.equal(logits(ours, ids), logits(base, ids))
    ours.delete_adapter("default")
    assert not [name for name, _ in ours.named_buffers() if "removed" in name]


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_converted_is_named(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    trained(base, "llama", "pissa_niter_4", tmp_path)
    save_base(base, tmp_path / "base")
    out, start = tmp_path / "out", tmp_path / "initial/start"
    with pytest.raises(ConfigError, match="initial adapter's folder"):
        convert_to_lora(tmp_path / "trained", None, out)
    with pytest.raises(UnsupportedError, match="pissa_niter_4"):
        convert_to_lora(tmp_path / "trained", None, out, base_folder=tmp_path / "base")
    with pytest.raises(ConfigError, match="plain one"):
        convert_to_lora(start, None, out, base_folder=tmp_path / "base")
    change_config(start, lora_alpha=7)
    with pytest.raises(CheckpointError, match="lora_alpha"):
        convert_to_lora(tmp_path / "trained", start, out)
    change_config(start, lora_alpha=6)
    tensors = load_file(start / WEIGHTS_NAME)
    key = min(key for key in tensors if key.endswith("lora_A.weight"))
    save_file(tensors | {key: torch.zeros(3, 3)}, start / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="other shapes"):
        convert_to_lora(tmp_path / "trained", start, out)
    save_file({k: v for k, v in tensors.items() if k != key}, start / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="other modules"):
        convert_to_lora(tmp_path / "trained", start, out)
    save_file({k: v for k, v in tensors.items() if "lora_B" not in k}, start / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="lacks its B"):
        convert_to_lora(tmp_path / "trained", start, out)
    assert not out.exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["rslora", "patterns", "dora"])
def test_simplified_adapters_change_the_model_alike(variant: str, architecture: str, seed: int, tmp_path: Path) -> None:
    base = tiny_model(architecture, seed)
    theirs = peft_model(base, architecture, seed, **VARIANTS[variant], fan_in_fan_out=architecture == "gpt2")
    save(theirs, tmp_path / "in")
    save_base(base, tmp_path / "base")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    errors = simplify_adapter(tmp_path / "in", tmp_path / "out", base_folder=tmp_path / "base", rank=128)
    assert max(errors.values()) < 1e-5
    config, tensors = read_adapter(tmp_path / "out")
    assert not config.use_rslora
    assert not config.use_dora
    assert not [key for key in tensors if "magnitude" in key]
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), ids), logits(theirs, ids), rtol=1e-4, atol=2e-4)


def test_the_error_of_a_cut_off_dora_is_reported(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    save(peft_model(base, "llama", seed, **VARIANTS["dora"]), tmp_path)
    config, tensors = read_adapter(tmp_path)
    previous = dict.fromkeys(TARGETS["llama"], 1.0)
    model = loaded(base, tmp_path)
    for rank in (1, 4, None, 12):
        new_config, new, errors = plain_lora(config, tensors, base.state_dict(), rank)
        assert new_config.r == (rank or 8)
        for name, layer in model.layers.items():
            change = layer.delta_matrix("default").detach()
            found = new[f"{name}.lora_B.weight"] @ new[f"{name}.lora_A.weight"]
            assert errors[name] == pytest.approx((change - found).norm().item() / change.norm().item(), rel=1e-3)
            assert errors[name] < previous.get(name, 1.0)
            previous[name] = errors[name]
    with pytest.raises(ConfigError, match="base model's folder"):
        plain_lora(config, tensors)
    with pytest.raises(ConfigError, match="rank"):
        plain_lora(config, tensors, base.state_dict(), 0)
    with pytest.raises(TargetError, match="no weight of module"):
        plain_lora(config, tensors, {})
    with pytest.raises(CheckpointError, match="shape"):
        plain_lora(config, tensors, {key: torch.zeros(2, 2) for key in base.state_dict()})


# Out of fine-tuned weights.


def test_a_low_rank_change_is_extracted_exactly(seed: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, module in tuned.named_modules():
            if name.endswith(("q_proj", "down_proj")):
                weight = module.weight
                weight += torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1]) * 0.1
    folders = save_base(base, tmp_path / "base"), save_base(tuned, tmp_path / "tuned")
    found = extract_adapter(*folders, tmp_path / "out", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    assert len(found.modules) == 4
    assert max(found.errors.values()) < 1e-4
    assert found.left_out == []
    ids = torch.randint(3, VOCABULARY, (2, 9))
    wanted = logits(tuned, ids)
    torch.testing.assert_close(logits(loaded(base, tmp_path / "out"), ids), wanted, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs, ids), wanted, **CLOSE)


def test_what_an_extraction_leaves_out_is_reported(seed: int) -> None:
    base = tiny_model("gpt2", seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = LoraConfig(r=4, target_modules=r".*\.c_(attn|proj)", rank_pattern={"c_proj": 100}, fan_in_fan_out=True)
    found = extract_modules(base.state_dict(), tuned.state_dict(), config)
    for name, part in found.modules.items():
        change = (tuned.get_submodule(name).weight - base.get_submodule(name).weight).detach().T
        best = torch.linalg.svdvals(change)[part.rank :].norm().item() / change.norm().item()
        assert found.errors[name] == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert part.rank == (32 if name.endswith("c_proj") else 4)
    covered = {f"{name}.weight" for name in found.modules}
    assert set(found.left_out) == set(tuned.state_dict()) - covered
    assert extract_modules(base.state_dict(), base.state_dict(), config).errors.keys() == found.errors.keys()


def test_extractions_that_make_no_sense_are_named(seed: int) -> None:
    base = tiny_model("llama", seed).state_dict()
    for config, error, match in (
        (LoraConfig(target_modules="all-linear"), ConfigError, "name modules"),
        (LoraConfig(), ConfigError, "name modules"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), ConfigError, "use_dora"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), ConfigError, "modules_to_save"),
        (LoraConfig(target_modules=["zz"]), TargetError, "not found"),
        (LoraConfig(target_modules=["norm"]), TargetError, "no matrix"),
    ):
        with pytest.raises(error, match=match):
            extract_modules(base, base, config)
    with pytest.raises(TargetError, match="no weight of module"):
        extract_modules({}, base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="shapes"):
        extract_lora(torch.zeros(2, 3), torch.zeros(3, 2), 1)
    part, error = extract_lora(nn.Linear(3, 2).weight.detach(), torch.zeros(2, 3), 9)
    assert (part.rank, round(error, 5)) == (2, 0.0)
