"""Where the time of one decode step goes, and how far that is from what the machine could do.

    python -m tests.bench.steps [--rows 16] [--context 192] [--kinds base,lora,rank8,dora,mix]

Runs the engine's parts without server or scheduler on the demo model in bfloat16, with 8 adapters of ranks 8 to 64. The
floor is measured on the spot: the bytes of weights, adapters and cache that a step reads over the rate at which this
machine reads memory, or the arithmetic over the rate of its products, whichever takes longer.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from lora_core.maths import Folded
from lora_core.packing import PackedWeight
from server.demo import ensure_demo_model
from server.engine import EngineConfig, GenerationRequest, ModelRunner, SamplingParams, load_runner
from server.engine.batch import RouteMemo, build_batch
from server.engine.sampling import sample
from server.engine.scheduler import Chunk, Step
from tests.bench.machine import start_quietly
from tests.bench.workloads import RANKS
from tests.engine_driver import FixedLease

NUM_ADAPTERS = 8
NUM_STEPS = 20
BLOCK_SIZE = 16
# Operators by what they are for; what is in none is "other operators", and time in none is Python's.
PARTS = {
    "base and adapter products": ("mkldnn::_linear_pointwise", "aten::addmm_", "aten::linear", "aten::mm"),
    "attention": ("aten::baddbmm", "aten::bmm", "aten::_softmax", "aten::scaled_dot_product_attention"),
    "cache": ("aten::index_copy_", "aten::index_select", "aten::index_fill_"),
    "adapter masks": ("aten::where",),
    "sampling": ("aten::max", "aten::argmax", "aten::sort", "aten::topk"),
}


def load_adapters(runner: ModelRunner, kind: str) -> float:
    """Fill the slots with random adapters; returns the bytes of their factors."""
    for slot in list(runner.bank.loaded_slots):
        runner.bank.free(slot)
    num_bytes = 0
    for slot in range(NUM_ADAPTERS if kind != "base" else 0):
        rank = 8 if kind == "rank8" else RANKS[slot % len(RANKS)]
        modules = {}
        for name, layer in runner.layers.items():
            if layer.is_head:
                continue
            gain = torch.randn(layer.out_features) * 0.01 if kind == "dora" else None
            a, b = torch.randn(rank, layer.in_features), torch.randn(rank, layer.out_features)
            modules[name] = Folded(a * 0.02, b * 0.01, gain).to(runner.dtype)
            num_bytes += 2 * rank * (layer.in_features + layer.out_features)
        runner.bank.load(slot, modules)
    return num_bytes


def make_requests(kind: str, rows: int, context: int, first: int) -> list[GenerationRequest]:
    out, block = [], 1
    for i in range(rows):
        weights: dict[int, float] = {} if kind == "base" else {i % NUM_ADAPTERS: 1.0}
        if kind == "mix":
            weights = {i % NUM_ADAPTERS: 0.5, (i + 3) % NUM_ADAPTERS: 0.5}
        sampling = SamplingParams(max_new_tokens=512)
        lease = FixedLease(weights) if weights else None
        request = GenerationRequest(str(i), [1 + i] * context, sampling, lambda _: None, lease)
        count = -(-(context + 4 * NUM_STEPS) // BLOCK_SIZE)
        request.block_ids, block = list(range(block, block + count)), block + count
        request.arrival, request.num_computed = first + i, context - 1
        out.append(request)
    return out


def run_step(runner: ModelRunner, requests: list[GenerationRequest], routes: RouteMemo) -> None:
    step = Step([Chunk(request, request.num_computed, 1) for request in requests])
    batch = build_batch(step, BLOCK_SIZE, runner.device, routes, use_kernels=runner.uses_kernels)
    logits = runner.forward(batch)
    for request, sampled in zip(batch.sampled, sample(logits, batch.sampled), strict=True):
        request.output_ids.append(sampled.token_id or 0)
        request.num_computed += 1


def best_s(work: Callable[[], Any], times: int = 5) -> float:
    out = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        out.append(time.perf_counter() - start)
    return min(out)


def rates() -> tuple[float, float]:
    """Bytes and floating-point operations per second that products reach here, each where it is the limit."""
    weights = [PackedWeight(torch.randn(1536, 1536).bfloat16()) for _ in range(60)]
    one, many = torch.randn(1, 1536).bfloat16(), torch.randn(512, 1536).bfloat16()
    size = 1536 * 1536 * len(weights)
    with torch.inference_mode():
        read_s = best_s(lambda: [weight(one) for weight in weights])
        compute_s = best_s(lambda: [weight(many) for weight in weights], 3)
    return 2 * size / read_s, 2 * size * 512 / compute_s


def measure(runner: ModelRunner, kind: str, rows: int, context: int, first: int, speed: tuple[float, float]) -> None:
    adapter_bytes = load_adapters(runner, kind)
    requests, routes = make_requests(kind, rows, context, first), RouteMemo()
    for _ in range(3):
        run_step(runner, requests, routes)
    times = sorted(best_s(lambda: run_step(runner, requests, routes), 1) for _ in range(NUM_STEPS))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(5):
            run_step(runner, requests, routes)
        profiled_s = (time.perf_counter() - start) / 5
    own = {event.key: event.self_cpu_time_total / 5e6 for event in profile.key_averages()}
    weight_bytes = sum(2 * layer.in_features * layer.out_features for layer in runner.layers.values())
    cache_bytes = rows * context * runner.cache.num_bytes_per_token
    read = (weight_bytes + adapter_bytes + cache_bytes) / speed[0]
    compute = rows * (weight_bytes + adapter_bytes) / speed[1]
    floor_s = max(read, compute)
    median_s = times[len(times) // 2]
    measured = f"{1e3 * median_s:6.1f} ms (best {1e3 * times[0]:.1f})"
    print(f"{kind:6} {measured}   floor {1e3 * floor_s:.1f} ms   ratio {median_s / floor_s:.2f}")
    known = {part: sum(own.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    known["other operators"] = sum(own.values()) - sum(known.values())
    known["Python, scheduling of operators"] = max(profiled_s - sum(own.values()), 0.0)
    for part, seconds in known.items():
        print(f"       {part:32} {1e3 * seconds:6.1f} ms  {seconds / profiled_s:5.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--kinds", default="base,lora,rank8,dora,mix")
    args = parser.parse_args()
    start_quietly()
    config = EngineConfig(kv_bytes=1 << 29, block_size=BLOCK_SIZE)
    runner = load_runner(ensure_demo_model(report=print), config, dtype=torch.bfloat16, device=torch.device("cpu"))
    speed = rates()
    print(f"products read {speed[0] / 1e9:.1f} GB/s and compute {speed[1] / 1e9:.0f} GFLOP/s")
    for i, kind in enumerate(args.kinds.split(",")):
        measure(runner, kind, args.rows, args.context, 1_000 * (i + 1), speed)


if __name__ == "__main__":
    main()
