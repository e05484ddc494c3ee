"""A model that is quantized while it is loaded is never in memory in full precision."""

import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.process_memory import anonymous_bytes

SCRIPT = """
import sys
import bitsandbytes, torch, transformers.models.llama.modeling_llama
from server.engine import EngineConfig, Quantization, load_runner

folder, kind, dtype = sys.argv[1:]
torch.nn.Linear(64, 64)(torch.ones(2, 64)).sum().backward()
print("ready", flush=True)
input()
runner = load_runner(
    folder,
    EngineConfig(kv_bytes=8 << 20, max_slots=1, max_running=2),
    dtype=getattr(torch, dtype),
    device=torch.device("cpu"),
    quantization=Quantization(kind),
)
print(runner.model.get_memory_footprint())
"""


def load(folder: Path, kind: str, dtype: str) -> tuple[int, int]:
    """Load in a process of its own; return what that added at its highest, and the model's own size, in bytes."""
    command = [sys.executable, "-c", SCRIPT, str(folder), kind, dtype]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = highest = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            highest = max(highest, anonymous_bytes(process.pid))
            time.sleep(0.0005)
        footprint = process.stdout.read()
    assert process.returncode == 0
    return highest - before, int(footprint)


def test_loading_never_holds_the_whole_model_in_full_precision(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=32, vocab_size=256)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    file_bytes = (tmp_path / "model.safetensors").stat().st_size

    added, footprint = load(tmp_path, "nf4", "bfloat16")
    assert footprint < 0.4 * file_bytes
    assert added < 0.6 * file_bytes, (added, file_bytes)
    # What must be copied to be converted is seen by the same means.
    added, _ = load(tmp_path, "none", "float32")
    assert added > 1.9 * file_bytes, (added, file_bytes)
