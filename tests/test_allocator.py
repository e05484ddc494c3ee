"""What freed memory does to a process, in one of its own as the settings are the process's."""

import subprocess
import sys

SCRIPT = """
import re, sys
from pathlib import Path
import torch
from server.allocator import keep_freed, trim

BLOCK_BYTES, NUM_BLOCKS = 1 << 20, 64

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def leave_every_eighth():
    blocks = [torch.ones(BLOCK_BYTES, dtype=torch.uint8) for _ in range(NUM_BLOCKS)]
    return blocks[::8]

torch.ones(16 << 20, dtype=torch.uint8)  # once freed, glibc puts blocks of this size on its heap
before = held()
with keep_freed():
    kept = leave_every_eighth()
    print((held() - before) // BLOCK_BYTES)
also = leave_every_eighth()
also.pop()  # the last block is not the heap's end
pinned = torch.ones(BLOCK_BYTES, dtype=torch.uint8)
before = held()
del also
print((held() - before) // BLOCK_BYTES)
trim()
print((held() - before) // BLOCK_BYTES)
"""


def test_freed_memory_goes_back_while_loading_and_at_a_trim_and_stays_between_steps() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    while_loading, between_steps, trimmed = map(int, result.stdout.split())
    assert while_loading <= 10  # the eight that are left, and what Python took
    assert between_steps >= -1
    assert trimmed <= -6
