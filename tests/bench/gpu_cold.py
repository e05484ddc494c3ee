"""What an adapter costs that comes from disk while others decode: by the server's own store, loader and registry.

The operating system has the file in its cache; a disk's own time comes on top.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.checkpoint import read_files
from server.adapters.lease import Lease
from server.adapters.loader import AdapterLoader, BankSlots, FoldedAdapter
from server.adapters.registry import AdapterRegistry
from server.adapters.store import AdapterStore

if TYPE_CHECKING:
    from tests.bench.gpu import Bench, Stream, Weights

__all__ = ["ColdTimes", "cold_times"]

# More than one step in a hundred is an arrival's, so that the others' p99 is that of such steps in both cases.
NUM_PROMPT, NUM_NEW, NUM_BETWEEN = 8, 800, 80
MIN_ARRIVALS = 3
MAX_BYTES = 1 << 40
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ColdTimes:
    """Seconds, medians of several arrivals, and the others' p99 gap between tokens.

    Attributes:
        beyond_warm_s: from the request to its first token, beyond what it takes when its adapter is in a slot.
        read_s, fold_s: of that, reading the file, and folding.
        folded_s: until it is folded and its digest found right, which is computed meanwhile.
        copy_s: bringing it into its slot.
        others: their p99 gap beside such arrivals, over that beside requests for a resident adapter.
        others_beside_warm: the latter over that beside nobody.
    """

    beyond_warm_s: float
    read_s: float
    fold_s: float
    folded_s: float
    copy_s: float
    others: float
    others_beside_warm: float


class _Adapter:
    """One adapter in a store, and the registry that brings it in, as `server.app` puts them together."""

    def __init__(self, bench: "Bench", folder: Path, max_rank: int) -> None:
        runner = bench.runner
        self._bench = bench
        self._loader = AdapterLoader(
            runner.model,
            dtype=runner.dtype,
            max_rank=max_rank,
            flatten_for=runner.device if runner.uses_kernels else None,
        )
        self._store = AdapterStore(folder.with_name("store"))
        self._store.open()
        details = self._loader.check(*read_files(folder))
        with self._store.staging_folder() as staging:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
            self.digest = self._store.publish("cold", staging, details).digest
        self.reads: list[float] = []
        self.folds: list[float] = []
        self.totals: list[float] = []
        self._registry = AdapterRegistry(
            self._store,
            self._read,
            BankSlots(runner.bank),
            max_slot_bytes=MAX_BYTES,
            max_host_bytes=MAX_BYTES,
            on_change=bench.engine.wake,
        )

    @property
    def copy_s(self) -> float:
        """Mean of all copies into a slot."""
        usage = self._registry.usage(self.digest)
        return usage.load_s / usage.num_loads

    def lease(self) -> Lease:
        return self._registry.open_lease({self.digest: 1.0})

    def evict(self) -> None:
        """Out of its slot and of host memory."""
        num_loaded = len(self._bench.runner.bank.loaded_slots)
        self._registry.evict(self.digest)
        deadline = time.monotonic() + TIMEOUT_S
        while len(self._bench.runner.bank.loaded_slots) == num_loaded:
            if time.monotonic() > deadline:
                raise TimeoutError("the adapter stays in its slot")
            time.sleep(0.001)

    def close(self) -> None:
        self._registry.close()
        self._store.close()

    def _read(self, digest: str) -> FoldedAdapter:
        start = time.perf_counter()

        def fold(config: bytes, weights: memoryview) -> FoldedAdapter:
            read = time.perf_counter()
            self.reads.append(read - start)
            adapter = self._loader.fold(config, weights)
            self.folds.append(time.perf_counter() - read)
            return adapter

        adapter = self._store.read(digest, fold)
        self.totals.append(time.perf_counter() - start)
        return adapter


def cold_times(bench: "Bench", rows: "list[Weights]", folder: Path, max_rank: int) -> ColdTimes:
    """Streams of `rows` decode; requests come for an adapter in a slot, and then for it when it is on disk only.

    Args:
        folder: an adapter's; a store is made beside it.
    """
    with closing(_Adapter(bench, folder, max_rank)) as adapter:

        def arrive_warm() -> float:
            return bench.first_token_s(adapter.lease)

        def arrive_cold() -> float:
            adapter.evict()
            return bench.first_token_s(adapter.lease)

        arrive_warm()  # compiles what is to be compiled
        _, alone = _beside(bench, rows, None)
        warm_s, beside_warm = _beside(bench, rows, arrive_warm)
        for times in (adapter.reads, adapter.folds, adapter.totals):
            times.clear()
        cold_s, beside_cold = _beside(bench, rows, arrive_cold)
        return ColdTimes(
            cold_s - warm_s,
            statistics.median(adapter.reads),
            statistics.median(adapter.folds),
            statistics.median(adapter.totals),
            adapter.copy_s,
            percentile_99(beside_cold) / percentile_99(beside_warm),
            percentile_99(beside_warm) / percentile_99(alone),
        )


def _beside(bench: "Bench", rows: "list[Weights]", arrive: Callable[[], float] | None) -> "tuple[float, list[Stream]]":
    """Median of some arrivals while streams decode, and the streams."""
    num_new = min(NUM_NEW, bench.runner.max_model_len - NUM_PROMPT)
    num_arrivals = max(MIN_ARRIVALS, num_new // NUM_BETWEEN) if arrive else 0
    streams = [bench.submit(NUM_PROMPT, num_new, weights) for weights in rows]
    bench.wait_for_first(streams)
    times = []
    for number in range(1, num_arrivals + 1):
        while not all(len(s.times) >= number * num_new // (num_arrivals + 2) or s.end for s in streams):
            time.sleep(0.0005)
        assert arrive is not None
        times.append(arrive())
    bench.wait(streams)
    return statistics.median(times or [0.0]), streams


def percentile_99(streams: "list[Stream]") -> float:
    gaps = sorted(gap for stream in streams for gap in stream.gaps_s)
    return gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
