"""A model that is quantized while it is loaded fits where it would not fit in full precision."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

# The limit counts what a process allocates, and the mapped file, of which nothing need be in memory.
SCRIPT = """
import resource, sys
from pathlib import Path
import bitsandbytes, torch, transformers.models.llama.modeling_llama
from server.engine import Quantization
from server.engine.model import load_model

folder, num_bytes, kind, dtype = sys.argv[1:]
torch.set_num_threads(1)
torch.nn.Linear(64, 64)(torch.ones(2, 64)).sum().backward()
limit = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize() + int(num_bytes)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
model = load_model(folder, dtype=getattr(torch, dtype), device=torch.device("cpu"), quantization=Quantization(kind))
print(model.get_memory_footprint())
"""


def test_loading_never_holds_the_whole_model_in_full_precision(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=16, vocab_size=256)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    room = int(0.6 * file_bytes)  # for weights of 4 bits and their scales, 0.28, and one tensor at a time

    def load(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(file_bytes + room), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    result = load("nf4", "bfloat16")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < room
    result = load("none", "float32")  # which must be copied to be converted: the limit counts
    assert result.returncode != 0
    assert "memory" in result.stderr
