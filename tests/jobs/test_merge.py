"""Merging into bases of other shapes: several shards in and out, heads that are tied until an adapter parts them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.jobs.tasks import merge
from tests import peft_adapters
from tests.tiny_folder import write_tiny_folder
from tests.tiny_models import TARGETS

IDS = torch.tensor([[5, 17, 30, 200, 41, 7]])


def merged(base: Path, adapter: Path, out: Path, **task: Any) -> tuple[dict[str, Any], Any]:
    """The job's result and the model that transformers reads back."""
    task = {"base": str(base), "adapters": [str(adapter)], "weights": [1.0], "safe_merge": True, "out": str(out)} | task
    with torch.no_grad():
        result = merge.run(task, lambda stage, fraction: None)
    return result, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def check(model: Any, reference: Any, weight: float, base: Any) -> None:
    expected = peft_adapters.with_deltas(base, [(weight, peft_adapters.merged_delta(base, reference))])
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_shards_are_read_and_written(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_folder(tmp_path / "base", "llama", seed)
    (tmp_path / "base" / "model.safetensors").unlink()
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    reference = peft_adapters.peft_model(base, "llama", seed, r=4, use_dora=True)
    adapter = peft_adapters.save(reference, tmp_path / "adapter")
    monkeypatch.setattr(merge, "SHARD_BYTES", 40_000)
    result, model = merged(tmp_path / "base", adapter, tmp_path / "out", weights=[0.5])
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) == result["num_shards"] > 2
    assert sorted(set(index["weight_map"].values())) == shards
    check(model, reference, 0.5, base)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_head_parts_from_its_embedding(seed: int, tmp_path: Path, target: str) -> None:
    base = write_tiny_folder(tmp_path / "base", "gemma2", seed)
    assert base.config.tie_word_embeddings
    settings = {"target_modules": [target]} if target == "embed_tokens" else {"modules_to_save": [target]}
    reference = peft_adapters.peft_model(base, "gemma2", seed, r=4, **settings)
    with torch.no_grad():
        expected = reference(IDS).logits
    adapter = peft_adapters.save(reference, tmp_path / "adapter")
    result, model = merged(tmp_path / "base", adapter, tmp_path / "out")
    assert result["unties_embeddings"]
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_heads_that_are_tied_or_not_stay_so(seed: int, tmp_path: Path, architecture: str) -> None:
    base = write_tiny_folder(tmp_path / "base", architecture, seed)
    reference = peft_adapters.peft_model(base, architecture, seed, r=4, target_modules=TARGETS[architecture])
    adapter = peft_adapters.save(reference, tmp_path / "adapter")
    result, model = merged(tmp_path / "base", adapter, tmp_path / "out")
    assert not result["unties_embeddings"]
    assert model.config.tie_word_embeddings == base.config.tie_word_embeddings == (architecture == "gpt2")
    check(model, reference, 1.0, base)
