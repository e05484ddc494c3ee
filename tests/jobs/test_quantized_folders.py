"""Jobs on a base whose own files bitsandbytes has quantized, against PEFT on what transformers makes of these files."""

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_core import UnsupportedError
from lora_core.convert import convert_to_lora
from lora_core.layer import is_conv1d
from lora_core.quant_files import DequantizedTensors
from lora_core.tensor_folder import TensorFolder
from server.engine import Quantization, save_quantized
from server.errors import InvalidRequestError
from server.jobs.record import JobState
from server.jobs.tasks import merge
from tests import peft_adapters
from tests.jobs.conftest import Shop
from tests.jobs.test_kinds import logits, pissa, sources
from tests.tiny_folder import write_tiny_folder
from tests.tiny_models import TARGETS

FORMS = {"nf4": Quantization("nf4", double_quant=True), "fp4": Quantization("fp4"), "int8": Quantization("int8")}
CPU = torch.device("cpu")


def dequantized(folder: Path) -> Any:
    """The model of equal numbers that transformers makes of a quantized folder."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).dequantize().eval()


@dataclass
class Quantized:
    """A shop whose jobs have a quantized base; `whole` is the model of equal numbers."""

    shop: Shop
    folder: Path
    whole: Any

    def with_adapters(self, **weights: float) -> Any:
        """The whole model plus what PEFT says that adapters change in it."""
        changes = []
        for name, weight in weights.items():
            model = copy.deepcopy(self.shop.references[name])
            own = dict(self.whole.named_parameters())
            with torch.no_grad():
                for key, value in model.get_base_model().named_parameters():
                    if "lora_" not in key:
                        value.copy_(own[key.replace(".base_layer", "")])
            changes.append((weight, peft_adapters.merged_delta(self.whole, model)))
        return peft_adapters.with_deltas(self.whole, changes)


@pytest.fixture(scope="module", params=FORMS)
def quantized(request: pytest.FixtureRequest, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("quantized") / "base"
    save_quantized(shop.model, folder, FORMS[request.param], dtype=torch.float32, device=CPU)
    handler, convert = shop.queue._handler, shop.adapters._intake._convert
    former, handler._base, convert._base = handler._base, folder, folder
    if not (shop.import_root / "whole").exists():
        (shop.import_root / "whole").mkdir()
        for path in shop.model.iterdir():
            (shop.import_root / "whole" / path.name).write_bytes(path.read_bytes())
    yield Quantized(shop, folder, dequantized(folder))
    handler._base = convert._base = former


def under_peft(quantized: Quantized, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(quantized.whole), folder).eval()


def test_a_mix_is_the_sum_of_what_its_sources_change_in_the_quantized_base(quantized: Quantized) -> None:
    weights = {"rank4": 0.7, "dora": 0.5}
    quantized.shop.result("mix", name="q-mixed", adapters=sources(**weights), combination_type="svd", svd_rank=256)
    found = logits(under_peft(quantized, quantized.shop.folder("q-mixed")))
    torch.testing.assert_close(found, logits(quantized.with_adapters(**weights)), rtol=1e-3, atol=1e-3)


def test_adapters_are_verified_and_converted(quantized: Quantized) -> None:
    shop = quantized.shop
    assert shop.result("verify", adapters=["rank4", "dora", "patterns"])["num_damaged"] == 0
    assert shop.result("convert", name="q-plain", adapter="rslora")["relative_error"]["max"] == 0
    full = shop.result("convert", name="q-plain", adapter="dora", rank=256)
    assert full["relative_error"]["max"] < 1e-4
    found = logits(under_peft(quantized, shop.folder("q-plain")))
    torch.testing.assert_close(found, logits(quantized.with_adapters(dora=1.0)), rtol=1e-3, atol=1e-3)


def test_a_merged_model_is_whole_again(quantized: Quantized) -> None:
    result = quantized.shop.result("merge", adapters=[{"name": "rslora", "weight": 0.5}, "dora"])
    assert result["base_quantized"]
    folder = quantized.shop.root / result["export"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(
        logits(model), logits(quantized.with_adapters(rslora=0.5, dora=1.0)), rtol=1e-4, atol=1e-4
    )
    old = dict(quantized.whole.named_parameters())
    same = [name for name, value in model.named_parameters() if "q_proj" not in name and "v_proj" not in name]
    assert all(torch.equal(model.get_parameter(name), old[name]) for name in same if "down_proj" not in name)
    from_whole = quantized.shop.result("merge", adapters=["rank4"], original_path="whole")
    assert not from_whole["base_quantized"]
    model = AutoModelForCausalLM.from_pretrained(quantized.shop.root / from_whole["export"]).eval()
    torch.testing.assert_close(logits(model), logits(quantized.shop.references["rank4"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("loftq", {"rank": 4, "judge": False, "prompts": ["The quick brown fox."], "quantization": "nf4"}),
        ("loftq-compensation", {"rank": 4, "prompts": ["The quick brown fox."], "quantization": "nf4"}),
        ("extract", {"rank": 4, "path": "tuned-whole", "target_modules": ["q_proj"]}),
    ],
)
def test_what_needs_the_original_asks_for_it_and_takes_it(
    quantized: Quantized, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = quantized.shop
    if kind == "extract" and not (shop.import_root / "tuned-whole").exists():
        copy.deepcopy(shop.references["rank4"]).merge_and_unload().save_pretrained(shop.import_root / "tuned-whole")
    with pytest.raises(InvalidRequestError, match=r"bitsandbytes.*`original_path`") as caught:
        shop.run(kind, name="q-made", **options)
    assert (caught.value.code, caught.value.param) == ("not_supported", "original_path")
    digest = shop.result(kind, name="q-made", original_path="whole", **options)["adapter"]["digest"]
    monkeypatch.setattr(shop.queue._handler, "_base", shop.model)
    assert shop.result(kind, name="q-made", **options)["adapter"]["digest"] == digest


def test_a_quantized_folder_is_no_original(quantized: Quantized) -> None:
    link = quantized.shop.import_root / f"copy-{quantized.folder.parent.name}"
    link.mkdir()
    (link / "config.json").write_bytes((quantized.folder / "config.json").read_bytes())
    for kind, options in (("merge", {"adapters": ["rank4"]}), ("convert", {"name": "x", "adapter": "dora"})):
        with pytest.raises(InvalidRequestError, match="full precision"):
            quantized.shop.run(kind, original_path=link.name, **options)
    with pytest.raises(InvalidRequestError, match="`path`"):
        quantized.shop.run(
            "extract", name="x", path=link.name, original_path="whole", rank=1, target_modules=["q_proj"]
        )


def test_starting_values_are_not_computed_from_quantized_weights(quantized: Quantized, tmp_path: Path) -> None:
    shop = quantized.shop
    folder, _ = pissa(shop)
    record = shop.run("import", name="q-pissa", path="pissa").record
    assert (record.state, record.error["code"]) == (JobState.FAILED, "adapter_needs_conversion")
    assert "`original_path`" in record.error["message"]
    assert record.error["report"]
    assert shop.run("convert", name="q-pissa", path="pissa").record.error["code"] == "adapter_needs_conversion"
    convert_to_lora(folder, None, tmp_path / "plain", base_folder=shop.model)
    expected = (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    for kind in ("import", "convert"):
        shop.result(kind, name="q-pissa", path="pissa", original_path="whole")
        assert (shop.folder("q-pissa") / "adapter_model.safetensors").read_bytes() == expected


# Without a shop


@pytest.mark.parametrize("form", FORMS)
def test_conv1d_is_merged_in_its_own_layout(seed: int, tmp_path: Path, form: str) -> None:
    base = write_tiny_folder(tmp_path / "base", "gpt2", seed)
    reference = peft_adapters.peft_model(base, "gpt2", seed, r=4, target_modules=TARGETS["gpt2"], fan_in_fan_out=True)
    adapter = peft_adapters.save(reference, tmp_path / "adapter")
    change = peft_adapters.merged_delta(base, reference)
    save_quantized(tmp_path / "base", tmp_path / "quantized", FORMS[form], dtype=torch.bfloat16, device=CPU)
    task = {"base": str(tmp_path / "quantized"), "adapters": [str(adapter)], "weights": [1.0], "safe_merge": True}
    with torch.no_grad():
        assert merge.run(task | {"out": str(tmp_path / "out")}, lambda stage, fraction: None)["base_quantized"]
    whole = dequantized(tmp_path / "quantized")  # of linear layers, which have their weights as [O, I]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(change) == 6
    for name, value in merged.named_parameters():
        expected = whole.get_parameter(name)
        if is_conv1d(merged.get_submodule(name.rpartition(".")[0])) and value.ndim == 2:
            expected = expected.T
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), expected.float() + change.get(name, 0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_that_transformers_reads(seed: int, tmp_path: Path, form: str) -> None:
    write_tiny_folder(tmp_path / "base", "llama", seed)
    save_quantized(tmp_path / "base", tmp_path / "quantized", FORMS[form], dtype=torch.float32, device=CPU)
    tensors = DequantizedTensors(TensorFolder(tmp_path / "quantized"), torch.float32)
    expected = dequantized(tmp_path / "quantized").state_dict()
    assert set(tensors) == set(TensorFolder(tmp_path / "base"))
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    assert sum(map(tensors.is_quantized, tensors)) == 14


def test_other_packages_files_are_refused_by_name(seed: int, tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "base", "llama", seed)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    task = {"base": str(tmp_path / "base"), "adapters": [], "weights": [], "safe_merge": True, "out": "x"}
    with pytest.raises(InvalidRequestError, match="quantized by gptq") as caught:
        merge.run(task, lambda stage, fraction: None)
    assert caught.value.code == "not_supported"


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_trains_a_quantized_layer_as_a_whole_is_refused(seed: int, tmp_path: Path, form: str) -> None:
    base = write_tiny_folder(tmp_path / "base", "llama", seed)
    reference = peft_adapters.peft_model(
        base, "llama", seed, r=4, target_modules=["q_proj"], modules_to_save=["up_proj"]
    )
    adapter = peft_adapters.save(reference, tmp_path / "adapter")
    save_quantized(tmp_path / "base", tmp_path / "quantized", FORMS[form], dtype=torch.float32, device=CPU)
    task = {"adapters": [str(adapter)], "weights": [1.0], "safe_merge": True}
    quantized = task | {"base": str(tmp_path / "quantized"), "out": str(tmp_path / "out")}
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"up_proj.* is quantized: .*modules_to_save"):
        merge.run(quantized, lambda stage, fraction: None)
    whole = task | {"base": str(tmp_path / "base"), "out": str(tmp_path / "whole")}
    with torch.no_grad():
        assert not merge.run(whole, lambda stage, fraction: None)["base_quantized"]
