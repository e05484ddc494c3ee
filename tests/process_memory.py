"""What a process holds, seen from outside."""

import re
from pathlib import Path


def anonymous_bytes(pid: int) -> int:
    """What a process allocates and touches, without the files that it maps; 0 once it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0
