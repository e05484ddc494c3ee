"""16 requests at once on 8 adapters over HTTP, against PEFT's mixed batch on the same work in the same run.

    python -m tests.bench.throughput [--requests 16] [--prompt 128] [--new 128] [--rounds 2] [--json FILE]

The demo model in bfloat16; random adapters of ranks 8 to 64 on all seven projections; fixed lengths, greedy, end of
sequence ignored. The peer runs `generate(adapter_names=...)` on one static batch of the same prompts, in a process of
its own. Both get all cores; they take turns.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from tests.bench.client import Job, run_jobs, summary

RANKS = (8, 16, 32, 64)
NUM_ADAPTERS = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
START_TIMEOUT_S = 300


def make_adapters(model: Path, folder: Path, *, use_dora: bool = False) -> dict[str, Path]:
    """Random adapters, small enough that the text stays fluent; by name."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_core import LoraConfig, LoraModel

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lora = LoraModel(base)
    out = {}
    for i in range(NUM_ADAPTERS):
        r = RANKS[i % len(RANKS)]
        name = f"a{i}"
        lora.add_adapter(name, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, use_dora=use_dora))
        for layer in lora.layers.values():
            part = layer.tensors(name)
            torch.nn.init.normal_(part.lora_B, std=0.06 / (2 * r**0.5))
        lora.save_pretrained(folder / name, name)
        out[name] = folder / name
    return out


def prompts(count: int, num_tokens: int, model: Path) -> tuple[list[list[int]], list[str]]:
    """Different prompts of exactly `num_tokens` tokens, as ids and as the text that gives them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [w for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isalpha() and len(w) > 3]
    rng = random.Random(0)
    ids, texts = [], []
    while len(ids) < count:
        text = "".join(" " + rng.choice(words)[1:] for _ in range(num_tokens))
        encoded = tokenizer(text).input_ids[:num_tokens]
        text = tokenizer.decode(encoded)
        if tokenizer(text).input_ids == encoded and len(encoded) == num_tokens:
            ids.append(encoded)
            texts.append(text)
    return ids, texts


class Served:
    """A loramux server in a process of its own."""

    def __init__(self, model: Path, adapters: dict[str, Path], store: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        seeds = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
        command = [sys.executable, "-m", "server", "serve", "--model", str(model), "--store", str(store)]
        self.log = store.with_suffix(".log").open("wb")
        self.process = subprocess.Popen(
            [*command, "--port", str(port), "--min-free-bytes", "0", *seeds, *flags], stderr=self.log, stdout=self.log
        )

    def __enter__(self) -> "Served":
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: see {self.log.name}")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        raise TimeoutError("the server did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def load(url: str, texts: list[str], names: list[str | None], num_new: int) -> dict[str, float]:
    """All requests at once, streamed."""
    jobs = [
        Job(
            "/generate_stream",
            {"inputs": text, "parameters": {"adapter_id": name, "max_new_tokens": num_new, "ignore_eos_token": True}},
        )
        for text, name in zip(texts, names, strict=True)
    ]
    seconds, results = asyncio.run(run_jobs(url, jobs))
    assert all(len(result.event_s) == num_new for result in results)
    return summary(seconds, results)


PEFT_PEER = """
import json, sys, time, torch, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
job = json.loads(Path(sys.argv[1]).read_text())
base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
names = list(job["adapters"])
model = PeftModel.from_pretrained(base, job["adapters"][names[0]], adapter_name=names[0], autocast_adapter_dtype=False)
for name in names[1:]:
    model.load_adapter(job["adapters"][name], adapter_name=name, autocast_adapter_dtype=False)
model = model.to(torch.bfloat16).eval()
ids = torch.tensor(job["prompts"])
def run(n):
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=job["names"],
                             max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    assert out.shape[1] == ids.shape[1] + n
    return ids.shape[0] * n / (time.perf_counter() - start)
run(4)
print(json.dumps([run(job["num_new"]) for _ in range(job["rounds"])]))
"""


def run_peft(job: dict[str, Any], folder: Path) -> list[float]:
    """Tokens per second of each round."""
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "peer.py").write_text(PEFT_PEER)
    out = subprocess.run(
        [sys.executable, folder / "peer.py", folder / "job.json"], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from server.demo import ensure_demo_model

    model = ensure_demo_model(report=print)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapters = make_adapters(model, folder / "adapters")
        ids, texts = prompts(args.requests, args.prompt, model)
        names = [f"a{i % NUM_ADAPTERS}" for i in range(args.requests)]
        result: dict[str, Any] = {
            "cores": os.cpu_count(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "loramux")},
        }
        with Served(model, adapters, folder / "store") as served:
            load(served.url, texts, names, 4)  # adapters into their slots
            for kind, who in (("adapters", names), ("base", [None] * args.requests)):
                result[kind] = [load(served.url, texts, who, args.new) for _ in range(args.rounds)]
        if not args.no_peer:
            job = {"model": str(model), "adapters": {n: str(p) for n, p in adapters.items()}, "prompts": ids}
            result["peft"] = run_peft(job | {"names": names, "num_new": args.new, "rounds": args.rounds}, folder)
    report(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


def report(result: dict[str, Any]) -> None:
    best = {kind: max(run["tokens_per_s"] for run in result[kind]) for kind in ("adapters", "base")}
    for kind in ("adapters", "base"):
        for run in result[kind]:
            print(f"loramux {kind:9}", "  ".join(f"{key} {value:.3g}" for key, value in run.items()))
    print(f"adapters / base      {best['adapters'] / best['base']:.2f}")
    if "peft" in result:
        print("PEFT mixed batch     tokens_per_s", "  ".join(f"{rate:.1f}" for rate in result["peft"]))
        print(f"loramux / PEFT       {best['adapters'] / max(result['peft']):.2f}")


if __name__ == "__main__":
    main()
