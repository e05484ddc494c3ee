"""What differs by little, measured one right after the other, again and again.

A machine's speed changes from minute to minute by more than adapters cost, and from hour to hour by more than that.
Both sides are started before; one that has nothing to do costs nothing.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.bench import report
from tests.bench.machine import QUIET, CpuAccount
from tests.bench.material import Material
from tests.bench.peers import IN_PROCESS, InProcess, serve
from tests.bench.rounds import jobs_for_round, measure_jobs, prompts, warm_up
from tests.bench.workloads import WORKLOADS

__all__ = ["NUM_ROUNDS", "measure"]

# A pair is measured so often, and then until it has taken so long.
NUM_ROUNDS, PAIR_S = 2, 60

Round = Callable[[int], dict[str, Any]]


@contextmanager
def ready(cell: str, material: Material) -> Iterator[Round]:
    """A cell ("peer/workload") that has been started; what is yielded measures it, with new prompts for each number."""
    peer, _, name = cell.partition("/")
    workload = WORKLOADS[name]
    if peer in IN_PROCESS:
        with InProcess(peer, workload, [ids for ids, _ in prompts(material, name, 0)], material) as process:
            yield lambda _: process.measure()
        return
    with serve(peer, material, workload) as (url, *_):
        warm_up(url, peer, workload, material)
        yield lambda index: measure_jobs(url, jobs_for_round(peer, name, material, index), workload.num_streams)


def measure(material: Material, num_rounds: int) -> dict[str, Any]:
    """Figures of each pair of cells each time, and the share of the machine that others used meanwhile."""
    pairs: dict[str, list[list[Any]]] = {}
    account, indices = CpuAccount(), itertools.count()
    started: dict[str, Round] = {}
    with ExitStack() as running:
        for pair in report.pairs_in_turns():
            if not started.keys() & set(pair):
                running.close()
                started.clear()
            try:
                for cell in pair:
                    if cell not in started:
                        started[cell] = running.enter_context(ready(cell, material))
                measured = pairs[" ".join(pair)] = _alternate([started[cell] for cell in pair], num_rounds, indices)
            except (RuntimeError, TimeoutError, OSError) as error:
                print(f"{' / '.join(pair)}: {error}", flush=True)
                continue
            shown = " ".join(f"{a[report.RATE] / b[report.RATE]:.2f}" for a, b in measured)
            print(f"{' / '.join(pair)}: {shown}", flush=True)
    return {"pairs": pairs, "other_cpu_share": account.other_share(), "quiet": os.environ.get(QUIET) == "1"}


def _alternate(both: list[Round], num_rounds: int, indices: Iterator[int]) -> list[list[dict[str, Any]]]:
    """Figures of two cells, of which now the one goes first and now the other."""
    measured: list[list[dict[str, Any]]] = []
    while len(measured) < num_rounds or sum(run["seconds"] for runs in measured for run in runs) < PAIR_S:
        step = 1 if len(measured) % 2 else -1
        measured.append([run(next(indices)) for run in both[::step]][::step])
    return measured
