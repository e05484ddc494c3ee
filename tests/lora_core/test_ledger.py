"""The report of an adapter's tensors: complete, true to what happened, and there when an adapter is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from safetensors.torch import save as save_bytes

from lora_core import LoraError, TensorLedger, fold_adapter, load_adapter, parse_adapter, save_adapter
from lora_core.checkpoint import read_files
from lora_core.ledger import NOT_REACHED
from lora_core.refusal import refused_groups
from lora_core.weights import AdapterWeights
from tests.peft_adapters import peft_model, save
from tests.tiny_models import tiny_model


@pytest.fixture
def base(seed: int) -> torch.nn.Module:
    return tiny_model("llama", seed)


@pytest.fixture
def adapter(base: torch.nn.Module, seed: int, tmp_path: Path) -> AdapterWeights:
    return load_adapter(save(peft_model(base, "llama", seed, r=4, modules_to_save=["lm_head"]), tmp_path / "a"))


def test_every_tensor_is_in_the_report_once(base: torch.nn.Module, adapter: AdapterWeights) -> None:
    ledger = TensorLedger(adapter)
    fold_adapter(adapter, base, dtype=torch.float32, ledger=ledger)
    groups = {group.tensors: group for group in ledger.groups()}
    assert {name: group.outcome for name, group in groups.items()} == {
        "lora_A": "folded",
        "lora_B": "folded",
        "full weight": "used",
    }
    assert set(groups["lora_A"].names) == set(adapter.modules)
    assert groups["full weight"].names == ("lm_head.weight",)


def test_converted_factors_say_so(base: torch.nn.Module, adapter: AdapterWeights) -> None:
    ledger = TensorLedger(adapter, converted="made plain")
    fold_adapter(adapter, base, dtype=torch.float32, ledger=ledger)
    outcomes = {group.tensors: (group.outcome, group.reason.partition(";")[0]) for group in ledger.groups()}
    assert outcomes["lora_A"] == outcomes["lora_B"] == ("converted", "made plain")
    assert outcomes["full weight"][0] == "used"


def test_a_refusal_names_all_that_is_wrong_and_what_is_not(base: torch.nn.Module, adapter: AdapterWeights) -> None:
    wrong = next(iter(adapter.modules))
    modules = dict(adapter.modules)
    modules[wrong] = modules[wrong].map(lambda t: t[:, :-1] if t.shape[0] == modules[wrong].rank else t)
    full = dict(adapter.full) | {"lm_head.weight": torch.zeros(3, 3), "stray.bias": torch.zeros(3)}
    bad = AdapterWeights(adapter.config, modules, {}, full)
    ledger = TensorLedger(bad)
    with pytest.raises(LoraError, match=wrong.replace(".", r"\.")):
        fold_adapter(bad, base, dtype=torch.float32, ledger=ledger)
    refused = {name for group in ledger.groups() if group.outcome == "refused" for name in group.names}
    assert refused == {wrong, "lm_head.weight", "stray.bias"}
    folded = {name for group in ledger.groups() if group.outcome == "folded" for name in group.names}
    assert folded == set(modules) - {wrong}


def test_a_file_that_is_refused_as_it_is_read_has_a_report_too(adapter: AdapterWeights, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path)
    config, weights = read_files(tmp_path)
    tensors = load(weights)
    shaped, alone, *rest = [f"base_model.model.{name}" for name in adapter.modules]
    tensors[f"{shaped}.lora_B.weight"] = torch.zeros(3)
    del tensors[f"{alone}.lora_B.weight"]
    tensors["base_model.model.stray"] = torch.zeros(2)
    tensors[f"{rest[0]}.lora_A.weight"] = tensors[f"{rest[0]}.lora_A.weight"].to(torch.int64)
    weights = save_bytes(tensors)
    with pytest.raises(LoraError) as caught:
        parse_adapter(config, weights)
    groups = refused_groups(config, weights, str(caught.value))
    assert {group.outcome for group in groups} == {"refused"}
    assert sum(len(group.names) for group in groups) == len(tensors)
    reasons = {(group.tensors, name): group.reason for group in groups for name in group.names}
    names = list(adapter.modules)
    assert "must be matrices" in reasons["lora_A", names[0]] == reasons["lora_B", names[0]]
    assert "lacks lora_B" in reasons["lora_A", names[1]]
    assert "dtype I64" in reasons["lora_A", names[2]]
    assert "not supported" in reasons["other", "base_model.model.stray"]
    assert reasons["full weight", "lm_head.weight"] == NOT_REACHED

    (only,) = {group.reason for group in refused_groups(b"{", weights, "no JSON")}
    assert only == "no JSON"
    (whole,) = refused_groups(config, weights[:40], "cut short")
    assert (whole.tensors, whole.outcome) == ("file", "refused")
    assert "reaches past the end" in whole.reason


def test_a_tensor_that_nobody_notes_is_refused(adapter: AdapterWeights) -> None:
    ledger = TensorLedger(adapter)
    for name in list(adapter.modules)[1:]:
        ledger.note(name, ["lora_A", "lora_B"], "used", "so")
    with pytest.raises(LoraError, match="disagree"):
        ledger.settle()
