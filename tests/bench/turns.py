"""What of ours is compared with ours, measured one right after the other, again and again: small differences need it.

A machine's speed changes from minute to minute by more than adapters cost. All servers are started before; one that has
nothing to do costs nothing.
"""

import itertools
import os
from contextlib import ExitStack
from typing import Any

from tests.bench import report
from tests.bench.machine import QUIET, CpuAccount
from tests.bench.material import Material
from tests.bench.peers import serve
from tests.bench.rounds import jobs_for_round, measure_jobs, warm_up
from tests.bench.workloads import WORKLOADS

__all__ = ["NUM_ROUNDS", "measure"]

# A pair is measured so often, and then until it has taken so long.
NUM_ROUNDS, PAIR_S = 2, 60


def measure(material: Material, num_rounds: int) -> dict[str, Any]:
    """Figures of each pair of cells each time, and the share of the machine that others used meanwhile."""
    pairs: dict[str, list[list[Any]]] = {" ".join(pair): [] for pair in report.own_pairs()}
    account, indices = CpuAccount(), itertools.count()  # of prompts that no server has seen
    with ExitStack() as servers:
        urls = {}
        for cell in dict.fromkeys(" ".join(pairs).split()):
            peer, _, name = cell.partition("/")
            urls[cell], *_ = servers.enter_context(serve(peer, material, WORKLOADS[name]))
            warm_up(urls[cell], peer, WORKLOADS[name], material)
        for pair, measured in pairs.items():
            while len(measured) < num_rounds or sum(run["seconds"] for both in measured for run in both) < PAIR_S:
                runs = {}
                for cell in pair.split()[:: 1 if len(measured) % 2 else -1]:
                    peer, _, name = cell.partition("/")
                    jobs = jobs_for_round(peer, name, material, next(indices))
                    runs[cell] = measure_jobs(urls[cell], jobs, WORKLOADS[name].num_streams)
                measured.append([runs[cell] for cell in pair.split()])
            shown = " ".join(f"{a[report.RATE] / b[report.RATE]:.2f}" for a, b in measured)
            print(f"{pair}: {shown}", flush=True)
    return {"pairs": pairs, "other_cpu_share": account.other_share(), "quiet": os.environ.get(QUIET) == "1"}
