"""Measure loramux and its peers on the same work, one after the other, in one run.

    python -m tests.bench [--peers loramux,peft,...] [--workloads W1,W3,...] [--rounds 2] [--into NAME] [--report]
    python -m tests.bench --turns 2     only what is measured in turns: see turns.py
    python -m tests.bench --profile     where the time of our own steps goes: see steps.py

Unless peers are named, ours are measured on everything, and each other one on what the report compares it on.
Each (peer, workload) pair is one cell of tests/bench/results/NAME.json; a cell that is measured again is replaced, so a
run can be made in parts. The report compares cells and says which of them are from the same run; NAME.svg shows them.
What differs by little is measured once more, in turns.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench import report, steps, turns
from tests.bench.machine import QUIET, CpuAccount, memory_bytes, start_quietly
from tests.bench.material import Material
from tests.bench.peers import IN_PROCESS, PACKAGES, SERVERS, InProcess, serve
from tests.bench.plot import plot
from tests.bench.rounds import jobs_for_round, measure_jobs, prompts, warm_up
from tests.bench.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).with_name("results")
# Share of the machine that others may use before a figure is marked.
MAX_OTHER_SHARE = 0.15
LOAD_OF_OPEN = 0.7


def measure_server(peer: str, name: str, material: Material, rounds: int) -> dict[str, Any]:
    workload = WORKLOADS[name]
    runs, other = [], []
    with serve(peer, material, workload) as (url, process, start_s):
        warm_up(url, peer, workload, material)
        for i in range(rounds):
            jobs = jobs_for_round(peer, name, material, i)
            account = CpuAccount()
            run = measure_jobs(url, jobs, workload.num_streams)
            if workload.is_open:
                rate = LOAD_OF_OPEN * len(jobs) / run["seconds"]
                run = {"closed": run} | measure_jobs(url, report.poisson(jobs, rate), 10 * len(jobs))
            runs.append(run)
            other.append(account.other_share())
        memory = memory_bytes(process.pid)
    return {"runs": runs, "other_cpu_share": other, "memory_bytes": memory, "start_s": start_s}


def measure_in_process(peer: str, name: str, material: Material, rounds: int) -> dict[str, Any]:
    account = CpuAccount()
    with InProcess(peer, WORKLOADS[name], [ids for ids, _ in prompts(material, name, 0)], material) as process:
        runs = [process.measure() for _ in range(rounds)]
        return {"runs": runs} | process.end() | {"other_cpu_share": [account.other_share()]}


def can(peer: str, workload: Workload) -> bool:
    if peer in SERVERS:
        return SERVERS[peer].can(workload)
    if workload.kind == "d" or workload.choice == "mix" or not workload.num_prompt:
        return False
    return peer == "peft" or not workload.num_adapters


def measure_cell(peer: str, name: str, material: Material, rounds: int, run: str, found: dict[str, Any]) -> None:
    """Measure one peer on one workload and put it among what was found."""
    measure = measure_in_process if peer in IN_PROCESS else measure_server
    try:
        cell = measure(peer, name, material, rounds)
    except (RuntimeError, TimeoutError, OSError) as error:
        print(f"{peer} {name}: {error}", flush=True)
        return
    cell |= {"run": run, "quiet": os.environ.get(QUIET) == "1"}
    if peer in SERVERS:
        cell["versions"] = versions(peer)
    found["cells"][f"{peer}/{name}"] = cell
    best = max(one["output_tokens_per_s"] for one in cell["runs"])
    others = max(cell["other_cpu_share"])
    flag = "  OTHERS BUSY" if others > MAX_OTHER_SHARE else ""
    print(f"{peer:22} {name:5} {best:7.1f} tok/s  others {others:.2f}{flag}", flush=True)


def keep(found: dict[str, Any], path: Path) -> None:
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1))


def versions(peer: str) -> dict[str, str]:
    package = SERVERS[peer].package
    if package:
        return dict(pinned.split("==") for pinned in PACKAGES[package])
    return {name: version(name) for name in ("torch", "transformers", "loramux")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    peers = (*SERVERS, *IN_PROCESS)
    parser.add_argument("--peers", help=f"measured on everything that they can do: {', '.join(peers)}")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=int, help="only measure in turns, each pair at least so often")
    parser.add_argument("--into", default="latest", help="name of the results file")
    parser.add_argument("--report", action="store_true", help="only print what has been measured")
    parser.add_argument("--profile", action="store_true", help="where the time of our own steps goes; see steps.py")
    args, others = parser.parse_known_args()
    if args.profile:
        steps.main(others)
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    path = RESULTS / f"{args.into}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    if not args.report:
        start_quietly()
        found["machine"] = report.machine()
        material = Material()
        run_id = time.strftime("%Y-%m-%dT%H:%M:%S")
        for name in [] if args.turns else args.workloads.split(","):  # all peers on one piece of work, then the next
            named = args.peers.split(",") if args.peers else [p for p in peers if report.is_compared(p, name)]
            for peer in named:
                if can(peer, WORKLOADS[name]):
                    measure_cell(peer, name, material, args.rounds, run_id, found)
                    keep(found, path)
        if args.turns or not args.peers:
            found["turns"] = turns.measure(material, args.turns or turns.NUM_ROUNDS) | {"run": run_id}
            keep(found, path)
    print(report.render(found))
    path.with_suffix(".svg").write_text(plot(found))


if __name__ == "__main__":
    main()
