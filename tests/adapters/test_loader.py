"""Folding where the base weights are: beside the steps, while no base weight goes to the host, and as PEFT says."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import ModelSlots, Route, Router, Run, maths, wrap_linears
from lora_core.maths import Folded
from lora_core.serving import ExpertFactors, ModuleCopy, Part, TokenRows
from server.adapters.loader import AdapterLoader
from server.adapters.store import CONFIG_NAME, WEIGHTS_NAME
from tests import peft_adapters
from tests.stand_in_device import StandInDevice, bring_home
from tests.tiny_models import VOCABULARY, tiny_model

EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
KINDS: list[dict[str, Any]] = [
    {"r": 4, "use_dora": True},
    {"r": 16, "lora_alpha": 5, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    {"r": 4},
    {"r": 4, "use_dora": True, "target_modules": ["{embedding}", "{linear}"]},
    {"r": 4, "use_dora": True, "modules_to_save": ["lm_head"]},
    {"r": 4, "use_dora": True, "trainable_token_indices": [5, 9, 17]},
    {"r": 4, "bias": "all"},
]


def settings_of(kind: dict[str, Any], architecture: str) -> dict[str, Any]:
    names = {"embedding": EMBEDDING[architecture], "linear": "c_attn" if architecture == "gpt2" else "q_proj"}
    return {
        key: [item.format(**names) if isinstance(item, str) else item for item in value]
        if isinstance(value, list)
        else value
        for key, value in kind.items()
    }


def at_home(part: Part) -> Part:
    """The same part with the host's tensors."""
    if isinstance(part, Folded):
        assert all(type(tensor) is Tensor for tensor in part.tensors())  # they go to the slot from the host
        return part
    if isinstance(part, TokenRows):
        return TokenRows(part.indices, bring_home(part.change))
    assert isinstance(part, ModuleCopy)
    for module in part.module.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(bring_home(parameter), requires_grad=False)
    return part


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_is_folded_where_the_base_weights_are(
    architecture: str, kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maths, "NORM_ELEMENTS", random.choice([1, 100, 1_000, 1 << 24]))
    base = tiny_model(architecture, seed := random.randrange(1 << 30))
    print(f"seed {seed}")
    adapter = peft_adapters.peft_model(base, architecture, seed, **settings_of(KINDS[kind], architecture))
    folder = peft_adapters.save(adapter, tmp_path / "a")
    files = (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()

    away = copy.deepcopy(base)
    wrap_linears(away, Router())
    device = StandInDevice()
    device.take(away)
    loader = AdapterLoader(away, dtype=torch.float32, max_rank=64, work=device)
    with device:
        told = loader.check(*files)
        folded = loader.fold(*files)
    assert told["folded_bytes"] == folded.num_bytes
    assert not device.num_in_the_way
    assert device.num_beside or not KINDS[kind].get("use_dora")
    assert all(len(shape) <= 1 for shape in device.to_host)  # norms and biases

    served = copy.deepcopy(base)
    router = Router()
    bank = ModelSlots(wrap_linears(served, router), 1, dtype=torch.float32, model=served)
    parts = {name: at_home(part) for name, part in folded.modules.items()}
    assert not any(isinstance(part, ExpertFactors) for part in parts.values())
    bank.load(0, parts)
    ids = torch.randint(3, VOCABULARY, (1, 14))
    with torch.no_grad(), router.use(Route([Run({0: 1.0}, 14)])):
        found = served(input_ids=ids).logits
    with torch.no_grad():
        wanted = adapter(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - base(input_ids=ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_what_is_folded_does_not_hold_on_to_the_files_memory(kind: int, tmp_path: Path) -> None:
    base = tiny_model("llama", seed := random.randrange(1 << 30))
    print(f"seed {seed}")
    adapter = peft_adapters.peft_model(base, "llama", seed, **settings_of(KINDS[kind], "llama"))
    folder = peft_adapters.save(adapter, tmp_path / "a")
    config, weights = (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()
    wrap_linears(base, Router())
    loader = AdapterLoader(base, dtype=torch.float32, max_rank=64)
    wanted = loader.fold(config, weights)
    memory = bytearray(weights)
    folded = loader.fold(config, memoryview(memory))
    memory[:] = bytes(len(memory))
    assert folded.modules.keys() == wanted.modules.keys()
    for name, part in wanted.modules.items():
        own = folded.modules[name].tensors()
        assert all(torch.equal(a, b) for a, b in zip(own, part.tensors(), strict=True))
