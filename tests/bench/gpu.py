"""Adapters at the speed of the hardware: ratios on one device, against rooflines measured on the spot.

    python -m tests.bench.gpu [--shape 8b|1b|tiny] [--device cuda] [--quantization none,nf4] [--tune FOLDER]
                              [--no-peers] [--compile-peer] [--json FILE]

Builds a Llama of that shape with random weights on the device; nothing is fetched. Every case runs through the engine
(`EngineLoop`), as requests do; a step's time is the median between two tokens of a stream while all rows decode.
"""

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_core.maths import Folded
from lora_core.quant import settle_layout
from server.engine import EngineConfig, EngineLoop, Event, GenerationRequest, ModelRunner, SamplingParams, Token
from server.engine.ports import AdapterLease
from tests.bench.gpu_cold import cold_times
from tests.bench.gpu_model import SHAPES, Roofline, Shape, build_model, measure_roofline, synchronize, weight_bytes
from tests.bench.gpu_peers import continuous_step_s, peft_step_s
from tests.engine_driver import FixedLease

RANK = 16
RANKS = (8, 16, 32, 64)
NUM_ADAPTERS = 8
TIMEOUT_S = 600.0
# As `loramux serve` has it: threads give way to the engine's more often.
SWITCH_INTERVAL_S = 0.0005
Weights = Mapping[int, float]


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        value: a ratio, or milliseconds.
        target: what it should be, as text.
        is_met: None where there is no target.
    """

    case: str
    form: str
    value: float
    target: str
    is_met: bool | None


@dataclass(frozen=True)
class Kernels:
    """Whether Triton's kernels are used (None: on CUDA), and where their measured parameters are kept."""

    is_used: bool | None = None
    tuning_folder: Path | None = None


class Stream:
    """A request, and when its tokens came."""

    def __init__(self, name: str, prompt: list[int], num_new: int, lease: AdapterLease | None) -> None:
        self.times: list[float] = []
        self.end: Event | None = None
        sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
        self.request = GenerationRequest(name, prompt, sampling, self._emit, lease)

    def _emit(self, event: Event) -> None:
        if isinstance(event, Token):
            self.times.append(time.perf_counter())
        else:
            self.end = event

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times)]


class Bench:
    """One model behind an engine."""

    def __init__(
        self, shape: Shape, quantization: str, dtype: torch.dtype, device: torch.device, kernels: Kernels
    ) -> None:
        self.shape, self.form, self.device = shape, quantization if quantization != "none" else "bf16", device
        model = build_model(shape, quantization, dtype=dtype, device=device)
        for module in model.modules():
            settle_layout(module, dtype)
        self.weight_bytes = weight_bytes(model)
        longest = max(shape.context + shape.num_new, shape.prefill + 1)
        num_tokens = shape.num_rows * longest
        config = EngineConfig(
            max_running=shape.num_rows + 8,
            max_step_tokens=max(NUM_ADAPTERS * shape.prefill, shape.num_rows),
            max_slots=max(shape.num_rows, NUM_ADAPTERS) + 1,
            kv_bytes=2 * shape.kv_bytes(num_tokens, dtype) + (1 << 20),
            max_model_len=longest + 16,
            use_prefix_cache=False,
            use_kernels=kernels.is_used,
            tuning_folder=kernels.tuning_folder,
        )
        self.runner = ModelRunner(model, config)
        self.engine = EngineLoop(self.runner, num_threads=torch.get_num_threads())
        self.engine.start()
        self._names = itertools.count()

    def close(self) -> None:
        self.engine.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompt(self, length: int) -> list[int]:
        return [random.randrange(self.shape.vocabulary) for _ in range(length)]

    def load(self, ranks: Sequence[int], *, dora: bool = False) -> None:
        """Random adapters on all linear layers but the head, in slots 0, 1, ..."""
        for slot in list(self.runner.bank.loaded_slots):
            self.runner.bank.free(slot)
        for slot, rank in enumerate(ranks):
            modules = {}
            for name, layer in self.runner.layers.items():
                if not layer.is_head:
                    gain = self._random(layer.out_features) * 0.01 if dora else None
                    a, b = self._random(rank, layer.in_features), self._random(rank, layer.out_features)
                    modules[name] = Folded(a * 0.02, b * 0.01, gain)
            self.runner.bank.load(slot, modules)

    def _random(self, *shape: int) -> torch.Tensor:
        """Made on the device: a host takes a minute for some GB of random numbers."""
        return torch.randn(shape, device=self.device, dtype=self.runner.dtype)

    def run(self, rows: Sequence[Weights], length: int, num_new: int) -> list[Stream]:
        """Start a request per row at once, and wait for all."""
        streams = [self.submit(length, num_new, weights) for weights in rows]
        self.wait(streams)
        return streams

    def wait(self, streams: Sequence[Stream]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not all(stream.end is not None for stream in streams):
            if time.monotonic() > deadline:
                raise TimeoutError("requests did not end")
            time.sleep(0.002)
        if any(len(s.times) != s.request.sampling.max_new_tokens for s in streams):
            raise RuntimeError(f"a request failed: {next(s.end for s in streams)}")

    def step_s(self, rows: Sequence[Weights]) -> float:
        """Median time of a decode step with these rows, once all of them have begun."""
        self.run(rows, 8, 4)  # whatever is compiled or captured for these rows is now
        streams = self.run(rows, self.shape.context, self.shape.num_new)
        begun, first_end = max(s.times[0] for s in streams), min(s.times[-1] for s in streams)
        gaps = [b - a for s in streams for a, b in itertools.pairwise(s.times) if a >= begun and b <= first_end]
        return statistics.median(gaps or streams[-1].gaps_s)

    def prefill_s(self, rows: Sequence[Weights]) -> float:
        """Time from the first request to the last first token."""
        self.run(rows, self.shape.prefill, 1)
        out = []
        for _ in range(3):
            synchronize(self.device)
            start = time.perf_counter()
            streams = self.run(rows, self.shape.prefill, 1)
            out.append(max(s.times[0] for s in streams) - start)
        return min(out)

    def submit(self, length: int, num_new: int, weights: Weights, lease: AdapterLease | None = None) -> Stream:
        """Start a request for adapters in slots, or for those of a lease."""
        lease = FixedLease(weights) if weights else lease
        stream = Stream(f"{next(self._names)}", self.prompt(length), num_new, lease)
        self.engine.submit(stream.request)
        return stream

    def first_token_s(self, open_lease: Callable[[], AdapterLease]) -> float:
        start = time.perf_counter()
        stream = self.submit(8, 1, {}, open_lease())
        self.wait([stream])
        return stream.times[0] - start

    def wait_for_first(self, streams: Sequence[Stream]) -> None:
        while not all(stream.times or stream.end for stream in streams):
            time.sleep(0.001)


def write_adapter(folder: Path, bench: Bench) -> None:
    """A PEFT folder of rank 16 on all linear layers but the head."""
    tensors, targets = {}, set()
    for name, layer in bench.runner.layers.items():
        if not layer.is_head:
            targets.add(name.rpartition(".")[2])
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, layer.in_features) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, RANK) * 0.01
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(targets)}))
    save_file(tensors, folder / "adapter_model.safetensors")


def at_least(case: str, form: str, value: float, target: float) -> Figure:
    return Figure(case, form, value, f">= {target:g}", value >= target)


def at_most(case: str, form: str, value: float, target: float) -> Figure:
    return Figure(case, form, value, f"<= {target:g}", value <= target)


def measure(bench: Bench, roofline: Roofline, folder: Path) -> tuple[list[Figure], dict[str, float]]:
    """All cases of one model; the second value has step times in seconds by case, for comparisons between models."""
    shape, form, count = bench.shape, bench.form, bench.shape.num_rows
    base: list[Weights] = [{}] * count
    in_turn: list[Weights] = [{i % NUM_ADAPTERS: 1.0} for i in range(count)]
    steps = {"none loaded": bench.step_s(base), "one": bench.step_s(base[:1])}
    bench.load([RANK] * NUM_ADAPTERS)
    steps |= {"base": bench.step_s(base), "8": bench.step_s(in_turn)}
    mixes = [{i % NUM_ADAPTERS: 0.5, (i + 3) % NUM_ADAPTERS: 0.5} for i in range(count)]
    steps["mix"] = bench.step_s(mixes)
    prefill = bench.prefill_s(base[:NUM_ADAPTERS]), bench.prefill_s(in_turn[:NUM_ADAPTERS])
    bench.load([RANK] * NUM_ADAPTERS, dora=True)
    steps["dora"] = bench.step_s(in_turn)
    bench.load([RANKS[i % len(RANKS)] for i in range(count)])
    steps["distinct"] = bench.step_s([{i: 1.0} for i in range(count)])
    bench.load([RANK] * NUM_ADAPTERS)
    bench.runner.bank.free(0)  # the first that the server's registry takes
    staged = folder / "staged"
    write_adapter(staged, bench)
    cold = cold_times(bench, [{i: 1.0} for i in range(1, min(NUM_ADAPTERS, count))], staged, RANK)
    floor_s = bench.weight_bytes / roofline.bytes_per_s
    compute_s = 2 * shape.prefill * min(NUM_ADAPTERS, count) * parameters(bench) / roofline.flops_per_s
    return [
        at_least("loaded but unused / none loaded, step rate", form, steps["none loaded"] / steps["base"], 0.99),
        at_least("8 adapters / base only", form, steps["base"] / steps["8"], 0.92),
        at_least(f"{count} distinct adapters, ranks 8-64 / base only", form, steps["base"] / steps["distinct"], 0.85),
        at_least("DoRA / LoRA", form, steps["8"] / steps["dora"], 0.97),
        at_least("two-adapter mixes / single", form, steps["8"] / steps["mix"], 0.93),
        at_most("decode step at 1 row over the weight-read floor", form, steps["one"] / floor_s, 1.25),
        at_least(f"prefill of {shape.prefill} a row, 8 adapters / base", form, prefill[0] / prefill[1], 0.90),
        Figure("that prefill over its arithmetic floor", form, prefill[1] / compute_s, "", None),
        at_most("cold adapter, disk to first token beyond a resident one's, ms", form, 1e3 * cold.beyond_warm_s, 60),
        Figure("of that, reading, ms", form, 1e3 * cold.read_s, "", None),
        Figure("of that, folding, ms", form, 1e3 * cold.fold_s, "", None),
        Figure("read, folded, and the digest checked meanwhile, ms", form, 1e3 * cold.folded_s, "", None),
        Figure("of that, into its slot, ms", form, 1e3 * cold.copy_s, "", None),
        at_most("others' inter-token p99 meanwhile, over that beside a resident one", form, cold.others, 1.05),
        Figure("others' p99 beside a resident one's arrival over none", form, cold.others_beside_warm, "", None),
    ], steps  # fmt: skip


def parameters(bench: Bench) -> int:
    return sum(layer.in_features * layer.out_features for layer in bench.runner.layers.values() if not layer.is_head)


@dataclass(frozen=True)
class Peers:
    """Which peers are measured beside ours."""

    are_wanted: bool = True
    with_compiled: bool = False


def peers(
    shape: Shape, form: str, steps: Mapping[str, float], device: torch.device, dtype: torch.dtype, wanted: Peers
) -> list[Figure]:
    prompts = [[random.randrange(shape.vocabulary) for _ in range(shape.context)] for _ in range(shape.num_rows)]
    quantization = "none" if form == "bf16" else form
    model: Any = build_model(shape, quantization, dtype=dtype, device=device)
    continuous = continuous_step_s(model, shape, prompts, with_compiled=wanted.with_compiled)
    mixed = peft_step_s(model, shape, prompts, NUM_ADAPTERS)
    return [
        at_least("PEFT mixed batch, time over ours", form, mixed / steps["8"], 8),
        at_least("transformers' continuous batching, time over ours, base only", form, continuous / steps["base"], 1.5),
    ]


def run(shape: Shape, forms: Sequence[str], device: torch.device, kernels: Kernels, wanted: Peers) -> dict[str, Any]:
    """Everything, as figures and what they rest on."""
    dtype = torch.bfloat16
    roofline = measure_roofline(shape, dtype=dtype, device=device)
    figures: list[Figure] = []
    steps: dict[str, dict[str, float]] = {}
    for quantization in forms:
        bench = Bench(shape, quantization, dtype, device, kernels)
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows, steps[bench.form] = measure(bench, roofline, Path(folder))
        finally:
            bench.close()
        form = bench.form
        del bench
        figures += rows
        if wanted.are_wanted:
            figures += peers(shape, form, steps[form], device, dtype, wanted)
    if {"bf16", "nf4"} <= steps.keys():
        ratio = steps["bf16"]["one"] / steps["nf4"]["one"]
        figures.append(at_least("NF4 decode rate at 1 row / bf16's", "nf4", ratio, 1.8))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "shape": asdict(shape),
        "bytes_per_s": roofline.bytes_per_s,
        "flops_per_s": roofline.flops_per_s,
        "steps_s": steps,
        "figures": [asdict(figure) for figure in figures],
    }


def show(result: Mapping[str, Any]) -> None:
    print(f"{result['device']}, torch {result['torch']}: copies {result['bytes_per_s'] / 1e9:.0f} GB/s, ", end="")
    print(f"products {result['flops_per_s'] / 1e12:.2f} TFLOP/s")
    shape = result["shape"]
    print(f"{shape['num_rows']} rows decode after {shape['context']} tokens, rank {RANK} unless said\n")
    for form, steps in result["steps_s"].items():
        print(f"{form}: step in ms  " + "  ".join(f"{name} {1e3 * value:.2f}" for name, value in steps.items()))
    print(f"\n{'case':66} {'weights':8} {'measured':>9}  target")
    for figure in result["figures"]:
        mark = {True: "met", False: "missed", None: ""}[figure["is_met"]]
        print(f"{figure['case']:66} {figure['form']:8} {figure['value']:9.3f}  {figure['target']:8} {mark}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", default="none,nf4")
    parser.add_argument("--rows", type=int, help="in place of the shape's own")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--compile-peer", action="store_true", help="try transformers' compiled steps too, which takes minutes"
    )
    parser.add_argument(
        "--kernels", choices=["auto", "triton"], default="auto", help="triton: also where there is no GPU"
    )
    parser.add_argument(
        "--tune", type=Path, metavar="FOLDER", help="measure launch parameters first, and keep them there"
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured there")
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    shape = replace(shape, num_rows=args.rows) if args.rows else shape
    kernels = Kernels(True if args.kernels == "triton" else None, args.tune)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    forms, device = args.quantization.split(","), torch.device(args.device)
    result = run(shape, forms, device, kernels, Peers(not args.no_peers, args.compile_peer))
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
