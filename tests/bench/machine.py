"""What a measurement needs from the machine: quiet, and an account of who used it."""

import os
import signal
import sys
from pathlib import Path

__all__ = ["QUIET", "CpuAccount", "enter_quiet_session", "memory_bytes", "peers_dtype", "start_quietly"]

# Set in a process that has a session of its own already.
QUIET = "LORAMUX_BENCH_QUIET"
AUTOGROUP_NICE = -19
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def enter_quiet_session() -> bool:
    """Give this process's session most of the machine; what it starts inherits that. False if that is not allowed.

    Linux shares the processor between sessions first (autogroups) and looks at `nice` within one only. Two threads
    that wait for each other at every operator lose a factor of six beside one busy stranger.
    """
    try:
        Path("/proc/self/autogroup").write_text(str(AUTOGROUP_NICE))
    except OSError:
        return False
    return True


def peers_dtype() -> str:
    """What PyTorch's own operators are fast in here: they have products of bfloat16 from AVX-512 on only."""
    return "bfloat16" if " avx512f " in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "float32"


def start_quietly() -> None:
    """Run this program again in a session of its own, and end with its exit status."""
    if QUIET in os.environ:
        return
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.environ[QUIET] = "1" if enter_quiet_session() else "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for number in (signal.SIGTERM, signal.SIGINT):  # the new session would not hear of them
        signal.signal(number, lambda number, _: os.killpg(pid, number))
    _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


class CpuAccount:
    """Processor time of the machine and of this session since it was made."""

    def __init__(self) -> None:
        self._total, self._busy = _machine_ticks()
        self._own = _session_ticks()

    def other_share(self) -> float:
        """Share of the machine that neither this session's processes nor idling used, 0 to 1."""
        total, busy = _machine_ticks()
        # Of a process that has ended nothing is left but what its parent has of it.
        own = sum(ticks - self._own.get(pid, 0) for pid, ticks in _session_ticks().items())
        return max(0.0, (busy - self._busy - own) / max(total - self._total, 1))


def _machine_ticks() -> tuple[int, int]:
    """All ticks of all cores, and those that were not idle."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields), sum(fields) - idle


def _session_ticks() -> dict[int, int]:
    """Ticks of the living processes of this session, with those of their children that have ended."""
    own, ticks = os.getsid(0), {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == own:
            ticks[int(stat.parent.name)] = sum(int(field) for field in fields[11:15])
    return ticks


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, shared pages counted once (PSS)."""
    total = 0
    for child in [pid, *_descendants(pid)]:
        try:
            lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def _descendants(pid: int) -> list[int]:
    out = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(x) for x in path.read_text().split()]
        except OSError:
            continue
        for child in children:
            out += [child, *_descendants(child)]
    return out
