"""What each kind of job makes, against PEFT and transformers themselves."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.errors import InvalidRequestError, NotFoundError, ServerError
from server.jobs.record import JobState
from tests import peft_adapters
from tests.jobs.conftest import Shop
from tests.jobs.hub import stand_in

IDS = torch.tensor([[5, 17, 30, 200, 41, 7]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def under_peft(shop: Shop, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(shop.references["base"]), folder).eval()


def mixed(shop: Shop, **weights: float) -> Any:
    base = shop.references["base"]
    changes = [(w, peft_adapters.merged_delta(base, shop.references[name])) for name, w in weights.items()]
    return peft_adapters.with_deltas(base, changes)


def sources(**weights: float) -> list[dict[str, Any]]:
    return [{"name": name, "weight": weight} for name, weight in weights.items()]


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ({"rank4": 0.7, "rank8": -0.5}, {"combination_type": "cat"}),
        ({"rank4": 0.7, "dora": 0.5}, {"combination_type": "svd", "svd_rank": 256}),
    ],
)
def test_a_mix_is_the_weighted_sum_of_what_its_sources_change(
    shop: Shop, weights: dict[str, float], options: dict[str, Any]
) -> None:
    result = shop.result("mix", name="mixed", adapters=sources(**weights), note="a mix", **options)
    record = shop.store.get("mixed")
    assert result["adapter"]["digest"] == record.digest
    assert record.note == "a mix"
    assert record.source["kind"] == "mix"
    assert [one["name"] for one in record.source["inputs"]] == list(weights)
    found = logits(under_peft(shop, shop.folder("mixed")))
    torch.testing.assert_close(found, logits(mixed(shop, **weights)), rtol=1e-3, atol=1e-3)


def test_random_draws_are_those_of_the_seed(shop: Shop) -> None:
    options = {"adapters": sources(rank4=1.0, dora=1.0), "combination_type": "dare_ties_svd", "density": 0.5}
    digests = [shop.result("mix", name="dare", seed=seed, **options)["adapter"]["digest"] for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert shop.store.get("dare").generation == 2


def test_a_mix_that_cannot_be_says_why_and_leaves_nothing(shop: Shop) -> None:
    before = shop.store.histories()
    record = shop.run("mix", name="bad", adapters=sources(rank4=1.0, rank8=1.0), combination_type="linear").record
    assert record.state is JobState.FAILED
    assert "same r" in record.error["message"]
    assert shop.store.histories() == before
    with pytest.raises(NotFoundError):
        shop.run("mix", name="bad", adapters=sources(unknown=1.0))
    with pytest.raises(InvalidRequestError):
        shop.run("mix", name="a/b", adapters=sources(rank4=1.0))


def test_a_mix_for_another_generation_than_expected_is_not_published(shop: Shop) -> None:
    record = shop.run("mix", name="rank4", adapters=sources(rank8=2.0), expected_generation=7).record
    assert (record.state, record.error["code"]) == (JobState.FAILED, "generation_conflict")
    assert shop.store.get("rank4").generation == 1


def test_rslora_converts_exactly_and_dora_up_to_the_error_that_is_told(shop: Shop) -> None:
    exact = shop.result("convert", name="plain", adapter="rslora")
    assert exact["relative_error"]["max"] == 0
    config = json.loads((shop.folder("plain") / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    found = logits(under_peft(shop, shop.folder("plain")))
    torch.testing.assert_close(found, logits(shop.references["rslora"]), rtol=1e-4, atol=1e-4)
    full = shop.result("convert", name="plain", adapter="dora", rank=256)
    assert full["relative_error"]["max"] < 1e-4
    found = logits(under_peft(shop, shop.folder("plain")))
    torch.testing.assert_close(found, logits(shop.references["dora"]), rtol=1e-3, atol=1e-3)
    low = shop.result("convert", name="plain", adapter="dora", rank=4)
    assert 0.01 < low["relative_error"]["mean"] <= low["relative_error"]["max"] < 1
    assert shop.run("convert", name="plain", adapter="rank4").record.error["code"] == "adapter_config_invalid"


def test_a_merged_model_is_that_of_peft_with_its_tokenizer(shop: Shop) -> None:
    result = shop.result("merge", adapters=["rslora", "dora"])
    folder = shop.root / result["export"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = logits(mixed(shop, rslora=1.0, dora=1.0))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    text = "What is the capital of France?"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(shop.model)(text)
    assert result["num_shards"] == 1


def test_weights_of_a_merge_are_those_of_a_mix(shop: Shop) -> None:
    adapters = [{"name": "rslora", "weight": -0.5}, {"name": "dora", "weight": 0.75}, "rank4"]
    result = shop.result("merge", adapters=adapters)
    model = AutoModelForCausalLM.from_pretrained(shop.root / result["export"], dtype=torch.float32).eval()
    expected = logits(mixed(shop, rslora=-0.5, dora=0.75, rank4=1.0))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_extracted_from_a_fine_tuned_model(shop: Shop) -> None:
    tuned = copy.deepcopy(shop.references["rank4"]).merge_and_unload()
    tuned.save_pretrained(shop.import_root / "tuned")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    result = shop.result("extract", name="extracted", path="tuned", rank=4, target_modules=targets)
    assert result["relative_error"]["max"] < 1e-3
    found = logits(under_peft(shop, shop.folder("extracted")))
    torch.testing.assert_close(found, logits(tuned), rtol=1e-3, atol=1e-3)


def test_verify_finds_what_is_damaged(shop: Shop) -> None:
    sound = shop.result("verify")
    assert (sound["num_damaged"], sound["num_verified"]) == (0, sum(len(h.generations) for h in shop.store.histories()))
    path = shop.folder("patterns") / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        found = shop.result("verify", adapters=["patterns", "rank4"])
    finally:
        path.write_bytes(data)
    assert [one["problem"] is None for one in found["adapters"]] == [False, True]


# Imports


def pissa(shop: Shop) -> tuple[Path, Any]:
    """An adapter trained on a base that PiSSA changed, and PEFT's model with it."""
    model = peft_adapters.peft_model(shop.references["base"], "llama", 3, r=4, init_lora_weights="pissa", std=0.0)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(copy.deepcopy(shop.references["base"]), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return peft_adapters.save(model, shop.import_root / "pissa"), model


def test_an_adapter_of_a_changed_base_is_converted_on_the_way_in(shop: Shop) -> None:
    _, model = pissa(shop)
    result = shop.result("import", name="pissa", path="pissa")
    assert result["converted_from"] == "pissa"
    found = logits(under_peft(shop, shop.folder("pissa")))
    torch.testing.assert_close(found, logits(model), rtol=1e-3, atol=1e-3)


def test_a_folder_below_the_root_is_imported_as_it_is(shop: Shop) -> None:
    shop.result("import", name="copied", path="dora")
    assert shop.store.get("copied").digest == shop.store.get("dora").digest


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("../base", "path_forbidden"),
        ("/etc", "path_forbidden"),
        ("link", "path_forbidden"),
        ("missing", "path_not_found"),
        ("a\0b", "path_not_found"),
        ("x" * 999, "path_not_found"),
    ],
)
def test_paths_that_are_not_taken(shop: Shop, path: str, code: str) -> None:
    link = shop.import_root / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    with pytest.raises(ServerError) as caught:
        shop.run("import", name="x", path=path)
    assert caught.value.code == code
    assert str(shop.root) not in caught.value.message


def test_a_pickle_file_is_refused_by_name(shop: Shop) -> None:
    folder = shop.import_root / "pickled"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert shop.run("import", name="x", path="pickled").record.error["code"] == "adapter_pickle"


def test_an_adapter_is_fetched_from_the_hub_at_its_revision(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    with stand_in(shop.folders["dora16"], "team/my-adapter", commit) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        shop.result("import", name="fetched", repo="team/my-adapter", revision=commit)
        assert shop.store.get("fetched").digest == shop.store.get("dora16").digest
        assert shop.store.get("fetched").source["options"]["revision"] == commit
        missing = shop.run("import", name="x", repo="team/other", revision=commit).record
        assert missing.error["code"] == "source_not_found"
    assert load_file(shop.folder("fetched") / "adapter_model.safetensors")
