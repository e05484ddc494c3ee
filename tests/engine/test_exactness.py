"""One mixed batch gives every row what PEFT gives it alone."""

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_core import Route, Run, UnsupportedError, fold_adapter, load_adapter
from server.demo import ensure_demo_model
from server.engine import EngineConfig, EngineLoop, ModelRunner
from server.engine.batch import build_batch
from server.engine.graphs import CudaCapture
from server.engine.scheduler import Chunk, Step
from tests import peft_adapters
from tests.device import DEVICE
from tests.engine_driver import Driver, FixedLease, generate_rows, greedy
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

NUM_TOKENS = 14
CLOSE = 1e-4
MIXES = {
    "lora_mix": {"rank4": 0.7, "rank8": 0.6},
    "dora_mix": {"dora": 0.5, "rank16": 0.4, "dora16": -0.3},
}


@dataclass
class Case:
    """A served model with all variants in its slots, and the reference model for every kind of row."""

    runner: ModelRunner
    slots: dict[str, dict[int, float]]
    references: dict[str, Any]


def _demo_model() -> Any:
    folder = ensure_demo_model(report=print)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()


@pytest.fixture(params=[*ARCHITECTURES, pytest.param("smollm2", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    is_demo = request.param == "smollm2"
    architecture = "llama" if is_demo else request.param
    base = _demo_model() if is_demo else tiny_model(architecture, seed).to(DEVICE)
    models = {
        name: peft_adapters.peft_model(base, architecture, seed + i, std=0.02 if is_demo else 0.2, **config)
        for i, (name, config) in enumerate(peft_adapters.variants(architecture).items())
    }
    config = EngineConfig(max_running=8, max_step_tokens=19, max_slots=12, block_size=4, kv_bytes=1 << 28)
    runner = ModelRunner(copy.deepcopy(base), config)
    slots: dict[str, dict[int, float]] = {"base": {}}
    for slot, (name, model) in enumerate(models.items()):
        folder = peft_adapters.save(model, tmp_path / name)
        runner.bank.load(slot, fold_adapter(load_adapter(folder), runner.model, dtype=torch.float32))
        slots[name] = {slot: 1.0}
    references: dict[str, Any] = {"base": base} | models
    mixed = {name for weights in MIXES.values() for name in weights}
    deltas = {name: peft_adapters.merged_delta(base, models[name]) for name in mixed}
    for mix, weights in MIXES.items():
        slots[mix] = {slot: weight for name, weight in weights.items() for slot in slots[name]}
        references[mix] = peft_adapters.with_deltas(base, [(w, deltas[name]) for name, w in weights.items()])
    references["lora_mix"] = _peft_cat(base, models, tmp_path)
    return Case(runner, slots, references)


def _peft_cat(base: Any, models: dict[str, Any], tmp_path: Path) -> Any:
    """PEFT's own combination of two LoRA adapters, which is exact with `cat`."""
    weights = MIXES["lora_mix"]
    first, *others = weights
    model = copy.deepcopy(models[first])
    for name in others:
        model.load_adapter(str(tmp_path / name), name)
    model.add_weighted_adapter(["default", *others], list(weights.values()), "mix", combination_type="cat")
    model.set_adapter("mix")
    return model.eval()


def _prompts(rows: list[str]) -> list[list[int]]:
    return [[random.randrange(3, VOCABULARY) for _ in range(random.randint(1, 40))] for _ in rows]


def _assert_rows_agree(case: Case, rows: list[str], prompts: list[list[int]], outcomes: list[Any]) -> None:
    for row, prompt, outcome in zip(rows, prompts, outcomes, strict=True):
        assert len(outcome.tokens) == NUM_TOKENS
        tokens, logits = peft_adapters.greedy(case.references[row], prompt, NUM_TOKENS)
        logprobs = logits.float().log_softmax(dim=-1)
        for i, (mine, expected) in enumerate(zip(outcome.tokens, tokens, strict=True)):
            assert outcome.logprobs[i] == pytest.approx(float(logprobs[i, mine]), abs=2e-3), (row, i)
            if mine != expected:
                assert float(logits[i, expected] - logits[i, mine]) < CLOSE, (row, i)
                break


def test_a_mixed_batch_equals_peft_row_by_row(case: Case) -> None:
    _generate_and_compare(case, [*case.slots, "base", "dora"])


def _generate_and_compare(case: Case, rows: list[str]) -> None:
    prompts = _prompts(rows)
    outcomes = generate_rows(
        case.runner, [(prompt, case.slots[r]) for r, prompt in zip(rows, prompts, strict=True)], NUM_TOKENS
    )
    _assert_rows_agree(case, rows, prompts, outcomes)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_adapters_with_modules_of_several_layers_of_their_own(architecture: str, tmp_path: Path) -> None:
    base = tiny_model(architecture, random.randrange(1 << 30)).to(DEVICE)
    settings = {"mlp": {"modules_to_save": ["mlp"]}, "one": {"modules_to_save": ["1.mlp", "k_proj"]}, "lora": {}}
    case = Case(ModelRunner(copy.deepcopy(base), EngineConfig(block_size=4, kv_bytes=1 << 24)), {"base": {}}, {})
    case.references["base"] = base
    for slot, (name, config) in enumerate(settings.items()):
        model = peft_adapters.peft_model(base, architecture, random.randrange(1 << 30), r=4, **config)
        saved = peft_adapters.save(model, tmp_path / name)
        case.runner.bank.load(slot, fold_adapter(load_adapter(saved), case.runner.model, dtype=torch.float32))
        case.references[name], case.slots[name] = model, {slot: 1.0}
    _generate_and_compare(case, [*case.slots, *case.slots])


def test_a_module_that_attends_is_refused_as_an_adapters_own(tmp_path: Path) -> None:
    base = tiny_model("llama", 0).to(DEVICE)
    runner = ModelRunner(copy.deepcopy(base), EngineConfig(block_size=4, kv_bytes=1 << 24))
    for i, name in enumerate(("self_attn", "layers.1")):
        model = peft_adapters.peft_model(base, "llama", 0, r=4, target_modules=["down_proj"], modules_to_save=[name])
        saved = load_adapter(peft_adapters.save(model, tmp_path / str(i)))
        with pytest.raises(UnsupportedError, match=f"`modules_to_save`: .*{name}' attends"):
            fold_adapter(saved, runner.model, dtype=torch.float32)


def test_preemption_does_not_change_the_tokens(case: Case) -> None:
    rows = list(case.slots)
    prompts = _prompts(rows)
    need = max(len(prompt) for prompt in prompts) + NUM_TOKENS
    per_block = case.runner.cache.num_bytes // case.runner.cache.num_blocks
    small = replace(case.runner.config, kv_bytes=per_block * (1 + 2 * -(-need // 4)))
    case.runner.config = small
    case.runner.cache = case.runner._make_cache()
    if case.runner.graphs is not None:
        case.runner.graphs = case.runner._record(CudaCapture())
    engine = EngineLoop(case.runner)
    driver = Driver(engine)
    for row, prompt in zip(rows, prompts, strict=True):
        driver.submit(prompt, greedy(NUM_TOKENS), FixedLease(case.slots[row]) if case.slots[row] else None)
    engine.start()
    outcomes = driver.wait()
    assert engine.stats.num_preemptions > 0
    engine.close()
    _assert_rows_agree(case, rows, prompts, outcomes)


def test_base_rows_keep_their_bits_whoever_is_in_the_batch(case: Case) -> None:
    driver = Driver(EngineLoop(case.runner))  # never started: it only makes requests
    rows = ["base", "rank16", "dora", "lora_mix", "dora_mix", "base"]
    requests = [
        driver.submit(prompt, greedy(1), FixedLease(case.slots[row]))
        for row, prompt in zip(rows, _prompts(rows), strict=True)
    ]
    block = 1
    for request in requests:
        count = -(-len(request.prompt_ids) // 4)
        request.block_ids = list(range(block, block + count))
        block += count
    step = Step([Chunk(request, 0, len(request.prompt_ids)) for request in requests], list(range(1, block)))
    batch = build_batch(step, 4, DEVICE, spans_only=case.runner.reads_spans)
    mixed = case.runner.forward(batch)
    off = Route([Run({}, batch.route.num_rows)])
    plain = case.runner.forward(replace(batch, route=off, head_route=Route([Run({}, len(requests))])))
    changed = 0
    for i, request in enumerate(batch.sampled):
        if not request.route_weights:
            assert torch.equal(mixed[i], plain[i])
        else:
            changed += not torch.allclose(mixed[i], plain[i], atol=1e-3)
    assert changed == 4
