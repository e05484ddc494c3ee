"""A load generator that costs little: on a machine with two cores the client's time is taken from the server's.

HTTP/1.1 over asyncio streams, one connection per request; events are counted by their `data: {` prefix as bytes come
in, and nothing is parsed.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Job", "Result", "percentile", "run_jobs", "summary"]


@dataclass(frozen=True)
class Job:
    """One streamed request: its path and body, the tokens it will give, and how long after the start it is sent."""

    path: str
    body: dict[str, Any]
    num_new: int
    num_prompt: int
    at_s: float = 0.0
    api_key: str = ""


@dataclass
class Result:
    """When a job was sent and when each of its events came, in seconds."""

    job: Job
    sent_s: float = 0.0
    event_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.event_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.event_s, self.event_s[1:], strict=False)]


async def run_jobs(url: str, jobs: Sequence[Job], num_streams: int) -> tuple[float, list[Result]]:
    """Send all jobs at their times, at most `num_streams` at once; returns the seconds it took, and each result."""
    start = time.perf_counter()
    places = asyncio.Semaphore(num_streams)
    results = [Result(job) for job in jobs]

    async def one(result: Result) -> None:
        if result.job.at_s:
            await asyncio.sleep(start + result.job.at_s - time.perf_counter())
        async with places:
            await _run(url, result)

    await asyncio.gather(*(one(result) for result in results))
    return time.perf_counter() - start, results


async def _run(url: str, result: Result) -> None:
    parts = urlsplit(url)
    job = result.job
    body = json.dumps(job.body).encode()
    head = (
        f"POST {job.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n"
    )
    head += f"Authorization: Bearer {job.api_key}\r\n\r\n" if job.api_key else "\r\n"
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    result.sent_s = time.perf_counter()
    writer.write(head.encode() + body)
    raw = bytearray()
    while data := await reader.read(1 << 16):
        raw += data
        result.event_s += [time.perf_counter()] * data.count(b"data: {")
    writer.close()
    # A server may put several tokens into one event when the client is slow; far fewer events are an error.
    if not raw.startswith(b"HTTP/1.1 200") or len(result.event_s) < 0.5 * job.num_new:
        result.error = raw[:300].decode(errors="replace") + " ... " + raw[-300:].decode(errors="replace")


def summary(seconds: float, results: Sequence[Result]) -> dict[str, float]:
    """Throughput and latencies of the jobs that succeeded."""
    good = [result for result in results if result.error is None]
    gaps = sorted(gap * 1e3 for result in good for gap in result.gaps_s)
    first = sorted(result.ttft_s for result in good)
    num_new = sum(result.job.num_new for result in good)
    figures = {
        "output_tokens_per_s": num_new / seconds,
        "total_tokens_per_s": (num_new + sum(result.job.num_prompt for result in good)) / seconds,
        "errors": len(results) - len(good),
    }
    for percent in (50, 95, 99):
        figures[f"ttft_p{percent}_s"] = percentile(first, percent)
    for percent in (50, 95, 99):
        figures[f"itl_p{percent}_ms"] = percentile(gaps, percent)
    return figures


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value at `percent` of a sorted sequence, nearest rank; nan of none."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]
