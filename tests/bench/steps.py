"""Where the time of one decode step goes, and how far that is from what the machine could do.

    python -m tests.bench --profile [--rows 16] [--context 192] [--kinds base,lora,rank8,dora,mix]

Runs an engine with its delivery to an event loop, without HTTP, on the demo model in bfloat16, with 8 adapters of ranks
8 to 64. The floor is measured on the spot: for products, adapters and cache, which follow each other, the bytes that a
step reads over the rate at which this machine reads memory, or the arithmetic over the rate of its products, whichever
takes longer. The lowest floor takes all three together, as if reading one part and computing another could overlap.
"""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import server.engine.loop as engine_loop
from lora_core.maths import Folded
from lora_core.ops.cpu import SplitGroup
from lora_core.ops.native import NativeGroup
from lora_core.packing import PackedWeight
from server.delivery import Delivery, GenerationGroup
from server.demo import ensure_demo_model
from server.engine import EngineConfig, EngineLoop, GenerationRequest, ModelRunner, SamplingParams, load_runner
from server.engine.attention import NativeAttention, PagedAttention
from server.engine.decoder import DecoderStack, Seconds
from server.engine.sampling import Drawn
from server.engine.scheduler import Scheduler, Step
from tests.bench.machine import start_quietly
from tests.bench.workloads import RANKS
from tests.engine_driver import FixedLease

NUM_ADAPTERS = 8
NUM_STEPS = 24
# What a step spends its time on, and the calls that are it. What is called inside one of them is its part.
PARTS: Sequence[tuple[str, Any, str]] = (
    ("scheduling", Scheduler, "schedule"),
    ("scheduling", Scheduler, "commit"),
    ("scheduling", Scheduler, "note_duration"),
    ("scheduling", engine_loop, "build_batch"),
    ("base products", PackedWeight, "__call__"),
    ("adapters", SplitGroup, "apply"),
    ("adapters", NativeGroup, "apply"),
    ("attention and cache", PagedAttention, "attend_joined"),
    ("attention and cache", PagedAttention, "attend"),
    ("attention and cache", NativeAttention, "attend_joined"),
    ("attention and cache", NativeAttention, "attend"),
    ("sampling", engine_loop, "draw"),
    ("sampling", Drawn, "read"),
    ("delivery", EngineLoop, "_advance"),
    ("delivery", Delivery, "flush"),
)
REST = "other operators, Python"
# The same of what C does of a layer in one call, as C itself counts it.
NATIVE_PARTS = {
    "products": "base products",
    "adapters": "adapters",
    "attention": "attention and cache",
    "others": "norms and gates",
}


class Account:
    """Seconds of the steps of an engine, by part; put around the calls while it is open."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._is_inside = False
        self._now: dict[str, float] = {}
        self._native = Seconds()
        self._originals: list[tuple[Any, str, Any]] = []
        self.steps: list[dict[str, float]] = []

    def __enter__(self) -> "Account":
        for part, owner, name in PARTS:
            self._put(owner, name, self._timed(part, getattr(owner, name)))
        self._put(DecoderStack, "seconds", self._native)
        self._put(EngineLoop, "_launch", self._noting_rows(EngineLoop._launch))
        self._put(EngineLoop, "_step", self._closing(EngineLoop._step))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)

    def _put(self, owner: Any, name: str, call: Any) -> None:
        self._originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, call)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return call(*args, **kwargs)
            self._is_inside, start = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._is_inside = False
                self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - start

        return timed

    def _noting_rows(self, call: Callable[..., bool]) -> Callable[..., bool]:
        def launch(engine: EngineLoop, step: Step) -> bool:
            is_full = len(step.chunks) == self._rows and all(chunk.num_tokens == 1 for chunk in step.chunks)
            self._now["full"] = float(is_full)
            return call(engine, step)

        return launch

    def _closing(self, call: Callable[[EngineLoop], bool]) -> Callable[[EngineLoop], bool]:
        """A step is counted from its beginning to the next one's: what happens between belongs to it."""

        def step(engine: EngineLoop) -> bool:
            now, begin = self._now, time.perf_counter()
            for name, part in NATIVE_PARTS.items():
                if seconds := getattr(self._native, name):
                    now[part] = now.get(part, 0.0) + seconds
                    setattr(self._native, name, 0.0)
            if now.pop("full", 0.0):
                now[REST] = begin - now.pop("begin") - sum(s for part, s in now.items() if part != "begin")
                self.steps.append(now)
            self._now = {"begin": begin}
            return call(engine)

        return step


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


async def run_streams(
    runner: ModelRunner, kind: str, rows: int, context: int, account: Account, *, num_threads: int
) -> None:
    """Streams that decode side by side, and somebody who takes their tokens."""
    delivery = Delivery()
    delivery.attach(asyncio.get_running_loop())
    engine = EngineLoop(runner, num_threads=num_threads, on_step=delivery.flush)

    async def stream(i: int) -> None:
        weights = {} if kind == "base" else {i % NUM_ADAPTERS: 1.0}
        if kind == "mix":
            weights = {i % NUM_ADAPTERS: 0.5, (i + 3) % NUM_ADAPTERS: 0.5}
        sampling = SamplingParams(max_new_tokens=NUM_STEPS + rows, ignore_eos=True)
        prompt = [(i + k) % runner.facts.vocab_size for k in range(context - NUM_STEPS // 2)]
        group = GenerationGroup(engine)
        lease = FixedLease(weights) if weights else None
        request = GenerationRequest(f"{kind}-{i}", prompt, sampling, delivery.emitter(group, 0), lease)
        group.add(request)
        engine.submit(request)
        async for _ in group:
            pass

    engine.start()
    try:
        with account:
            await asyncio.gather(*(stream(i) for i in range(rows)))
    finally:
        await asyncio.to_thread(engine.close)


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


def floors(
    runner: ModelRunner, kind: str, rows: int, context: int, adapter_bytes: float, speed: tuple[float, float]
) -> tuple[float, float]:
    """Seconds that a step takes at least: part by part, and of all parts together."""
    weight_bytes = sum(2 * layer.in_features * layer.out_features for layer in runner.layers.values())
    cache_bytes = rows * context * runner.cache.num_bytes_per_token
    num_wanted = {"base": 0, "mix": 2}.get(kind, 1)  # of a row, whose adapters are as large as others on average
    # Two operations a weight, which has two bytes.
    parts = [
        (weight_bytes / speed[0], rows * weight_bytes / speed[1]),
        (adapter_bytes / speed[0], rows * num_wanted * adapter_bytes / NUM_ADAPTERS / speed[1]),
        (cache_bytes / speed[0], 0.0),
    ]
    return sum(max(part) for part in parts), max(map(sum, zip(*parts, strict=True)))


def measure(
    runner: ModelRunner, kind: str, rows: int, context: int, speed: tuple[float, float], *, num_threads: int
) -> None:
    adapter_bytes = load_adapters(runner, kind)
    for _ in range(2):  # in the first round adapters are being packed
        account = Account(rows)
        asyncio.run(run_streams(runner, kind, rows, context, account, num_threads=num_threads))
    totals = sorted(sum(seconds for part, seconds in step.items() if part != "begin") for step in account.steps)
    median_s = totals[len(totals) // 2]
    floor_s, lowest_s = floors(runner, kind, rows, context, adapter_bytes, speed)
    measured = f"{1e3 * median_s:6.1f} ms (best {1e3 * totals[0]:.1f}, {len(totals)} steps)"
    ratios = f"ratio {median_s / floor_s:.2f}   lowest {1e3 * lowest_s:.1f} ms, {median_s / lowest_s:.2f}"
    print(f"{kind:6} {measured}   floor {1e3 * floor_s:.1f} ms, {ratios}")
    mean_s = sum(totals) / len(totals)
    for part in dict.fromkeys([*(part for part, _, _ in PARTS), *NATIVE_PARTS.values(), REST]):
        seconds = sum(step.get(part, 0.0) for step in account.steps) / len(account.steps)
        print(f"       {part:26} {1e3 * seconds:6.1f} ms  {seconds / mean_s:5.0%}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tests.bench --profile", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--kinds", default="base,lora,rank8,dora,mix")
    args = parser.parse_args(arguments)
    start_quietly()
    # The products are timed in a process of their own, for two teams of threads in one slow each other down.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        speed = process.submit(rates).result()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = EngineConfig(kv_bytes=1 << 29, use_prefix_cache=False)
    runner = load_runner(ensure_demo_model(report=print), config, dtype=torch.bfloat16, device=torch.device("cpu"))
    print(f"products read {speed[0] / 1e9:.1f} GB/s and compute {speed[1] / 1e9:.0f} GFLOP/s")
    for kind in args.kinds.split(","):
        measure(runner, kind, args.rows, args.context, speed, num_threads=num_threads)
