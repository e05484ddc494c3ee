"""GGUF files: what is served is the model that the file was made of, and what would not be is refused by name."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from lora_core import fold_adapter, load_adapter
from server.app import build_server
from server.cli.doctor import doctor
from server.engine import Quantization
from server.engine.model import inspect_model, load_model
from server.errors import InvalidRequestError, ServerError, StorageFullError, UnavailableError
from server.gguf import ensure_unpacked, find_gguf, source, unpack
from server.jobs.original import quantization_method, require_unquantized
from server.jobs.tasks import merge
from server.jobs.tasks.base_model import read_base
from server.settings import Settings
from tests import peft_adapters, tiny_models
from tests.engine_driver import generate_rows, logprob_errors
from tests.gguf.write_gguf import Types, as_spm, write_gguf
from tests.tiny_folder import CORPUS, VOCABULARY, tiny_tokenizer

CPU = torch.device("cpu")
TEXTS = [*CORPUS, " In 2024, 1234567 of e\u0301lan's\n\n  </s> don't"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def model_of(architecture: str, **changes: Any) -> Any:
    """A tiny model whose matrices are whole blocks, without windows where files do not tell them."""
    print(f"seed {(seed := random.randrange(1 << 30))}")
    torch.manual_seed(seed)
    config: Any = tiny_models.CONFIGS[architecture]()
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY}
    if architecture == "llama":
        sizes["head_dim"] = 16
    if architecture == "qwen2":
        sizes |= {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2}
    for name, value in (sizes | changes).items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and norms are constant after initialisation: make them matter
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def assert_equal(folder: Path, model: Any) -> Any:
    """The model in the folder computes what `model` does, with nothing of it missing; returns it."""
    found: Any = load_model(folder, dtype=torch.float32, device=CPU)
    ids = torch.randint(3, VOCABULARY, (2, 100))
    with torch.no_grad():
        wanted, logits = model(ids).logits, found(ids).logits
    assert float((wanted - logits).abs().max()) < 1e-5 * float(wanted.abs().max())
    return found


def rope_freqs(base: float, head_dim: int, factor: float) -> np.ndarray:
    """What llama.cpp's converter writes of Llama 3's scaling: divisors of frequencies."""
    out = []
    for freq in 1.0 / base ** (np.arange(0, head_dim, 2) / head_dim):
        wavelen = 2 * np.pi / freq
        if wavelen < 8192 / 4:
            out.append(1.0)
        elif wavelen > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelen - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_what_is_unpacked_is_the_model_that_the_file_was_made_of(architecture: str, tmp_path: Path) -> None:
    model = model_of(architecture)
    kind = random.choice([Types.Q8_0, Types.Q4_0, Types.Q5_1, Types.BF16])
    tokenizer: Any = tiny_tokenizer()
    own: dict[str, Any] = {}
    if architecture.startswith("qwen"):
        own["ggml.pre"] = "qwen2"
        vocab = tokenizer.get_vocab()
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": None}
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=gguf_merges(tokenizer.backend_tokenizer), **special)
    elif architecture != "llama":
        own = as_spm()
    write_gguf(tmp_path / "m.gguf", model, architecture, kind=kind, tokenizer=own)
    folder = ensure_unpacked(tmp_path / "m.gguf", "float32", report=print, cache_dir=tmp_path)
    found = assert_equal(folder, model)
    assert quantization_method(folder) == (None if kind == Types.BF16 else "GGUF")
    facts = inspect_model(found)
    assert (facts.eos_token_ids, facts.vocab_size) == ({2}, VOCABULARY)
    saved: Any = AutoTokenizer.from_pretrained(folder)
    assert saved.chat_template == tiny_tokenizer().chat_template
    assert saved.convert_ids_to_tokens(range(3)) == ["<pad>", "<s>", "</s>"]
    for text in TEXTS:
        ids = saved(text).input_ids
        if architecture == "llama" or architecture.startswith("qwen"):
            assert ids == tokenizer(text).input_ids
        else:
            assert ids[0] == 1
            # Phi's has a space after special tokens, as its own has.
            assert saved.decode(ids[1:]).strip().replace("</s>  ", "</s> ") == text.strip()


@pytest.mark.parametrize("kind", [Types.Q4_K, Types.Q6_K])
def test_k_quants(kind: Any, tmp_path: Path) -> None:
    model = model_of("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    write_gguf(tmp_path / "m.gguf", model, "llama", kind=kind)
    assert_equal(ensure_unpacked(tmp_path / "m.gguf", "float32", report=print, cache_dir=tmp_path), model)


def gguf_merges(backend: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"type": "yarn", "factor": 4.0, "original_context_length": 128},
    ),
    "llama3": ("llama", LLAMA3, {}),
    "linear in full attention": (
        "gemma3",
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        {"type": "linear", "factor": 8.0},
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotary_embeddings(name: str, tmp_path: Path) -> None:
    architecture, rope, scaling = ROPES[name]
    rope, changes, tokenizer = {"rope_theta": 10_000.0} | rope, {}, {}
    if architecture == "gemma3":  # every sixth layer attends to all, which files do not say
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
        layers = ["sliding_attention"] * 5 + ["full_attention"]
        changes, tokenizer = {"num_hidden_layers": 6, "layer_types": layers}, as_spm()
    if architecture == "qwen2":
        tokenizer = {"ggml.pre": "qwen2"}
    model = model_of(architecture, rope_parameters=rope, **changes)
    extra = {"rope_freqs.weight": rope_freqs(5e5, 16, 32.0)} if name == "llama3" else {}
    own = {f"rope.scaling.{key}": value for key, value in scaling.items()}
    write_gguf(tmp_path / "m.gguf", model, architecture, own=own, extra=extra, tokenizer=tokenizer)
    assert_equal(ensure_unpacked(tmp_path / "m.gguf", "float32", report=print, cache_dir=tmp_path), model)


def test_a_file_is_served_with_adapters_as_peft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.app.ensure_unpacked", partial(ensure_unpacked, cache_dir=tmp_path))
    model = model_of("llama")
    (tmp_path / "my-model").mkdir()
    write_gguf(
        tmp_path / "my-model" / "m-Q4_0.gguf", model, "llama", kind=Types.Q4_0, tokenizer={"ggml.eot_token_id": 7}
    )
    settings = Settings(
        model=str(tmp_path / "my-model"), store=tmp_path / "store", device="cpu", dtype="float32", kv_memory=1 << 22,
        max_slots=2, slot_memory=1 << 24, host_memory=1 << 24,
    )  # fmt: skip
    server = build_server(settings, print)
    server.close()
    assert server.info.model_id == "my-model"
    assert server.info.quantization is None
    assert server.runner.facts.eos_token_ids == {2, 7}
    references, slots = {"base": model}, {"base": {}}
    for slot, name in enumerate(("rank4", "dora16")):
        references[name] = peft_adapters.peft_model(model, "llama", slot, std=0.1, **peft_adapters.VARIANTS[name])
        saved = peft_adapters.save(references[name], tmp_path / name)
        folded = fold_adapter(load_adapter(saved), server.runner.model, dtype=torch.float32)
        server.runner.bank.load(slot, folded)
        slots[name] = {slot: 1.0}
    prompts = [[random.randrange(3, 300) for _ in range(random.randint(1, 30))] for _ in slots]
    outcomes = generate_rows(server.runner, zip(prompts, slots.values(), strict=True), 6)
    for row, prompt, outcome in zip(slots, prompts, outcomes, strict=True):
        assert len(outcome.tokens) == 6
        assert float(logprob_errors(references[row], prompt, outcome).max()) < 2e-3, row


def test_dtypes_quantizing_and_jobs(tmp_path: Path) -> None:
    model = model_of("llama")
    write_gguf(tmp_path / "m.gguf", model, "llama")
    folder = ensure_unpacked(tmp_path / "m.gguf", "bfloat16", report=print, cache_dir=tmp_path)
    base = read_base(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(base.tensors[name], value.bfloat16()), name
    for kind in ("nf4", "int8"):
        found = load_model(folder, dtype=torch.bfloat16, device=CPU, quantization=Quantization(kind))  # type: ignore[arg-type]
        assert inspect_model(found).vocab_size == VOCABULARY
    with pytest.raises(InvalidRequestError, match=r"by GGUF: name .*`original_path`") as caught:
        require_unquantized(folder, "original_path")
    assert caught.value.code == "not_supported"
    with pytest.raises(InvalidRequestError, match="GGUF"):
        require_unquantized(tmp_path, "original_path")
    adapter = peft_adapters.peft_model(model, "llama", 1, **peft_adapters.VARIANTS["rank4"])
    task = {"base": str(folder), "out": str(tmp_path / "out"), "weights": [1.0], "safe_merge": True}
    task["adapters"] = [str(peft_adapters.save(adapter, tmp_path / "a"))]
    assert merge.run(task, lambda stage, fraction: None)["base_quantized"]
    assert quantization_method(tmp_path / "out") is None
    merged: Any = load_model(tmp_path / "out", dtype=torch.float32, device=CPU)
    wanted = adapter.merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=2e-2, atol=2e-2)


def test_a_tokenizer_beside_the_file_is_taken(tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.chat_template = None
    write_gguf(tmp_path / "m.gguf", model_of("llama"), "llama", tokenizer={"ggml.pre": "of its own"})
    with pytest.raises(InvalidRequestError, match=r"'of its own' does.*tokenizer.json .*beside"):
        ensure_unpacked(tmp_path / "m.gguf", "float32", report=print, cache_dir=tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved: Any = AutoTokenizer.from_pretrained(
        ensure_unpacked(tmp_path / "m.gguf", "float32", report=print, cache_dir=tmp_path)
    )
    assert [saved(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert saved.chat_template == tiny_tokenizer().chat_template


def test_it_is_unpacked_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(file := tmp_path / "m.gguf", model_of("llama"), "llama")
    lines: list[str] = []

    def folder(dtype: str) -> Path:
        return ensure_unpacked(file, dtype, report=lines.append, cache_dir=tmp_path)

    assert folder("float32") == folder("float32") != folder("bfloat16")
    assert sum("unpacking" in line for line in lines) == 2
    former = folder("float32")
    os.utime(file, (1, 1))
    assert folder("float32") != former
    left = sorted(path.name for path in (tmp_path / "gguf").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(StorageFullError, match="LORAMUX_CACHE"):
        folder("float16")
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == left
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="cannot be written: Not a directory") as caught:
        ensure_unpacked(file, "float32", report=print, cache_dir=tmp_path / "file")
    assert caught.value.code == "storage_unavailable"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a key": ({"own": {"attention.scale": 0.5}}, "`llama.attention.scale`"),
    "heads of several widths": ({"own": {"attention.value_length": 8}}, "`attention.value_length` 8"),
    "heads by layer": ({"own": {"attention.head_count": [4, 4]}}, "num_attention_heads"),
    "a window": ({"own": {"attention.sliding_window": 4096}}, "attention windows"),
    "experts": ({"own": {"expert_count": 8}}, "`llama.expert_count`"),
    "a way of scaling": ({"own": {"rope.scaling.type": "longrope"}}, "'longrope'"),
    "a tensor": ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "weights, of which"),
    "frequencies": ({"extra": {"rope_freqs.weight": np.full(8, 2, np.float32)}}, "not that of Llama 3"),
    "a tokenizer": ({"tokenizer": {"ggml.model": "plamo2"}}, "tokenizer is of the kind 'plamo2'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_right_is_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    write_gguf(tmp_path / "m.gguf", model_of("llama"), "llama", **options)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        unpack(tmp_path / "m.gguf", tmp_path, "float32")
    assert caught.value.code == "model_unsupported"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:4096])


def overwrite(file: Path) -> None:
    file.write_bytes(b"no model" * 100)


def change_architecture(file: Path) -> None:
    file.unlink()
    writer = gguf.GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("spoil", [cut, overwrite, change_architecture])
def test_files_that_are_broken_or_of_another_architecture(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    write_gguf(file := tmp_path / "m.gguf", model_of("llama"), "llama")
    spoil(file)
    with pytest.raises(InvalidRequestError) as caught:
        ensure_unpacked(file, "float32", report=print, cache_dir=tmp_path)
    assert caught.value.code == "model_unsupported"
    assert not any(path.is_dir() for path in tmp_path.glob("gguf/*"))


def test_which_file_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_gguf("demo") is None
    assert find_gguf(tmp_path) is None
    (first := tmp_path / "m-Q4_0.gguf").touch()
    assert find_gguf(tmp_path) == find_gguf(str(first)) == first
    (tmp_path / "m-Q8_0.gguf").touch()
    with pytest.raises(InvalidRequestError, match=r"\(m-Q4_0.gguf, m-Q8_0.gguf\): .*`--model .*m-Q4_0.gguf`") as caught:
        find_gguf(tmp_path)
    assert caught.value.code == "model_ambiguous"
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None
    for name, code in {"none.gguf": "model_not_found", "m-00001-of-00002.gguf": "model_unsupported"}.items():
        if code == "model_unsupported":
            (tmp_path / name).touch()
        with pytest.raises(ServerError) as refused:
            find_gguf(tmp_path / name)
        assert refused.value.code == code
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'loramux\[gguf\]'$") as caught:
        build_server(Settings(model=str(first), store=tmp_path / "store", device="cpu"))
    assert caught.value.code == "quantization_missing"


def test_the_doctor_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf", model_of("llama"), "llama")
    doctor(str(tmp_path), tmp_path / "store", False, "http://127.0.0.1:9", None, True)
    assert "m.gguf, 0.0 GiB of Q8_0; served as bfloat16" in capsys.readouterr().out
