"""Bases that other packages than bitsandbytes and torchao have quantized: each row as PEFT's on the same base."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_core import fold_adapter, load_adapter
from server.app import build_server
from server.engine import EngineConfig, load_runner
from server.engine import quantization as module
from server.engine.model import load_model
from server.engine.selfcheck import check_against_reference
from server.errors import InvalidRequestError
from server.settings import Settings
from tests import peft_adapters
from tests.engine_driver import generate_rows, logprob_errors
from tests.tiny_folder import write_tiny_folder

CPU = torch.device("cpu")
NUM_TOKENS = 6
INT = {"type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
EACH_TOKEN = {"strategy": "token", "dynamic": True}
# Format, weights, inputs, and how far a row may be off: a last bit can send a rounded input the other way.
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, float]] = {
    "w4a16": ("pack-quantized", INT | {"num_bits": 4, "strategy": "group", "group_size": 16}, None, 2e-3),
    "w8a16": ("pack-quantized", INT | {"num_bits": 8, "strategy": "channel"}, None, 2e-3),
    "fp8 weights": ("float-quantized", FP8 | {"strategy": "channel"}, None, 2e-3),
    "w8a8": ("int-quantized", INT | {"num_bits": 8, "strategy": "channel"}, INT | EACH_TOKEN | {"num_bits": 8}, 0.4),
    "fp8": ("float-quantized", FP8 | {"strategy": "channel"}, FP8 | EACH_TOKEN, 1.0),
}


def write_compressed_folder(folder: Path, scheme: str, seed: int) -> None:
    """A tiny model as compressed-tensors writes it, its scales from the extremes of the weights."""
    form, weights, inputs, _ = SCHEMES[scheme]
    write_tiny_folder(folder.with_name("full"), "llama", seed)
    model: Any = AutoModelForCausalLM.from_pretrained(folder.with_name("full"), dtype=torch.float32)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(
        config_groups={"linear": group}, format=form, ignore=["lm_head"], quantization_status="frozen"
    )
    apply_quantization_config(model, config)
    for layer in model.modules():
        if getattr(layer, "quantization_scheme", None) is not None:
            rows = layer.weight.detach()
            rows = rows.unflatten(1, (-1, weights["group_size"])) if "group_size" in weights else rows[:, None]
            scales, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), layer.quantization_scheme.weights)
            layer.weight_scale.data.copy_(scales)
            layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor(config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def transformers_own(folder: Path) -> Any:
    """The model as transformers alone computes it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_a_compressed_tensors_base_equal_peft(scheme: str, tmp_path: Path) -> None:
    print(f"seed {(seed := random.randrange(1 << 30))}")
    folder = tmp_path / "base"
    write_compressed_folder(folder, scheme, seed)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    config = EngineConfig(max_running=4, max_step_tokens=19, max_slots=2, block_size=4, kv_bytes=1 << 24)
    runner = load_runner(folder, config, dtype=torch.float32, device=CPU)
    assert runner.quantization == "compressed-tensors"
    tolerance = SCHEMES[scheme][-1]
    check_against_reference(runner)
    references, slots = {"base": transformers_own(folder)}, {"base": {}}
    for slot, name in enumerate(("rank4", "dora16")):
        adapter = peft_adapters.peft_model(plain, "llama", seed + slot, std=0.1, **peft_adapters.VARIANTS[name])
        saved = peft_adapters.save(adapter, tmp_path / name)
        runner.bank.load(slot, fold_adapter(load_adapter(saved), runner.model, dtype=torch.float32))
        slots[name] = {slot: 1.0}
        own = transformers_own(folder)
        with torch.no_grad():
            own(input_ids=torch.tensor([[1, 2]]))  # decompresses, which DoRA's norms need
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT uses a name that transformers has deprecated
            references[name] = peft.PeftModel.from_pretrained(own, str(saved)).eval()
    prompts = [[random.randrange(3, 300) for _ in range(random.randint(1, 30))] for _ in slots]
    outcomes = generate_rows(runner, zip(prompts, slots.values(), strict=True), NUM_TOKENS)
    for row, prompt, outcome in zip(slots, prompts, outcomes, strict=True):
        ids = torch.tensor([prompt + outcome.tokens[:-1]])
        with torch.no_grad():
            logits = references[row](input_ids=ids).logits[0, len(prompt) - 1 :]
            before = references["base"](input_ids=ids).logits[0, len(prompt) - 1 :]
        assert len(outcome.tokens) == NUM_TOKENS
        errors = logprob_errors(references[row], prompt, outcome)
        print(f"{row}: off by {errors.tolist()}")
        assert float(errors.max()) <= tolerance, row
        assert float(errors.median()) <= tolerance / 4, row
        assert row == "base" or float((before - logits).abs().max()) > tolerance


METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, "optimum gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, "gptqmodel"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_package_that_a_folder_needs_is_named(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, packages = METHODS[method]
    write_tiny_folder(tmp_path / "base", "llama", 1)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    monkeypatch.setattr(module, "find_spec", lambda wanted: None)
    with pytest.raises(InvalidRequestError, match=f"pip install {packages}$") as caught:
        build_server(Settings(model=str(tmp_path / "base"), store=tmp_path / "store", device="cpu"))
    assert caught.value.code == "quantization_missing"


def test_weights_that_are_not_rounded_yet_are_refused(tmp_path: Path) -> None:
    """compressed-tensors' files of a model as it was calibrated: each forward pass would round them anew."""
    write_compressed_folder(tmp_path / "base", "w4a16", 1)
    full = tmp_path / "full" / "model.safetensors"
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] |= {"quantization_status": "frozen", "format": "dense"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    packed_base = load_file(tmp_path / "base" / "model.safetensors")
    scales = {name: value for name, value in packed_base.items() if name.endswith(".weight_scale")}
    scales |= {name.replace("_scale", "_zero_point"): torch.zeros_like(scales[name]).char() for name in scales}
    save_file(load_file(full) | scales, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequestError, match="only compressed linear layers") as caught:
        load_model(tmp_path / "base", dtype=torch.float32, device=CPU)
    assert caught.value.code == "quantization_unsupported"
