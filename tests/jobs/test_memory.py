"""Jobs read the base tensor by tensor: what they hold at once is far from its whole size. By their real processes."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from server.engine import Quantization, save_quantized
from server.jobs.process import WorkProcess
from tests import peft_adapters
from tests.process_memory import anonymous_bytes
from tests.tiny_folder import VOCABULARY, tiny_tokenizer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["The quick brown fox jumps over the lazy dog."]


class Folders:
    """A base of some number of layers, an adapter of each kind on it, and a fine-tuned copy."""

    def __init__(self, root: Path, num_layers: int) -> None:
        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=VOCABULARY,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.root, self.base, self.tuned = root, root / "base", root / "tuned"
        model.save_pretrained(self.base)
        tiny_tokenizer().save_pretrained(self.base)
        self.num_bytes = (self.base / "model.safetensors").stat().st_size
        self.plain = self._adapter(model, "plain", target_modules=ALL)
        self.dora = self._adapter(model, "dora", target_modules=["q_proj"], use_dora=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter.add_(0.01)
        model.save_pretrained(self.tuned)
        self.quantized = root / "quantized"
        save_quantized(self.base, self.quantized, Quantization("nf4"), dtype=torch.bfloat16, device=torch.device("cpu"))

    def _adapter(self, model: Any, name: str, **settings: Any) -> Path:
        return peft_adapters.save(peft_adapters.peft_model(model, "llama", 1, r=4, **settings), self.root / name)

    def peak_bytes(self, kind: str, **task: Any) -> int:
        """The most that a job's process allocates and touches, the interpreter included."""
        process = WorkProcess()
        highest = 0
        is_over = threading.Event()

        def watch() -> None:
            nonlocal highest
            while not is_over.wait(0.001):
                if process._process is not None:
                    highest = max(highest, anonymous_bytes(process._process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        out = self.root / f"out-{kind}-{time.monotonic_ns()}"
        try:
            process.run({"kind": kind, "base": str(self.base), "out": str(out)} | task, lambda stage, fraction: None)
        finally:
            is_over.set()
            watcher.join()
        return highest


Job = Callable[[Folders], dict[str, Any]]
QUANTIZED = {
    "rank": 4,
    "prompts": PROMPTS,
    "quantization": {"kind": "nf4", "double_quant": False, "dtype": "bfloat16"},
}
# The kind, its task, and which share of the base it may hold. LoftQ runs the quantized model, which is 0.28 of it.
JOBS: dict[str, tuple[str, Job, float]] = {
    "merge": ("merge", lambda f: {"adapters": [str(f.plain)], "weights": [1.0], "safe_merge": True}, 0.4),
    "mix": (
        "mix",
        lambda f: {
            "adapters": [str(f.plain)] * 2,
            "weights": [0.5, 0.5],
            "seed": 0,
            "options": {"combination_type": "cat"},
        },
        0.4,
    ),
    "convert a DoRA": ("convert", lambda f: {"adapter": str(f.dora)}, 0.4),
    "merge into a quantized base": (
        "merge",
        lambda f: {"base": str(f.quantized), "adapters": [str(f.dora)], "weights": [1.0], "safe_merge": True},
        0.15,
    ),
    "mix on a quantized base": (
        "mix",
        lambda f: {
            "base": str(f.quantized),
            "adapters": [str(f.dora)] * 2,
            "weights": [0.5, 0.5],
            "seed": 0,
            "options": {"combination_type": "svd"},
        },
        0.15,
    ),
    "extract": ("extract", lambda f: {"tuned": str(f.tuned), "rank": 4, "target_modules": ["q_proj"]}, 0.4),
    "loftq": ("loftq", lambda f: QUANTIZED | {"adapters": [], "judge": False}, 0.7),
    "compensation": ("loftq-compensation", lambda f: QUANTIZED, 0.4),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("large"), 32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("small"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_job_holds_a_small_share_of_the_base(large: Folders, small: Folders, job: str) -> None:
    kind, task, share = JOBS[job]
    alike = small.peak_bytes(kind, **task(small))  # the interpreter, its libraries, and work on single layers
    added = large.peak_bytes(kind, **task(large)) - alike
    print(f"{job}: {added / large.num_bytes:.2f} of the base's {large.num_bytes / 1e6:.0f} MB")
    assert added < share * large.num_bytes, (added, large.num_bytes)
