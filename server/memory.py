"""How much memory is free, for budgets that nobody has set."""

from pathlib import Path

__all__ = ["DEFAULT_KV_BYTES", "free_host_bytes"]

# For keys and values on a CPU, unless it is set.
DEFAULT_KV_BYTES = 1 << 30

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes that can still be used without swapping, within the container's limit; None if nobody knows."""
    limits = [_available(meminfo), _cgroup_room(cgroup)]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return None


def _cgroup_room(cgroup: Path) -> int | None:
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)  # cached files make room when it is needed
