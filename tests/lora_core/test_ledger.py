"""The report of an adapter's tensors: complete, true to what happened, and there when an adapter is refused."""

from pathlib import Path

import pytest
import torch

from lora_core import LoraError, TensorLedger, fold_adapter, load_adapter
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


def test_a_tensor_that_nobody_notes_is_refused(adapter: AdapterWeights) -> None:
    ledger = TensorLedger(adapter)
    for name in list(adapter.modules)[1:]:
        ledger.note(name, ["lora_A", "lora_B"], "used", "so")
    with pytest.raises(LoraError, match="disagree"):
        ledger.settle()
