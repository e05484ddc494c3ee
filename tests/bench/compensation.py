"""What quantizing the demo model costs, and what `loftq-compensation` gives back: KL to the model in bfloat16.

`python -m tests.bench.compensation` runs the job's own task at each rank, and prints the mean over tokens of
KL(bfloat16 ‖ quantized) of the next-token distribution. The text is this project's pages, which the job never sees.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_core import LoraModel
from lora_core.quant import quantized_linear
from server.demo.model import ensure_demo_model
from server.jobs.tasks import compensate
from tests.architecture.source_tree import ROOT

NUM_TOKENS, WIDTH = 2304, 256
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
RANKS = (8, 32, 64)


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] in float32."""
    with torch.no_grad():
        rows = [torch.log_softmax(model(input_ids=row[None], use_cache=False).logits[0].float(), -1) for row in ids]
    return torch.cat(rows)


def quantize(model: Any, kind: str) -> None:
    """All linear layers but the head."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized_linear(module, module.weight.data, kind))


def measure(kind: str, ranks: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """KL of the quantized model alone and with the compensation at each rank."""
    path = ensure_demo_model(report=print)
    text = "\n\n".join((ROOT / page).read_text() for page in PAGES)
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text).input_ids[:NUM_TOKENS]).view(-1, WIDTH)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    wanted = log_probabilities(model, ids)
    quantize(model, kind)
    lora = LoraModel(model).eval()

    def distance() -> float:
        return float((wanted.exp() * (wanted - log_probabilities(lora, ids))).sum(-1).mean())

    found: dict[str, Any] = {"model": path.name, "num_tokens": ids.numel(), kind: distance()}
    print(f"{kind} alone: KL {found[kind]:.4f} over {ids.numel()} tokens", flush=True)
    for rank in ranks:
        out, start = folder / str(rank), time.perf_counter()
        quantization = {"kind": kind, "double_quant": False, "dtype": "bfloat16"}
        task = {"base": str(path), "out": str(out), "rank": rank, "quantization": quantization}
        with torch.no_grad():
            told = compensate.run(task, lambda stage, fraction: None)
        job_s = time.perf_counter() - start
        lora.load_adapter(out, f"rank{rank}")
        lora.set_adapter(f"rank{rank}", inference_mode=True)
        found[f"{kind} + rank {rank}"] = kl = distance()
        left = told["relative_error_left"]
        print(f"{kind} + rank {rank}: KL {kl:.4f}, outputs' error left {left:.1%}, job {job_s:.0f} s", flush=True)
        lora.delete_adapter(f"rank{rank}")
    return found


def main() -> None:
    """Measure, print, and fail if KL does not fall at every rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default="nf4", choices=("nf4", "fp4"))
    kind = parser.parse_args().kind
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(kind, RANKS, Path(folder))
    print(json.dumps(found))
    values = [value for value in found.values() if isinstance(value, float)]
    assert values == sorted(values, reverse=True), "KL does not fall with the rank"


if __name__ == "__main__":
    main()
