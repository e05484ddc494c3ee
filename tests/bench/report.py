"""What came out: a table of all cells, and the ratios that matter with their targets."""

import json
import os
import platform
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.client import Job

__all__ = ["RATE", "is_compared", "machine", "pairs_in_turns", "poisson", "ratios", "render"]

BEST_VLLM = ("vllm", "vllm-lora")
COLUMNS = (
    ("output_tokens_per_s", "tok/s", "{:.1f}"),
    ("ttft_p50_s", "TTFT p50 s", "{:.2f}"),
    ("ttft_p95_s", "p95", "{:.2f}"),
    ("itl_p50_ms", "ITL p50 ms", "{:.0f}"),
    ("itl_p95_ms", "p95", "{:.0f}"),
    ("itl_p99_ms", "p99", "{:.0f}"),
)
# Label, (peers, workload, figure) over (peers, workload, figure), the goal, and whether more is better.
Side = tuple[Sequence[str], str, str]
RATE, TTFT, ITL99 = "output_tokens_per_s", "ttft_p50_s", "itl_p99_ms"
US, INT4 = ("loramux",), ("loramux-int4",)
SLOW = ("vllm-lora", "transformers-cb")  # ten times as slow as we are: a few percent do not matter
COMPARISONS: list[tuple[str, Side, Side, float, bool]] = [
    ("W1 / vLLM's best", (US, "W1", RATE), (BEST_VLLM, "W1", RATE), 1.6, True),
    ("W1 in int4 / vLLM's best", (INT4, "W1", RATE), (BEST_VLLM, "W1", RATE), 1.6, True),
    ("W1 in int4 / llama.cpp Q4", (INT4, "W1", RATE), (("llama.cpp-q4",), "W1", RATE), 1.0, True),
    ("W2 / vLLM's best", (US, "W2", RATE), (BEST_VLLM, "W2", RATE), 1.2, True),
    ("W2 / transformers' continuous batching", (US, "W2", RATE), (("transformers-cb",), "W2", RATE), 3.0, True),
    ("W3 / PEFT mixed batch", (US, "W3", RATE), (("peft",), "W3", RATE), 4.5, True),
    ("W3 / llama.cpp Q4", (US, "W3", RATE), (("llama.cpp-q4",), "W3", RATE), 5.0, True),
    ("W3 in int4 / llama.cpp Q4", (INT4, "W3", RATE), (("llama.cpp-q4",), "W3", RATE), 5.0, True),
    ("W3 / vLLM", (US, "W3", RATE), (("vllm-lora",), "W3", RATE), 12.0, True),
    ("W3 / own W2", (US, "W3", RATE), (US, "W2", RATE), 0.55, True),
    ("W3 with rank 8 / own W2", (US, "W3r8", RATE), (US, "W2", RATE), 0.8, True),
    ("W6 (DoRA) / W3", (US, "W6", RATE), (US, "W3", RATE), 0.97, True),
    ("W7 (mixes) / W3", (US, "W7", RATE), (US, "W3", RATE), 0.85, True),
    ("W4 (cold ones) / W3", (US, "W4", RATE), (US, "W3", RATE), 0.92, True),
    ("W4 / W3, inter-token p99", (US, "W4", ITL99), (US, "W3", ITL99), 1.3, False),
    ("W2 with adapters loaded / without", (("loramux-idle-adapters",), "W2", RATE), (US, "W2", RATE), 0.99, True),
    ("W5 / PEFT mixed batch", (US, "W5", RATE), (("peft",), "W5", RATE), 2.5, True),
    ("W5 / own base, TTFT p50", (US, "W5", TTFT), (US, "W5B", TTFT), 1.6, False),
    ("W9 (shared prompt) / no prefix cache", (US, "W9", RATE), (("loramux-no-prefix-cache",), "W9", RATE), 1.0, True),
]
# Label, workloads of which our lowest figure counts, the figure, its unit, and the most it may be.
LIMITS = [
    ("W3, resident memory in GB", ("W3",), "memory_bytes", 1e9, 1.6),
    ("start without adapters in s, the fastest", ("W1", "W2", "W5B", "W9"), "start_s", 1.0, 8.0),
]


def is_compared(peer: str, workload: str) -> bool:
    """A figure of this cell is ours, or is in one of the comparisons."""
    sides = [side for _, above, below, _, _ in COMPARISONS for side in (above, below)]
    return peer in US or any(peer in peers and workload == name for peers, name, _ in sides)


def pairs_in_turns() -> list[tuple[str, str]]:
    """Cells ("peer/workload") that are compared, unless a round takes minutes or a side has a choice."""
    sides = [(above, below) for _, above, below, _, _ in COMPARISONS]
    quick = [pair for pair in sides if all(len(peers) == 1 and peers[0] not in SLOW for peers, _, _ in pair)]
    return list(dict.fromkeys((_cell(above), _cell(below)) for above, below in quick))


def _cell(side: Side) -> str:
    return f"{side[0][0]}/{side[1]}"


def machine() -> dict[str, Any]:
    """Where it was measured."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cores": os.cpu_count(),
        "processor": names[0] if names else platform.processor(),
        "has": [flag for flag in wanted if flag in flags],
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }


def poisson(jobs: Sequence[Job], rate: float) -> list[Job]:
    """The jobs at random times, `rate` a second on average."""
    rng, at_s, out = random.Random(8), 0.0, []
    for job in jobs:
        at_s += rng.expovariate(rate)
        out.append(replace(job, at_s=at_s))
    return out


def figure(found: dict[str, Any], side: Side) -> float | None:
    """Of the peers' best round, latencies too. Of a cell that was measured in turns, the median of all its rounds: the
    best of many would be luck."""
    peers, workload, name = side
    runs = [run for peer in peers for run in found["cells"].get(f"{peer}/{workload}", {}).get("runs", [])]
    more = [run for peer in peers for run in _rounds_in_turns(found, f"{peer}/{workload}")]
    if more:
        return statistics.median(run[name] for run in runs + more)
    runs = [run for run in runs if run.get(name) is not None]
    return max(runs, key=lambda run: run[RATE])[name] if runs else None


def _rounds_in_turns(found: dict[str, Any], cell: str) -> list[dict[str, Any]]:
    pairs = found.get("turns", {}).get("pairs", {})
    return [
        run
        for pair, rounds in pairs.items()
        for both in rounds
        for run, n in zip(both, pair.split(), strict=True)
        if n == cell
    ]


def in_turns(found: dict[str, Any], above: Side, below: Side) -> float | None:
    """The median ratio over the times that these two were measured one after the other; None if they never were."""
    measured = found.get("turns", {}).get("pairs", {}).get(f"{_cell(above)} {_cell(below)}", [])
    return statistics.median(a[above[2]] / b[below[2]] for a, b in measured) if measured else None


def ratios(found: dict[str, Any]) -> list[tuple[str, float | None, float, bool]]:
    """Label, ratio or None if a side is missing, goal, and whether more is better.

    What was measured in turns counts, if there is any.
    """
    out = []
    for label, above, below, goal, more_is_better in COMPARISONS:
        ratio = in_turns(found, above, below)
        a, b = figure(found, above), figure(found, below)
        if ratio is None and a is not None and b:
            ratio = a / b
        out.append((label, ratio, goal, more_is_better))
    return out


def render(found: dict[str, Any]) -> str:
    """Everything as text."""
    lines = [json.dumps(found.get("machine", {})), ""]
    head = ["peer", "workload", *(name for _, name, _ in COLUMNS), "MiB", "others", "run"]
    rows = [head]
    for key, cell in found["cells"].items():
        run = max(cell["runs"], key=lambda run: run[RATE])
        figures = [form.format(run[name]) if run.get(name) is not None else "-" for name, _, form in COLUMNS]
        others = f"{max(cell['other_cpu_share']):.0%}"
        rows.append([*key.split("/"), *figures, f"{cell['memory_bytes'] / 2**20:.0f}", others, cell["run"]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("")
    for label, ratio, goal, more_is_better in ratios(found):
        if ratio is None:
            lines.append(f"{label:42} not measured (goal {'>=' if more_is_better else '<='} {goal})")
            continue
        is_met = ratio >= goal if more_is_better else ratio <= goal
        sign = ">=" if more_is_better else "<="
        lines.append(f"{label:42} {ratio:6.2f}  (goal {sign} {goal}) {'met' if is_met else 'NOT MET'}")
    for label, workloads, figure, unit, limit in LIMITS:
        cells = [found["cells"].get(f"{US[0]}/{workload}") for workload in workloads]
        if values := [cell[figure] for cell in cells if cell is not None]:
            value = min(values) / unit
            lines.append(f"{label:42} {value:6.2f}  (goal <= {limit}) {'met' if value <= limit else 'NOT MET'}")
    if len({cell["run"] for cell in found["cells"].values()}) > 1:
        lines.append("cells are from several runs on this machine: compare with care where others were busy")
    return "\n".join(lines)
