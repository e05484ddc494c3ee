"""What loading, registering and sharing cost: three measurements of the adapters' life on the demo model.

    python -m tests.bench.lifecycle [stall] [zipf] [fair] [--rounds 3] [--into lifecycle]

- stall: 16 running streams on 8 resident adapters; beside them 50 requests one after the other on adapters of rank 64,
  first on resident ones in turn, then each on a cold one. Inter-token latency of the 16 streams meanwhile.
- zipf: streams whose adapters follow Zipf's law over 16 registered adapters, and over 2,000, with 16 slots. Tokens a
  second, how much longer a start with 2,000 takes, and the most that the tiers held.
- fair: a small tenant that asks once a second beside one that keeps the batch full and no more, and beside one that
  sends 100 requests a second. The small one's time to first token.

Both sides of each comparison take turns on one server, and medians over the rounds are compared.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.auth.key_file import KeyFile
from server.auth.keys import Scope, new_key
from tests.bench import report
from tests.bench.client import Job, Result, percentile, run_jobs, summary
from tests.bench.lifecycle_store import fill
from tests.bench.machine import CpuAccount, memory_bytes, start_quietly
from tests.bench.material import Material, cache_folder

RESULTS = Path(__file__).with_name("results")
NUM_STREAMS = 16
NUM_COLD = 50
NUM_REGISTERED = 2000
SAMPLE_S = 0.1
START_TIMEOUT_S = 300
# Goals: label of a ratio or difference -> (limit, whether more is better).
GOALS = {"stall": (1.25, False), "zipf": (0.85, True), "start_s": (2.0, False), "fair": (2.0, False)}


class Served:
    """A running server: its address, its process, and the seconds until it answered."""

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", start_s: float) -> None:
        self.url, self.process, self.start_s = url, process, start_s

    def call(self, method: str, path: str) -> Any:
        """The JSON answer of a route that takes no body."""
        request = urllib.request.Request(self.url + path, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def run(self, jobs: Sequence[Job], num_streams: int) -> tuple[float, list[Result]]:
        """See `run_jobs`; every job must succeed."""
        seconds, results = asyncio.run(run_jobs(self.url, jobs, num_streams))
        check(results)
        return seconds, results


@contextmanager
def serving(store: Path, **flags: object) -> Iterator[Served]:
    """A server over a store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = {"store": store, "port": port, "min-free-bytes": 0, "kv-memory": "512M", "log-level": "warning"} | flags
    command = [sys.executable, "-m", "server", "serve", *(f"--{name}={value}" for name, value in chosen.items())]
    begin_s = time.perf_counter()
    with (cache_folder() / "lifecycle.log").open("ab") as log, subprocess.Popen(command, stderr=log) as process:
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).read()
                break
            except OSError:
                if process.poll() is not None or time.perf_counter() - begin_s > START_TIMEOUT_S:
                    raise RuntimeError(f"the server did not start: see {log.name}") from None
                time.sleep(0.02)
        try:
            yield Served(url, process, time.perf_counter() - begin_s)
        finally:
            process.terminate()
            process.wait()


class Sampler:
    """Follows what the tiers and the process hold, on a thread, while the block runs."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.most: dict[str, float] = {}
        self.num_samples = 0

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            tiers = self._served.call("GET", "/admin/tiers")
            seen = {
                "slots_share": tiers["slots"]["bytes"] / tiers["slots"]["max_bytes"],
                "host_share": tiers["host"]["bytes"] / tiers["host"]["max_bytes"],
                "slots_allocated_bytes": tiers["slot_allocated_bytes"],
                "rss_bytes": memory_bytes(self._served.process.pid),
            }
            self.most = {name: max(value, self.most.get(name, 0)) for name, value in seen.items()}
            self.num_samples += 1


def check(results: Sequence[Result]) -> None:
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(results)} requests failed: {failed[0]}")


def job(text: str, adapter: str, num_new: int, **others: Any) -> Job:
    parameters = {"adapter_id": adapter, "max_new_tokens": num_new, "ignore_eos_token": True}
    return Job("/generate_stream", {"inputs": text, "parameters": parameters}, num_new, 0, **others)


async def _streams_beside(served: Served, text: str, others: Sequence[str], num_new: int) -> dict[str, float]:
    """Gaps of the streams while the others are asked for, one after the other."""
    span: list[float] = []
    first: list[float] = []

    async def ask_others() -> None:
        await asyncio.sleep(2.0)  # until the streams run
        span.append(time.perf_counter())
        for name in others:
            _, results = await run_jobs(served.url, [job(text, name, 2)], 1)
            check(results)
            first.append(results[0].ttft_s)
        span.append(time.perf_counter())

    streams = [job(text, f"warm{i % 8}", num_new) for i in range(NUM_STREAMS)]
    (_, results), _ = await asyncio.gather(run_jobs(served.url, streams, NUM_STREAMS), ask_others())
    check(results)
    ends_s = min(result.event_s[-1] for result in results)
    gaps = sorted(
        1e3 * (b - a)
        for result in results
        for a, b in zip(result.event_s, result.event_s[1:], strict=False)
        if span[0] <= a and b <= min(span[1], ends_s)
    )
    figures = {f"itl_p{percent}_ms": percentile(gaps, percent) for percent in (50, 95, 99)}
    asked = {"others_s": span[1] - span[0], "ttft_p50_s": statistics.median(first)}
    return {**figures, "itl_max_ms": gaps[-1], **asked, "share_seen": min(1.0, (ends_s - span[0]) / asked["others_s"])}


def stall(root: Path, material: Material, rounds: int) -> dict[str, Any]:
    fill(root, "warm", 8, rank=16)
    fill(root, "cold", NUM_COLD, rank=64)
    text = material.prompt(16, 1)[1]
    found: dict[str, list[dict[str, float]]] = {"resident": [], "cold": []}
    with serving(root, **{"max-slots": 16, "max-running": 32, "slot-memory": "1G", "host-memory": "1G"}) as served:
        cold = [f"cold{i}" for i in range(NUM_COLD)]
        for _ in range(rounds):
            for kind, figures in found.items():
                for name in cold:
                    served.call("POST", f"/admin/adapters/{name}/evict")
                names = cold if kind == "cold" else (cold[:8] * NUM_COLD)[:NUM_COLD]
                resident = [f"warm{i}" for i in range(8)] + (cold[:8] if kind == "resident" else [])
                served.run([job(text, name, 16) for name in resident], 16)
                account = CpuAccount()
                beside = asyncio.run(_streams_beside(served, text, names, 900 if kind == "cold" else 500))
                figures.append(beside | {"other_cpu_share": account.other_share()})
                show(f"stall, beside {kind}", figures[-1])
    return {"runs": found, "ratios": {"stall": ratio(found["cold"], found["resident"], "itl_p99_ms")}}


def zipf(root: Path, material: Material, rounds: int) -> dict[str, Any]:
    few, many = root / "few", root / "many"
    fill(few, "zipf", 16, rank=8, targets=("q_proj", "v_proj"))
    fill(many, "zipf", NUM_REGISTERED, rank=8, targets=("q_proj", "v_proj"))
    flags: dict[str, object] = {"max-slots": 16, "max-running": 16, "slot-memory": "64M", "host-memory": "128M"}
    starts: dict[int, list[float]] = {16: [], NUM_REGISTERED: []}
    for _ in range(rounds):
        for number, store in ((16, few), (NUM_REGISTERED, many)):
            with serving(store, **flags) as served:
                starts[number].append(served.start_s)
    later_s = statistics.median(starts[NUM_REGISTERED]) - statistics.median(starts[16])
    found: dict[str, list[dict[str, float]]] = {"16": [], str(NUM_REGISTERED): []}
    rng = random.Random(0)
    with serving(many, **flags) as served:
        served.run([job("Hello", f"zipf{i}", 16) for i in range(16)], NUM_STREAMS)
        for i in range(rounds):
            for number in (16, NUM_REGISTERED):
                weights = [1 / (k + 1) for k in range(number)]
                names = rng.choices(range(number), weights, k=160)
                texts = [material.prompt(32, 1_000 * i + k)[1] for k in range(len(names))]
                jobs = [job(text, f"zipf{k}", 64) for text, k in zip(texts, names, strict=True)]
                account = CpuAccount()
                with Sampler(served) as sampler:
                    seconds, results = served.run(jobs, NUM_STREAMS)
                figures = {**summary(seconds, results), "num_distinct": len(set(names)), **sampler.most}
                figures |= {"num_samples": sampler.num_samples, "other_cpu_share": account.other_share()}
                found[str(number)].append(figures)
                show(f"zipf over {number}", figures)
        tiers = served.call("GET", "/admin/tiers")
    speed = ratio(found[str(NUM_REGISTERED)], found["16"], "output_tokens_per_s")
    return {
        "runs": found,
        "starts_s": starts,
        "tiers": tiers,
        "ratios": {"zipf": speed, "start_s": later_s},
    }


def fair(root: Path, material: Material, rounds: int) -> dict[str, Any]:
    """Every answer of the large tenant has 48 tokens; its clients wait for the answers, or do not."""
    shutil.rmtree(root, ignore_errors=True)
    fill(root, "warm", 2, rank=16)
    keys, secrets = KeyFile(root / "keys.json"), {}
    for tenant in ("small", "large"):
        record, secrets[tenant] = new_key(tenant, [Scope.GENERATE, Scope.ADAPTERS_READ], tenant=tenant)
        keys.add(record)
    texts = [material.prompt(16, i)[1] for i in range(64)]
    num_asked, seconds = 30, 32
    small = [job(texts[i], "warm1", 8, at_s=3.0 + i, api_key=secrets["small"]) for i in range(num_asked)]
    large = [job(texts[i % 64], "warm0", 48, api_key=secrets["large"]) for i in range(100 * seconds)]
    found: dict[str, list[dict[str, float]]] = {"full": [], "flood": []}
    flags = {"max-slots": 16, "max-running": 16, "max-waiting": 8192, "keys": keys.path}
    with serving(root, **flags) as served:
        for _ in range(rounds):
            for kind, figures_of in found.items():
                account = CpuAccount()
                first = asyncio.run(_small_beside(served.url, small, large, is_flood=kind == "flood"))
                figures = {f"ttft_p{percent}_s": percentile(first, percent) for percent in (50, 95, 99)}
                figures_of.append(figures | {"other_cpu_share": account.other_share()})
                show(f"fair, {kind}", figures_of[-1])
    return {"runs": found, "ratios": {"fair": ratio(found["flood"], found["full"], "ttft_p95_s")}}


async def _small_beside(url: str, small: Sequence[Job], large: Sequence[Job], *, is_flood: bool) -> list[float]:
    """The small tenant's times to first token, in order, while the large one floods or fills the batch."""
    jobs = [replace(one, at_s=i / 100) for i, one in enumerate(large)] if is_flood else large
    beside = asyncio.create_task(run_jobs(url, jobs, len(large) if is_flood else NUM_STREAMS))
    _, results = await run_jobs(url, small, len(small))
    beside.cancel()  # the server hears of it, and ends them
    await asyncio.gather(beside, return_exceptions=True)
    await asyncio.sleep(2.0)
    check(results)
    return sorted(result.ttft_s for result in results)


def ratio(above: Sequence[dict[str, float]], below: Sequence[dict[str, float]], figure: str) -> float:
    """Medians over the rounds, one by the other."""
    return statistics.median(run[figure] for run in above) / statistics.median(run[figure] for run in below)


def show(label: str, figures: dict[str, float]) -> None:
    print(f"{label}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


MEASUREMENTS: dict[str, Callable[[Path, Material, int], dict[str, Any]]] = {"stall": stall, "zipf": zipf, "fair": fair}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=", ".join(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--into", default="lifecycle", help="name of the results file")
    args = parser.parse_args()
    if unknown := set(args.what) - MEASUREMENTS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    start_quietly()
    material = Material()
    path = RESULTS / f"{args.into}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found["machine"] = report.machine()
    for name in args.what or MEASUREMENTS:
        cell = MEASUREMENTS[name](cache_folder() / "lifecycle" / name, material, args.rounds)
        found[name] = cell | {"at": time.strftime("%Y-%m-%dT%H:%M:%S"), "load": os.getloadavg()[0]}
        path.write_text(json.dumps(found, indent=1))
        for label, value in cell["ratios"].items():
            limit, more_is_better = GOALS[label]
            is_met = value >= limit if more_is_better else value <= limit
            goal = f"goal {'>=' if more_is_better else '<='} {limit}"
            print(f"{label}: {value:.3f} ({goal}) {'met' if is_met else 'NOT MET'}")


if __name__ == "__main__":
    main()
