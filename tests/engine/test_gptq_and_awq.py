"""Bases in GPTQ's and AWQ's files, by gptqmodel: each row as PEFT's on a plain model of the same numbers.

PEFT refuses DoRA on their layers, so it is compared on that plain model. The package asks for another torch than ours,
and for much else, so the slow test puts it into a folder of its own and runs this file there.
"""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_core import fold_adapter, load_adapter
from server.engine import EngineConfig, load_runner
from server.engine.selfcheck import check_against_reference
from tests import peft_adapters
from tests.engine_driver import generate_rows, logprob_errors

NUM_TOKENS = 6
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight numbers is the lowest, the second lowest, ...
OPTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"zero_point": True, "version": "gemm"},
}

HAS_GPTQMODEL = all(find_spec(name) is not None for name in ("gptqmodel", "optimum"))
GPTQMODEL = "gptqmodel==7.7.0"
# What it imports and we do not have.
ITS_NEEDS = (
    "datasets==5.2.0", "defuser==0.0.28", "device-smi==0.5.7", "dill==0.4.1", "logbar==0.4.15", "multiprocess==0.70.19",
    "optimum==2.3.0", "pandas==3.1.1", "pillow==13.0.0", "protobuf==7.36.2", "pyarrow==26.0.1", "pypcre==0.6.4",
    "python-dateutil==4.0.0", "setuptools==84.2.1", "threadpoolctl==3.8.0", "tokenicer==0.0.14",
)  # fmt: skip


def packed(values: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """[..., 8 N] numbers of 4 bits -> [..., N] int32."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))
    out: Any = sum(eights[..., i] << (4 * place) for place, i in enumerate(order))
    return ((out + 2**31) % 2**32 - 2**31).to(torch.int32).contiguous()


def gptq_tensors(groups: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Of a weight [I / group, group, O]: what files hold, and the numbers that this means; symmetric."""
    scales = (groups.abs().amax(1) / 7).half()
    rounded = (groups / scales[:, None].float()).round().clamp(-8, 7)
    return {
        "qweight": packed((rounded + 8).flatten(0, 1).T).T.contiguous(),
        "qzeros": packed(torch.full_like(scales, 8 - 1)),  # less one, as files do
        "scales": scales,
        "g_idx": torch.arange(groups.shape[0] * GROUP, dtype=torch.int32) // GROUP,
    }, rounded * scales[:, None].float()


def awq_tensors(groups: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Ditto, with zero points."""
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    rounded = (groups / scales[:, None].float() + zeros[:, None]).round().clamp(0, 15)
    return {
        "qweight": packed(rounded.flatten(0, 1), AWQ_ORDER),
        "qzeros": packed(zeros, AWQ_ORDER),
        "scales": scales,
    }, (rounded - zeros[:, None]) * scales[:, None].float()


def write_folder(folder: Path, method: str, seed: int) -> Any:
    """A tiny model in the method's form, rounded to nearest; returns the plain model with the same numbers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    full: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {}
    for name, layer in full.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            make = gptq_tensors if method == "gptq" else awq_tensors
            held, numbers = make(layer.weight.detach().T.unflatten(0, (-1, GROUP)))
            tensors |= {f"{name}.{key}": value for key, value in held.items()}
            layer.weight.data = numbers.flatten(0, 1).T.contiguous()
    for name, value in full.state_dict().items():
        if f"{name.removesuffix('.weight')}.qweight" not in tensors:
            tensors[name] = value
    config.quantization_config = {"quant_method": method, "bits": 4, "group_size": GROUP} | OPTIONS[method]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return full


@pytest.mark.filterwarnings("ignore")  # gptqmodel's and its dependencies'
@pytest.mark.skipif(not HAS_GPTQMODEL, reason="needs gptqmodel and optimum")
@pytest.mark.parametrize("method", OPTIONS)
def test_rows_of_a_base_of_gptqmodels_equal_peft(method: str, tmp_path: Path) -> None:
    print(f"seed {(seed := random.randrange(1 << 30))}")
    full = write_folder(tmp_path / "base", method, seed)
    config = EngineConfig(max_running=4, max_step_tokens=19, max_slots=2, block_size=4, kv_bytes=1 << 24)
    cpu = torch.device("cpu")
    runner = load_runner(tmp_path / "base", config, dtype=torch.float32, device=cpu)
    assert runner.quantization == method
    assert check_against_reference(runner) < 2e-2
    references, slots = {"base": full}, {"base": {}}
    for slot, name in enumerate(("rank16", "dora16")):
        adapter = peft_adapters.peft_model(full, "llama", seed + slot, std=0.1, **peft_adapters.VARIANTS[name])
        saved = peft_adapters.save(adapter, tmp_path / name)
        runner.bank.load(slot, fold_adapter(load_adapter(saved), runner.model, dtype=torch.float32))
        references[name], slots[name] = adapter, {slot: 1.0}
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, device_map={"": "cpu"})
    references["rank16 on the base itself"] = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "rank16")).eval()
    slots["rank16 on the base itself"] = {0: 1.0}
    prompts = [[random.randrange(3, 300) for _ in range(random.randint(1, 30))] for _ in slots]
    outcomes = generate_rows(runner, zip(prompts, slots.values(), strict=True), NUM_TOKENS)
    for row, prompt, outcome in zip(slots, prompts, outcomes, strict=True):
        assert len(outcome.tokens) == NUM_TOKENS
        errors = logprob_errors(references[row], prompt, outcome)
        print(f"{row}: off by {errors.tolist()}")
        assert float(errors.max()) < 5e-2, row  # the package computes in float16


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPTQMODEL, reason="what it would install is there")
def test_with_gptqmodel_beside_our_own_packages(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path]
    subprocess.run([*install, *ITS_NEEDS], check=True, capture_output=True, timeout=900)
    build = [*install, "--no-build-isolation", GPTQMODEL]
    subprocess.run(build, check=True, capture_output=True, timeout=900, env=environment)
    tests = [sys.executable, "-W", "ignore", "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(tests, check=False, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{len(OPTIONS)} passed" in done.stdout, done.stdout[-3000:]
