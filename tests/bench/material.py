"""What is measured with: the demo model, seeded adapters in PEFT's format, and prompts of exact lengths."""

import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.bench.workloads import RANKS

__all__ = ["Material", "cache_folder"]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cache_folder() -> Path:
    """Where virtual environments and adapters are kept from run to run."""
    return Path(os.environ.get("LORAMUX_BENCH_CACHE", "~/.cache/loramux-bench")).expanduser()


class Material:
    """The model's folder, the adapters' folders by name, and prompts; made once and kept."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        from server.demo import ensure_demo_model

        self.model = ensure_demo_model(report=print)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        vocabulary = self._tokenizer.get_vocab()
        self._words = sorted(w[1:] for w in vocabulary if w.startswith("Ġ") and w[1:].isalpha() and len(w) > 3)

    def adapters(self, names: Iterable[str]) -> dict[str, Path]:
        """Folders by name; a0, a1, ... have ranks 8 to 64 in turn, r0, ... rank 8, d0, ... are DoRA."""
        folders = {name: cache_folder() / "adapters" / name for name in names}
        missing = [name for name, folder in folders.items() if not (folder / "adapter_config.json").is_file()]
        if missing:
            self._make(missing)
        return folders

    def _make(self, names: Iterable[str]) -> None:
        """Random adapters, small enough that the text stays fluent."""
        import torch
        from transformers import AutoModelForCausalLM

        from lora_core import LoraConfig, LoraModel

        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16)
        lora = LoraModel(base)
        for name in names:
            torch.manual_seed(sum(name.encode()))
            rank = 8 if name.startswith("r") else RANKS[int(name[1:]) % len(RANKS)]
            use_dora = name.startswith("d")
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, use_dora=use_dora)
            lora.add_adapter(name, config)
            for layer in lora.layers.values():
                part = layer.tensors(name)
                torch.nn.init.normal_(part.lora_B, std=0.06 / (2 * rank**0.5))
            lora.save_pretrained(cache_folder() / "adapters" / name, name)

    def prompt(self, num_tokens: int, seed: int, shared: list[int] | None = None) -> tuple[list[int], str]:
        """A prompt of exactly `num_tokens` tokens, as ids and as the text that gives them; `shared` is its start."""
        rng = random.Random(seed)
        start = "" if shared is None else self._tokenizer.decode(shared)
        while True:
            text = start + "".join(" " + rng.choice(self._words) for _ in range(num_tokens))
            ids = self._tokenizer(text).input_ids[:num_tokens]
            text = self._tokenizer.decode(ids)
            if self._tokenizer(text).input_ids == ids and len(ids) == num_tokens:
                return ids, text
