"""`--quantization int4`: an ordinary model whose weights 4 bits hold, whoever is in the batch and however many."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_core import fold_adapter, load_adapter
from lora_core.packing import can_be_int4, has_int4, round_to_int4
from server.engine import EngineConfig, Quantization, load_runner
from server.engine.quantization import round_weights
from server.engine.selfcheck import check_against_reference
from server.errors import InvalidRequestError
from tests import peft_adapters
from tests.engine_driver import generate_rows, logprob_errors
from tests.tiny_folder import write_tiny_folder
from tests.tiny_models import VOCABULARY

pytestmark = pytest.mark.skipif(not has_int4(), reason="this PyTorch has no products of 4 bits")

CPU = torch.device("cpu")
CONFIG = EngineConfig(max_running=12, max_step_tokens=24, block_size=4, kv_bytes=1 << 24)
NAMES = ["rank4", "dora"]
NUM_TOKENS = 6
# Of log-probabilities, in bfloat16 and with inputs in 8 bits; what rounding to 4 bits does to them is far more.
CLOSE = 0.3


def rounded_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    round_weights(model)
    for name, parameter in model.named_parameters():
        is_rounded = name.endswith("_proj.weight") and can_be_int4(before[name])
        assert torch.equal(parameter, round_to_int4(before[name]) if is_rounded else before[name]), name
    return model.float()


@pytest.mark.parametrize("num_streams", [1, 3, 9])
def test_every_row_gets_what_peft_gives_on_the_rounded_model(num_streams: int, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    folder = tmp_path / "model"
    write_tiny_folder(folder, "llama", seed)
    base = rounded_model(folder)
    runner = load_runner(folder, CONFIG, dtype=torch.bfloat16, device=CPU, quantization=Quantization("int4"))
    assert runner.quantization == "int4"
    assert check_against_reference(runner) < 5e-2
    references = [base]
    for slot, name in enumerate(NAMES):
        config = peft_adapters.variants("llama")[name]
        model = peft_adapters.peft_model(base, "llama", seed + slot, std=0.1, **config)
        saved = peft_adapters.save(model, tmp_path / name)
        runner.bank.load(slot, fold_adapter(load_adapter(saved), runner.model, dtype=torch.bfloat16))
        references.append(model)
    kinds = [i % len(references) for i in range(num_streams)]
    prompts = [[random.randrange(3, VOCABULARY) for _ in range(random.randint(2, 20))] for _ in kinds]
    rows = [(prompt, {kind - 1: 1.0} if kind else {}) for kind, prompt in zip(kinds, prompts, strict=True)]
    for kind, prompt, outcome in zip(kinds, prompts, generate_rows(runner, rows, NUM_TOKENS), strict=True):
        assert len(outcome.tokens) == NUM_TOKENS
        assert float(logprob_errors(references[kind], prompt, outcome).max()) <= CLOSE


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "meta")])
def test_what_it_cannot_do_is_refused_by_name(dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path, "llama", 1)
    with pytest.raises(InvalidRequestError, match="int4 is computed with on CPUs in bfloat16") as caught:
        load_runner(tmp_path, CONFIG, dtype=dtype, device=torch.device(device), quantization=Quantization("int4"))
    assert caught.value.code == "quantization_unsupported"
