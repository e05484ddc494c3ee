"""One round of a workload against a server: its requests, a warm-up before them, and what came out."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.bench.client import Job, run_jobs, summary
from tests.bench.material import Material
from tests.bench.peers import jobs_for
from tests.bench.workloads import WORKLOADS, Workload

__all__ = ["jobs_for_round", "measure_jobs", "prompts", "warm_up"]

SHARED_PROMPT = 512


def prompts(material: Material, name: str, index: int) -> list[tuple[list[int], str]]:
    """One per request, others in every round; those of W9 share their first tokens."""
    shared = material.prompt(SHARED_PROMPT, 1)[0] if name == "W9" else None
    return [
        material.prompt(request.num_prompt, 10_000 * (index + 1) + i, shared)
        for i, request in enumerate(WORKLOADS[name].requests(), 1)
    ]


def jobs_for_round(peer: str, name: str, material: Material, index: int) -> list[Job]:
    """The requests of a workload, as this server wants them."""
    workload = WORKLOADS[name]
    return jobs_for(peer, workload.requests(), prompts(material, name, index), workload)


def warm_up(url: str, peer: str, workload: Workload, material: Material) -> None:
    """Use every adapter once, for as many tokens as it takes to settle."""
    seen = {tuple(request.adapters): request for request in workload.requests()}
    requests = [replace(request, num_new=8, num_prompt=32) for request in seen.values()]
    made = [material.prompt(32, 900_000 + i) for i in range(len(requests))]
    asyncio.run(run_jobs(url, jobs_for(peer, requests, made, workload), workload.num_streams))


def measure_jobs(url: str, jobs: Sequence[Job], num_streams: int) -> dict[str, Any]:
    """Send them; throughput and latencies."""
    seconds, results = asyncio.run(run_jobs(url, jobs, num_streams))
    if failed := [result.error for result in results if result.error]:
        print(f"  {len(failed)} of {len(results)} failed: {failed[0]}")
    return summary(seconds, results) | {"seconds": seconds}
