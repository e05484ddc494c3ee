"""A long run: W8's traffic with uploads, deletes and clients that go, and an account of what is left behind.

    python -m tests.bench.soak [--minutes 30] [--rate 1.0] [--into soak]

Requests of 16 to 1,024 + 64 tokens arrive as a Poisson process, adapters by Zipf's law. Meanwhile adapters are uploaded
and deleted, and one client in eight goes before its answer is complete. Every half minute: memory, threads, open files
and latencies. At the end, when nothing runs any more, no request, block or slot may still be held.
"""

import argparse
import asyncio
import io
import itertools
import json
import random
import re
import tarfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.bench.client import percentile
from tests.bench.machine import memory_bytes, start_quietly
from tests.bench.material import Material
from tests.bench.peers import serve
from tests.bench.workloads import WORKLOADS

RESULTS = Path(__file__).with_name("results")
WINDOW_S = 30.0
SHARE_CANCELLED = 1 / 8
NUM_PROMPTS = 48
# Names of adapters that come and go beside the sixteen that stay.
NUM_PASSING = 6


class Soak:
    """The traffic and what was seen of it."""

    def __init__(self, url: str, pid: int, material: Material, rate: float) -> None:
        self.url = url
        self.pid = pid
        self.rate = rate
        self.rng = random.Random(8)
        workload = WORKLOADS["W8"]
        self.names = workload.names()
        lengths = [round(2 ** self.rng.uniform(4, 10)) for _ in range(NUM_PROMPTS)]
        self.prompts = [material.prompt(n, 77_000 + i)[1] for i, n in enumerate(lengths)]
        self.archives = [self._archive(folder) for folder in material.adapters(["a0", "a1", "d0"]).values()]
        self.windows: list[dict[str, float]] = []
        self.counts = dict.fromkeys(("sent", "complete", "cancelled", "refused", "uploads", "deletes"), 0)
        self.errors: list[str] = []
        self._ttft_s: list[float] = []
        self._gaps_ms: list[float] = []

    @staticmethod
    def _archive(folder: Path) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(folder, arcname="adapter")
        return buffer.getvalue()

    async def run(self, minutes: float) -> None:
        end = time.monotonic() + 60 * minutes
        chores = [asyncio.create_task(self._churn(end)), asyncio.create_task(self._watch(end))]
        requests: set[asyncio.Task[None]] = set()
        while time.monotonic() < end:
            await asyncio.sleep(self.rng.expovariate(self.rate))
            task = asyncio.create_task(self._generate())
            requests.add(task)
            task.add_done_callback(requests.discard)
        await asyncio.gather(*chores, *requests)

    async def _generate(self) -> None:
        weights = [1 / (1 + k) for k in range(len(self.names))]
        passing = [f"passing-{i}" for i in range(NUM_PASSING)]
        name = self.rng.choice(passing) if self.rng.random() < 0.1 else self.rng.choices(self.names, weights)[0]
        body = {
            "inputs": self.rng.choice(self.prompts),
            "parameters": {"adapter_id": name, "max_new_tokens": 64, "ignore_eos_token": True},
        }
        patience = self.rng.uniform(1, 40) if self.rng.random() < SHARE_CANCELLED else 0
        status, times, sent = await self._post("/generate_stream", json.dumps(body).encode(), max_events=patience)
        self.counts["sent"] += 1
        if status == 404 and name in passing:
            self.counts["refused"] += 1
        elif status != 200 or (not patience and len(times) < 60):
            self.errors.append(f"{status} after {len(times)} events for {name}")
        else:
            self.counts["cancelled" if patience else "complete"] += 1
            if times:
                self._ttft_s.append(times[0] - sent)
                self._gaps_ms += [1e3 * (b - a) for a, b in itertools.pairwise(times)]

    async def _post(
        self, path: str, body: bytes, *, kind: str = "application/json", method: str = "POST", max_events: float = 0
    ) -> tuple[int, list[float], float]:
        """Status, times of the events, and when it was sent; the connection is cut after `max_events`, unless 0."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        sent = time.perf_counter()
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        times: list[float] = []
        first = b""
        while data := await reader.read(1 << 16):
            first = first or data
            times += [time.perf_counter()] * data.count(b"data: {")
            if max_events and len(times) >= max_events:
                break
        writer.close()
        return int(first.split(b" ", 2)[1]) if first else 0, times, sent

    async def _churn(self, end: float) -> None:
        """Upload and delete."""
        while time.monotonic() < end:
            await asyncio.sleep(self.rng.expovariate(1 / 4))
            name = f"passing-{self.rng.randrange(NUM_PASSING)}"
            if self.rng.random() < 0.5:
                status, _, _ = await self._post(f"/admin/adapters/{name}", b"", method="DELETE")
                self.counts["deletes"] += status < 300
                good = (200, 202, 204, 404)
            else:
                edge = "soak-edge"
                parts = f'--{edge}\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n--{edge}\r\n'
                parts += 'Content-Disposition: form-data; name="file"; filename="adapter.tar"\r\n\r\n'
                body = parts.encode() + self.rng.choice(self.archives) + f"\r\n--{edge}--\r\n".encode()
                kind = f"multipart/form-data; boundary={edge}"
                status, _, _ = await self._post("/admin/adapters", body, kind=kind)
                self.counts["uploads"] += status < 300
                good = (200, 201, 409)
            if status not in good:
                self.errors.append(f"{status} for a change of {name}")

    async def _watch(self, end: float) -> None:
        start = time.monotonic()
        while time.monotonic() < end:
            await asyncio.sleep(min(WINDOW_S, max(end - time.monotonic(), 0.1)))
            gaps, first = sorted(self._gaps_ms), sorted(self._ttft_s)
            self._gaps_ms, self._ttft_s = [], []
            window = {
                "minute": (time.monotonic() - start) / 60,
                "memory_mib": memory_bytes(self.pid) / 2**20,
                "threads": len(list(Path(f"/proc/{self.pid}/task").iterdir())),
                "files": len(list(Path(f"/proc/{self.pid}/fd").iterdir())),
                "ttft_p50_s": percentile(first, 50),
                "ttft_p99_s": percentile(first, 99),
                "itl_p50_ms": percentile(gaps, 50),
                "itl_p99_ms": percentile(gaps, 99),
                "requests": len(first),
            }
            self.windows.append(window)
            print("  ".join(f"{key} {value:.4g}" for key, value in window.items()), flush=True)


def figures(url: str) -> dict[str, float]:
    """The server's own metrics."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(loramux_\w+) (\S+)$", text, re.MULTILINE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--into", default="soak")
    args = parser.parse_args()
    start_quietly()
    material = Material()
    with serve("loramux", material, WORKLOADS["W8"]) as (url, process, _):
        soak = Soak(url, process.pid, material, args.rate)
        asyncio.run(soak.run(args.minutes))
        deadline = time.monotonic() + 60
        left = figures(url)
        while time.monotonic() < deadline and (left["loramux_requests_running"] or left["loramux_requests_waiting"]):
            time.sleep(0.5)
            left = figures(url)
    wanted = ("loramux_requests_running", "loramux_requests_waiting", "loramux_kv_cache_usage_ratio")
    result: dict[str, Any] = {
        "minutes": args.minutes,
        "counts": soak.counts,
        "errors": soak.errors[:20],
        "num_errors": len(soak.errors),
        "left": {name: left[name] for name in wanted},
        "figures": left,
        "windows": soak.windows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.into}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({key: result[key] for key in ("counts", "num_errors", "errors", "left")}, indent=1))


if __name__ == "__main__":
    main()
