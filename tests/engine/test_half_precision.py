"""One mixed batch in half precision is as close to the exact numbers as PEFT is when it computes in it row by row.

Weights and adapters are rounded first, so that all three compute with the same numbers: PEFT in float32, which is taken
for exact, PEFT in half precision, whose distance from it is what the precision costs, and the engine.
"""

import copy
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core import fold_adapter, load_adapter
from server.engine import EngineConfig, ModelRunner
from tests import peft_adapters
from tests.device import DEVICE
from tests.engine_driver import Outcome, generate_rows
from tests.tiny_models import VOCABULARY, tiny_model

DTYPES = [torch.bfloat16, *([torch.float16] if DEVICE.type == "cuda" else [])]
NAMES = ["rank4", "rank16", "dora", "whole"]
MIX = {"rank4": 0.7, "rank16": 0.6}
ROWS_PER_KIND, NUM_TOKENS = 8, 16
# Sums in another order round differently, and a hundred numbers of a few rows tell the size of errors only roughly.
FACTOR, FACTOR_OF_A_KIND, ABSOLUTE = 1.5, 2.0, 3e-4
# ... and so much further off is who confuses adapters.
APART = 10.0


@dataclass
class Case:
    """A served model with adapters in its slots, and PEFT's models of each kind of row, in float32 and in half."""

    runner: ModelRunner
    slots: dict[str, dict[int, float]]
    exact: dict[str, Any]
    half: dict[str, Any]


def _rounded(model: Any, dtype: torch.dtype) -> Any:
    """Its parameters' numbers are those that `dtype` has; it computes as before."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def _in(model: Any, dtype: torch.dtype) -> Any:
    """A copy that computes in `dtype`; buffers stay as they are, as in a model that is loaded so."""
    out = copy.deepcopy(model)
    for parameter in out.parameters():
        parameter.data = parameter.data.to(dtype)
    return out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more, and two teams of threads wait for each other on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture(params=["llama", "qwen2", "qwen3", "gemma2", "mistral"])
def case(request: pytest.FixtureRequest, dtype: torch.dtype, seed: int, tmp_path: Path) -> Case:
    architecture: str = request.param
    random.seed(seed)
    base = _rounded(tiny_model(architecture, seed).to(DEVICE), dtype)
    variants = peft_adapters.variants(architecture)
    exact: dict[str, Any] = {"base": base}
    slots: dict[str, dict[int, float]] = {"base": {}}
    config = EngineConfig(max_running=32, max_step_tokens=50, max_slots=8, block_size=4, kv_bytes=1 << 24)
    runner = ModelRunner(_in(base, dtype), config)
    for slot, name in enumerate(NAMES):
        exact[name] = _rounded(peft_adapters.peft_model(base, architecture, seed + slot, **variants[name]), dtype)
        saved = load_adapter(peft_adapters.save(exact[name], tmp_path / name))
        runner.bank.load(slot, fold_adapter(saved, runner.model, dtype=dtype))
        slots[name] = {slot: 1.0}
    exact["mix"] = _mixed(exact, tmp_path)
    slots["mix"] = {slot: weight for name, weight in MIX.items() for slot in slots[name]}
    return Case(runner, slots, exact, {name: _in(model, dtype) for name, model in exact.items()})


def _mixed(models: dict[str, Any], folder: Path) -> Any:
    first, second = MIX
    model = copy.deepcopy(models[first])
    model.load_adapter(str(folder / second), second)
    model.add_weighted_adapter(["default", second], list(MIX.values()), "mix", combination_type="cat")
    model.set_adapter("mix")
    return model.eval()


def _logprobs(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """What a model gives each token after a prompt, [tokens]."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=DEVICE)
    with torch.no_grad(), warnings.catch_warnings():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    return logits.float().log_softmax(-1)[range(len(tokens)), tokens].cpu()


def _size(errors: Iterable[Tensor]) -> float:
    return float(torch.cat([*errors]).square().mean().sqrt())


def test_a_mixed_batch_is_as_close_as_peft_in_the_same_precision(case: Case) -> None:
    kinds = [*case.slots] * ROWS_PER_KIND
    random.shuffle(kinds)
    prompts = [[random.randrange(3, VOCABULARY) for _ in range(random.randint(1, 40))] for _ in kinds]
    outcomes = generate_rows(
        case.runner, [(prompt, case.slots[kind]) for kind, prompt in zip(kinds, prompts, strict=True)], NUM_TOKENS
    )
    own, peft, others = _errors(case, kinds, prompts, outcomes)
    for kind in case.slots:
        print(f"{kind:8} {_size(own[kind]):.2e}, PEFT {_size(peft[kind]):.2e}, others {_size(others[kind]):.2e}")
    allowed = FACTOR * _size(chain(*peft.values())) + ABSOLUTE
    assert _size(chain(*own.values())) <= allowed
    for kind in case.slots:
        assert _size(own[kind]) <= FACTOR_OF_A_KIND * _size(peft[kind]) + ABSOLUTE, kind
        assert _size(others[kind]) > APART * allowed, kind


def _errors(
    case: Case, kinds: list[str], prompts: list[list[int]], outcomes: list[Outcome]
) -> tuple[dict[str, list[Tensor]], ...]:
    """By kind of row: the engine's errors, PEFT's, and the engine's if the row were of the next kind."""
    own, peft, others = (defaultdict[str, list[Tensor]](list) for _ in range(3))
    names = list(case.slots)
    for kind, prompt, outcome in zip(kinds, prompts, outcomes, strict=True):
        tokens, served = outcome.tokens, torch.tensor(outcome.logprobs)
        assert len(tokens) == NUM_TOKENS
        exact = _logprobs(case.exact[kind], prompt, tokens)
        own[kind].append(served - exact)
        peft[kind].append(_logprobs(case.half[kind], prompt, tokens) - exact)
        other = names[(names.index(kind) + 1) % len(names)]
        others[kind].append(served - _logprobs(case.exact[other], prompt, tokens))
    return own, peft, others
