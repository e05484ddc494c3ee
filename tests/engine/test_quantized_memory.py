"""A model that is quantized while it is loaded is never in memory in full precision."""

import select
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.process_memory import anonymous_bytes

# A fork for each case, which saves importing it all again; one thread, as a team would not be there after a fork.
SCRIPT = """
import os, sys
import bitsandbytes, torch, transformers.models.llama.modeling_llama
from server.engine import EngineConfig, Quantization, load_runner

torch.set_num_threads(1)
torch.nn.Linear(64, 64)(torch.ones(2, 64)).sum().backward()
folder, *cases = sys.argv[1:]
for case in cases:
    if not os.fork():
        print(os.getpid(), flush=True)
        input()
        kind, dtype = case.split()
        runner = load_runner(
            folder,
            EngineConfig(kv_bytes=8 << 20, max_slots=1, max_running=2),
            dtype=getattr(torch, dtype),
            device=torch.device("cpu"),
            quantization=Quantization(kind),
        )
        print(flush=True)
        input()
        os._exit(0)
    assert os.wait()[1] == 0
"""


def load(folder: Path, *cases: str) -> list[tuple[int, int]]:
    """Load in processes of their own; return what that added at its highest, and in the end, in bytes."""
    command = [sys.executable, "-c", SCRIPT, str(folder), *cases]
    pipe = subprocess.PIPE
    found = []
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in cases:
            pid = int(process.stdout.readline())
            before = highest = anonymous_bytes(pid)
            process.stdin.write("\n")
            while not select.select([process.stdout], [], [], 0.0005)[0]:
                highest = max(highest, anonymous_bytes(pid))
            process.stdout.readline()
            found.append((highest - before, anonymous_bytes(pid) - before))
            process.stdin.write("\n")
    assert process.returncode == 0
    return found


def test_loading_never_holds_the_whole_model_in_full_precision(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, vocab_size=256)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    file_bytes = (tmp_path / "model.safetensors").stat().st_size

    (added, left), (added_by_copy, left_by_copy) = load(tmp_path, "nf4 bfloat16", "none float32")
    assert added < 0.6 * file_bytes, (added, file_bytes)
    assert 0.25 * file_bytes < left < 0.5 * file_bytes, (left, file_bytes)
    # What must be copied to be converted is seen by the same means.
    assert added_by_copy > 1.9 * file_bytes, (added_by_copy, file_bytes)
    assert left_by_copy > 1.9 * file_bytes, (left_by_copy, file_bytes)
