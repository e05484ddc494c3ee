"""A load generator that costs little: on a machine with two cores the client's time is taken from the server's.

HTTP/1.1 over asyncio streams, one connection per request; events are counted by their `data:` prefix as bytes come in
and parsed only at the end.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Job", "Result", "run_jobs", "summary"]


@dataclass(frozen=True)
class Job:
    """One streamed request: its path and body, and how long after the start it is sent."""

    path: str
    body: dict[str, Any]
    at_s: float = 0.0


@dataclass
class Result:
    """When a job was sent and when each of its events came, in seconds."""

    sent_s: float
    event_s: list[float] = field(default_factory=list)
    last_event: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.event_s, self.event_s[1:], strict=False)]


async def run_jobs(url: str, jobs: Sequence[Job]) -> tuple[float, list[Result]]:
    """Send all jobs at their times; returns the seconds that the whole took, and a result per job."""
    start = time.perf_counter()
    results = await asyncio.gather(*(_run(url, job, start) for job in jobs))
    return time.perf_counter() - start, list(results)


async def _run(url: str, job: Job, start: float) -> Result:
    if job.at_s:
        await asyncio.sleep(start + job.at_s - time.perf_counter())
    parts = urlsplit(url)
    body = json.dumps(job.body).encode()
    head = (
        f"POST {job.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    result = Result(time.perf_counter())
    writer.write(head.encode() + body)
    raw = bytearray()
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        raw += data
        result.event_s += [now] * data.count(b"data: {")
    writer.close()
    if not raw.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(raw[:500].decode(errors="replace"))
    last = raw[raw.rindex(b"data: {") + 6 :].split(b"\n", 1)[0]
    result.last_event = json.loads(last)
    return result


def summary(seconds: float, results: Sequence[Result]) -> dict[str, float]:
    """Throughput and latencies; every event is one token."""
    gaps = sorted(gap * 1e3 for result in results for gap in result.gaps_s)
    first = sorted(result.ttft_s for result in results)
    return {
        "tokens_per_s": sum(len(result.event_s) for result in results) / seconds,
        "ttft_p50_s": statistics.median(first),
        "ttft_p95_s": percentile(first, 95),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p95_ms": percentile(gaps, 95),
        "itl_p99_ms": percentile(gaps, 99),
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value at `percent` of a sorted sequence, nearest rank."""
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]
