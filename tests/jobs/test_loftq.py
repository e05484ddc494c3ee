"""LoftQ and compensation against a quantized base: what they give back, judged by the models themselves."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core import LoraModel
from lora_core.checkpoint import read_adapter
from server.errors import InvalidRequestError
from server.jobs.record import JobState
from tests.jobs.conftest import Shop
from tests.quantized import quantized_model

PROMPTS = ["What is the capital of France?", "The quick brown fox jumps over the lazy dog."]


def log_probabilities(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 384, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.float(), -1)


def distance(shop: Shop, folder: Path | None, kind: str = "nf4") -> float:
    """Mean KL of the quantized model, with an adapter, from the unquantized one."""
    model = LoraModel(quantized_model(shop.references["base"], kind)).eval()
    if folder is not None:
        model.load_adapter(folder, "one")
        model.set_adapter("one", inference_mode=True)
    wanted = log_probabilities(shop.references["base"])
    return float((wanted.exp() * (wanted - log_probabilities(model))).sum(-1).mean())


def test_compensation_gives_back_more_with_every_rank(shop: Shop) -> None:
    found = [distance(shop, None)]
    for rank in (2, 8, 32):
        result = shop.result("loftq-compensation", name="back", rank=rank, quantization="nf4")
        assert (result["num_modules"], result["quantization"]) == (14, "nf4")
        found.append(distance(shop, shop.folder("back")))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] / 100  # of full rank, as no layer has more than 32 on both sides


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_compensation_leaves_is_told(shop: Shop, kind: str) -> None:
    left = [
        shop.result("loftq-compensation", name="back", rank=rank, quantization=kind)["relative_error_left"]
        for rank in (4, 16, 32)
    ]
    assert 1 > left[0] > left[1] > left[2]
    assert left[2] < 1e-3


def test_an_adapter_mixed_with_the_compensation_is_nearer_to_itself_on_the_whole_base(shop: Shop) -> None:
    shop.result("loftq-compensation", name="back", rank=16, quantization="nf4", prompts=PROMPTS)
    model = LoraModel(quantized_model(shop.references["base"], "nf4")).eval()
    model.load_adapter(shop.folder("rank8"), "own")
    model.load_adapter(shop.folder("back"), "back")
    with torch.no_grad():
        wanted = log_probabilities(shop.references["rank8"])
    model.set_adapter("own", inference_mode=True)
    alone = (log_probabilities(model) - wanted).abs().mean()
    model.set_adapter(["own", "back"], inference_mode=True)
    assert (log_probabilities(model) - wanted).abs().mean() < alone / 2


def test_loftq_keeps_what_helps_and_puts_the_rest_back_bit_for_bit(shop: Shop) -> None:
    result = shop.result("loftq", name="started", adapter="rank8", quantization="nf4", prompts=PROMPTS)
    assert result["num_modules"] == 6
    assert result["kl_after"] <= result["kl_before"]
    _, before = read_adapter(shop.folder("rank8"))
    _, after = read_adapter(shop.folder("started"))
    assert before.keys() == after.keys()
    same = sum(torch.equal(before[key], after[key]) for key in before if key.endswith("lora_A.weight"))
    assert same == result["num_rolled_back"]


def test_loftq_makes_a_new_adapter_that_brings_the_model_nearer(shop: Shop) -> None:
    result = shop.result("loftq", name="fresh", rank=8, quantization="nf4", prompts=PROMPTS)
    assert result["num_modules"] == 14
    assert result["kl_after"] < result["kl_before"]
    everywhere = shop.result("loftq", name="fresh", rank=8, quantization="nf4", judge=False)
    assert everywhere["num_rolled_back"] == 0
    config, _ = read_adapter(shop.folder("fresh"))
    assert (config.r, config.lora_alpha) == (8, 8)
    assert distance(shop, shop.folder("fresh")) < distance(shop, None)


def test_the_original_can_be_another_folder_than_the_base(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = shop.result("loftq-compensation", name="back", rank=4, quantization="nf4")["adapter"]["digest"]
    shutil.copytree(shop.model, shop.import_root / "original")
    monkeypatch.setattr(shop.queue._handler, "_base", shop.root)  # no model is there
    options = {"name": "back", "rank": 4, "quantization": "nf4"}
    assert shop.run("loftq-compensation", **options).record.state is JobState.FAILED
    result = shop.result("loftq-compensation", original_path="original", **options)
    assert result["adapter"]["digest"] == expected


def test_what_cannot_be_says_why(shop: Shop) -> None:
    with pytest.raises(InvalidRequestError, match="not quantized"):
        shop.run("loftq-compensation", name="x", rank=4)
    record = shop.run("loftq", name="x", rank=4, quantization="nf4", target_modules=["lm_head"]).record
    assert (record.state, record.error["message"]) == (JobState.FAILED, "No bnb LoRA module found on the model")
    with pytest.raises(ValueError, match="either `adapter` or the `rank`"):
        shop.run("loftq", name="x", quantization="nf4")
