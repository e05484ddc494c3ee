"""What an adapter costs that comes from disk while others decode: the way of the server's own loader."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.checkpoint import read_files
from server.adapters.loader import AdapterLoader

if TYPE_CHECKING:
    from tests.bench.gpu import Bench, Stream, Weights

__all__ = ["ColdTimes", "cold_times"]

NUM_ARRIVALS = 3
NUM_PROMPT, NUM_NEW = 8, 160


@dataclass(frozen=True)
class ColdTimes:
    """Seconds, medians of a few arrivals, and the others' p99 gap between tokens.

    Attributes:
        beyond_warm_s: from the file to the first token, beyond what a resident adapter's request takes.
        fold_s, copy_s: of that, reading and folding, and bringing it into its slot.
        others: their p99 gap beside such arrivals, over that beside requests for a resident adapter.
        others_beside_warm: the latter over that beside nobody.
    """

    beyond_warm_s: float
    fold_s: float
    copy_s: float
    others: float
    others_beside_warm: float


def cold_times(bench: "Bench", rows: "list[Weights]", folder: Path, max_rank: int) -> ColdTimes:
    """Streams of `rows` decode; requests for a resident adapter come, then for one on disk, in the bank's last slot."""
    runner = bench.runner
    slot = runner.config.max_slots - 1
    loader = AdapterLoader(runner.model, dtype=runner.dtype, max_rank=max_rank, flatten_for=runner.device)
    folds: list[float] = []
    copies: list[float] = []

    def load() -> None:
        start = time.perf_counter()
        adapter = loader.fold(*read_files(folder))
        folded = time.perf_counter()
        runner.bank.load(slot, adapter.modules)
        folds.append(folded - start)
        copies.append(time.perf_counter() - folded)

    def arrive_cold() -> float:
        if slot in runner.bank.loaded_slots:
            runner.bank.free(slot)
        start = time.perf_counter()
        pool.submit(load).result()
        bench.first_token_s({slot: 1.0})
        return time.perf_counter() - start

    def arrive_warm() -> float:
        return bench.first_token_s({0: 1.0})

    with ThreadPoolExecutor(1) as pool:
        _, alone = _beside(bench, rows, None)
        warm_s, beside_warm = _beside(bench, rows, arrive_warm)
        arrive_cold()  # memory is pinned once
        cold_s, beside_cold = _beside(bench, rows, arrive_cold)
    runner.bank.free(slot)
    return ColdTimes(
        cold_s - warm_s,
        statistics.median(folds),
        statistics.median(copies),
        percentile_99(beside_cold) / percentile_99(beside_warm),
        percentile_99(beside_warm) / percentile_99(alone),
    )


def _beside(bench: "Bench", rows: "list[Weights]", arrive: Callable[[], float] | None) -> "tuple[float, list[Stream]]":
    """Median of some arrivals while streams decode, and the streams."""
    num_new = min(NUM_NEW, bench.runner.max_model_len - NUM_PROMPT)
    streams = [bench.submit(NUM_PROMPT, num_new, weights) for weights in rows]
    bench.wait_for_first(streams)
    times = []
    for number in range(NUM_ARRIVALS if arrive else 0):
        while not all(len(s.times) > number * num_new // (NUM_ARRIVALS + 1) or s.end for s in streams):
            time.sleep(0.0005)
        assert arrive is not None
        times.append(arrive())
    bench.wait(streams)
    return statistics.median(times or [0.0]), streams


def percentile_99(streams: "list[Stream]") -> float:
    gaps = sorted(gap for stream in streams for gap in stream.gaps_s)
    return gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
