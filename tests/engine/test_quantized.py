"""Bases in 4 and 8 bits: loaded so, every row of a mixed batch right on them, saved and loaded back."""

import copy
import gc
import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from lora_core import LoraModel, UnsupportedError, fold_adapter, load_adapter
from lora_core.quant import dequantized_weight, is_quantized, quantized_like, replace_weight
from server.demo import ensure_demo_model
from server.engine import EngineConfig, ModelRunner, Quantization, load_runner, save_quantized
from server.engine import quantization as module
from server.engine.model import load_model, read_model
from server.engine.quantization import checkpoint_quantization, loading_options
from server.engine.selfcheck import check_against_reference
from server.errors import ConflictError, InvalidRequestError
from tests import peft_adapters
from tests.device import DEVICE
from tests.engine_driver import generate_rows, logprob_errors
from tests.tiny_folder import write_tiny_folder

KINDS = [Quantization("nf4"), Quantization("nf4", double_quant=True), Quantization("fp4"), Quantization("int8")]
NUM_TOKENS = 8
INT8_TOLERANCE = 0.4
SMOLLM2_INT8_TOLERANCE = 2.0
EXACT = 1e-3
MIXES = {"lora_mix": {"rank4": 0.7, "rank16": 0.6}, "dora_mix": {"dora": 0.5, "rank4": 0.4, "dora16": -0.3}}
NAMES = ["rank4", "rank16", "patterns", "dora", "dora16", "embedding", "whole", "tokens"]


def label(quantization: Quantization) -> str:
    return quantization.kind + ("-double" if quantization.double_quant else "")


def in_full_precision(model: Any) -> Any:
    """A copy whose linear layers are plain ones with the numbers of the quantized ones."""
    full = AutoModelForCausalLM.from_config(without_quantization(model.config), dtype=torch.float32).to(DEVICE).eval()
    values = {name: value.detach().float() for name, value in model.named_parameters()}
    values |= {f"{name}.weight": dequantized_weight(m) for name, m in model.named_modules() if is_quantized(m)}
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.copy_(values[name])
    return full


def row_by_row(model: Any) -> None:
    """bitsandbytes' own int8 layers, each row given to them alone: with others it moves columns that are theirs."""
    for layer in model.modules():
        if type(layer).__name__ == "Linear8bitLt":
            own = layer.forward

            def forward(x: Any, own: Any = own) -> Any:
                return torch.cat([own(row[None]) for row in x.flatten(0, -2)]).view(*x.shape[:-1], -1)

            layer.forward = forward


def without_quantization(config: Any) -> Any:
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


@dataclass
class Case:
    """A served quantized model with adapters in its slots, PEFT's on the same, and the plain model of equal numbers."""

    runner: ModelRunner
    slots: dict[str, dict[int, float]]
    references: dict[str, Any]
    tolerance: float
    has_exact_rows: bool


def write_torchao_folder(folder: Path, kind: str, seed: int) -> None:
    """A tiny model that torchao has quantized, as transformers saves it."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    write_tiny_folder(folder.with_name("full"), "llama", seed)
    four_bits = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    config = TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else four_bits)
    model = AutoModelForCausalLM.from_pretrained(
        folder.with_name("full"), dtype=torch.float32, quantization_config=config, device_map={"": DEVICE}
    )
    model.save_pretrained(folder)


@pytest.fixture(
    params=[
        "torchao-int8",
        "torchao-int4",
        *KINDS,
        *(pytest.param((k, "smollm2"), marks=pytest.mark.slow) for k in KINDS[::3]),
    ]
)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    is_demo = isinstance(request.param, tuple)
    quantization: Any = request.param[0] if is_demo else request.param
    is_torchao = isinstance(quantization, str)
    folder = tmp_path / "base"
    if is_demo:
        folder = ensure_demo_model(report=print)
    elif is_torchao:
        write_torchao_folder(folder, quantization.removeprefix("torchao-"), seed)
        quantization = Quantization()
    else:
        write_tiny_folder(folder, "llama", seed)
    base: Any = read_model(folder, dtype=torch.float32, device=DEVICE, quantization=quantization)
    full = in_full_precision(base)
    config = EngineConfig(max_running=16, max_step_tokens=19, max_slots=12, block_size=4, kv_bytes=1 << 28)
    runner = load_runner(folder, config, dtype=torch.float32, device=DEVICE, quantization=quantization)
    check_against_reference(runner)
    models, slots, references = {}, {"base": {}}, {"base": base}
    everything = peft_adapters.variants("llama")
    for slot, name in enumerate(NAMES):
        std = 0.02 if is_demo else 0.2
        models[name] = peft_adapters.peft_model(full, "llama", seed + slot, std=std, **everything[name])
        saved = peft_adapters.save(models[name], tmp_path / name)
        runner.bank.load(slot, fold_adapter(load_adapter(saved), runner.model, dtype=torch.float32))
        slots[name] = {slot: 1.0}
        references[name] = models[name]
        # PEFT loses an int8 layer's scales in DoRA, and its layers for torchao know other kinds.
        if not is_torchao and not (quantization.kind == "int8" and name.startswith("dora")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT uses a name that transformers has deprecated
                references[name] = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(saved)).eval()
    for mix, weights in MIXES.items():
        slots[mix] = {slot: weight for name, weight in weights.items() for slot in slots[name]}
        deltas = [(weight, peft_adapters.merged_delta(full, models[name])) for name, weight in weights.items()]
        references[mix] = peft_adapters.with_deltas(full, deltas)
    if quantization.kind == "int8":
        for model in references.values():
            row_by_row(model)
    # In 8 bits inputs are rounded: a last bit can send a number the other way, and SmolLM2's 30 layers make of it what
    # a change of its embeddings by 1e-6 makes (up to 2 in a log-probability). Rows where no number does so are exact.
    tolerance = (SMOLLM2_INT8_TOLERANCE if is_demo else INT8_TOLERANCE) if quantization.kind == "int8" else 2e-3
    yield Case(runner, slots, references, tolerance, has_exact_rows=is_demo)
    gc.collect()


def test_a_mixed_batch_equals_peft_row_by_row(case: Case) -> None:
    vocabulary = case.runner.facts.vocab_size
    prompts = [[random.randrange(3, vocabulary) for _ in range(random.randint(1, 30))] for _ in case.slots]
    outcomes = generate_rows(case.runner, zip(prompts, case.slots.values(), strict=True), NUM_TOKENS)
    errors: list[float] = []
    for row, prompt, outcome in zip(case.slots, prompts, outcomes, strict=True):
        assert len(outcome.tokens) == NUM_TOKENS
        ids = torch.tensor([prompt + outcome.tokens[:-1]], device=DEVICE)
        with torch.no_grad():
            logits = case.references[row](input_ids=ids).logits[0, len(prompt) - 1 :].float()
        found = torch.tensor(outcome.logprobs)
        wanted = logits.log_softmax(-1)[range(NUM_TOKENS), outcome.tokens].cpu()
        errors.append(float((found - wanted).abs().max()))
        print(f"{row}: off by {errors[-1]:.2g}")
        assert float((found - wanted).abs().max()) <= case.tolerance, row
        best = logits.max(-1).values - logits[range(NUM_TOKENS), outcome.tokens]
        assert float(best.max()) <= case.tolerance, row
    assert not case.has_exact_rows or min(errors) <= EXACT


def test_the_layout_that_is_fast_in_bfloat16_has_the_same_answers(tmp_path: Path) -> None:
    """Wide enough for bitsandbytes' CPU kernel; adapters with DoRA are folded from the repacked weights."""
    torch.manual_seed(seed := random.randrange(1 << 30))
    print(f"seed {seed}")
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    model: Any = load_model(folder, dtype=torch.bfloat16, device=DEVICE, quantization=Quantization("nf4", True))
    full = in_full_precision(model)
    adapter = peft_adapters.peft_model(full, "llama", seed, std=0.1, **peft_adapters.VARIANTS["dora"])
    saved = peft_adapters.save(adapter, tmp_path / "dora")
    runner = ModelRunner(model, EngineConfig(max_running=4, max_slots=2, kv_bytes=1 << 24))
    check_against_reference(runner)
    runner.bank.load(0, fold_adapter(load_adapter(saved), runner.model, dtype=torch.bfloat16))
    ids = torch.randint(3, 128, (1, 20), device=DEVICE)
    outcomes = generate_rows(runner, [(ids[0].tolist(), {}), (ids[0].tolist(), {0: 1.0})], 1)
    for reference, outcome in zip((full, adapter), outcomes, strict=True):
        with torch.no_grad():
            wanted = reference(input_ids=ids).logits[0, -1].log_softmax(-1)
        assert outcome.logprobs[0] == pytest.approx(float(wanted[outcome.tokens[0]]), abs=0.1)
        assert float(wanted.max() - wanted[outcome.tokens[0]]) < 0.1


@pytest.mark.parametrize("quantization", KINDS, ids=label)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # GPT-2's layers hold their weights transposed
def test_a_saved_copy_loads_back_without_the_flag(
    quantization: Quantization, architecture: str, tmp_path: Path
) -> None:
    write_tiny_folder(tmp_path / "base", architecture, random.randrange(1 << 30))
    size = save_quantized(tmp_path / "base", tmp_path / "small", quantization, dtype=torch.float32, device=DEVICE)
    assert 0 < size < (tmp_path / "base" / "model.safetensors").stat().st_size
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    kept = load_model(tmp_path / "small", dtype=torch.float32, device=DEVICE)
    made = load_model(tmp_path / "base", dtype=torch.float32, device=DEVICE, quantization=quantization)
    assert checkpoint_quantization(kept.config) == checkpoint_quantization(made.config) == quantization.kind
    names = [name for name, layer in made.named_modules() if is_quantized(layer)]
    assert names == [name for name, layer in kept.named_modules() if is_quantized(layer)]
    assert len(names) >= 8
    for name in names:
        one, other = (dequantized_weight(model.get_submodule(name)) for model in (kept, made))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    ids = torch.randint(3, 300, (1, 12), device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(kept(input_ids=ids).logits, made(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    same = load_model(
        tmp_path / "small", dtype=torch.float32, device=DEVICE, quantization=Quantization(quantization.kind)
    )
    assert checkpoint_quantization(same.config) == quantization.kind
    with pytest.raises(ConflictError, match="exists"):
        save_quantized(tmp_path / "base", tmp_path / "small", quantization, dtype=torch.float32, device=DEVICE)
    other_kind = Quantization("nf4" if quantization.kind != "nf4" else "int8")
    with pytest.raises(InvalidRequestError, match="already") as caught:
        load_model(tmp_path / "small", dtype=torch.float32, device=DEVICE, quantization=other_kind)
    assert caught.value.code == "quantization_conflict"


def test_merging_into_a_quantized_base_is_in_kind(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "base", "llama", seed := random.randrange(1 << 30))
    for quantization in KINDS:
        model: Any = read_model(tmp_path / "base", dtype=torch.float32, device=DEVICE, quantization=quantization)
        full = in_full_precision(model)
        adapter = peft_adapters.peft_model(full, "llama", seed, std=0.1, **peft_adapters.VARIANTS["dora"])
        saved = peft_adapters.save(adapter, tmp_path / label(quantization))
        ours = LoraModel(model)
        ours.load_adapter(saved, "default")
        ours.merge_adapter(["default"])
        wanted = adapter.merge_and_unload()
        layer = "model.layers.1.mlp.down_proj"
        base, exact = ours.layers[layer].base_layer, wanted.get_submodule(layer).weight
        assert is_quantized(base)
        merged = dequantized_weight(base)
        replace_weight(base, quantized_like(base, exact))
        assert (merged - dequantized_weight(base)).norm() < 0.01 * exact.norm()  # a value between two may go to either
        assert (merged - exact).norm() < 0.35 * exact.norm()
        assert (exact - full.get_submodule(layer).weight).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda wanted: None if wanted == name else object())
    with pytest.raises(InvalidRequestError, match=name) as caught:
        loading_options(SimpleNamespace(), Quantization("nf4"), dtype=torch.float32, device=DEVICE)
    assert caught.value.code == "quantization_missing"


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="mps") as caught:
        loading_options(SimpleNamespace(), Quantization("int8"), dtype=torch.float32, device=torch.device("mps"))
    assert caught.value.code == "quantization_unsupported"


def test_full_precision_needs_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda wanted: object())
    assert loading_options(SimpleNamespace(), Quantization(), dtype=torch.float32, device=DEVICE) == {}
    config = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    assert checkpoint_quantization(config) == "gptq"
    assert loading_options(config, Quantization(), dtype=torch.float32, device=DEVICE) == {
        "device_map": {"": str(DEVICE)}
    }
    both = SimpleNamespace(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert checkpoint_quantization(both) == "int8"


def test_head_and_embeddings_stay_in_full_precision(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "base", "llama", random.randrange(1 << 30))
    model = load_model(tmp_path / "base", dtype=torch.float32, device=DEVICE, quantization=Quantization("nf4"))
    plain = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not is_quantized(m)}
    assert plain == {"lm_head"}
    saved = json.loads((tmp_path / "base" / "config.json").read_text())
    assert "quantization_config" not in saved


class OpaqueLinear(nn.Module):
    """A layer as GPTQ's and AWQ's packages make them: it computes, and holds its weight under names of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("qweight", (linear.weight * 64).round().to(torch.int8))

    def forward(self, x: Any) -> Any:
        out = x @ (self.qweight.to(x) / 64).T
        return out if self.bias is None else out + self.bias


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # the second has biases
def test_layers_of_other_packages_are_asked_for_their_weight_and_not_written(architecture: str, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "base", architecture, seed := random.randrange(1 << 30))
    model: Any = load_model(tmp_path / "base", dtype=torch.float32, device=DEVICE)
    full = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            opaque = OpaqueLinear(layer)
            setattr(model.get_submodule(parent), child, opaque)
            full.get_submodule(name).weight.data = opaque.qweight.float() / 64
    runner = ModelRunner(model, EngineConfig(max_running=4, max_slots=2, kv_bytes=1 << 24))
    check_against_reference(runner)
    adapters = {
        name: peft_adapters.peft_model(full, architecture, seed, **peft_adapters.VARIANTS[name])
        for name in ("rank4", "dora16")
    }
    folders = {name: peft_adapters.save(adapter, tmp_path / name) for name, adapter in adapters.items()}
    prompt = [random.randrange(3, 300) for _ in range(12)]
    for slot, folder in enumerate(folders.values()):
        runner.bank.load(slot, fold_adapter(load_adapter(folder), runner.model, dtype=torch.float32))
    outcomes = generate_rows(runner, [(prompt, {slot: 1.0}) for slot in range(len(folders))], 1)
    for adapter, outcome in zip(adapters.values(), outcomes, strict=True):
        assert float(logprob_errors(adapter, prompt, outcome)) <= 2e-3
    ours = LoraModel(runner.model)
    ours.load_adapter(folders["rank4"], "default")
    with pytest.raises(UnsupportedError, match="OpaqueLinear"):
        ours.merge_adapter(["default"])
