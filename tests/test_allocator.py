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


def test_threads_of_a_server_share_one_heap() -> None:
    script = """
import threading
from pathlib import Path
from server.allocator import settle_memory

settle_memory()
kept, done = [], threading.Barrier(5)

def work():
    kept.append([bytes(40_000) for _ in range(50)])
    done.wait()

for _ in range(4):
    threading.Thread(target=work).start()
done.wait()
heap_of_thread_bytes = 64 << 20
lines = Path("/proc/self/maps").read_text().splitlines()
starts = [int(line.partition("-")[0], 16) for line in lines if " rw-p 00000000 00:00 0" in line]
print(sum(start % heap_of_thread_bytes == 0 for start in starts))
"""
    assert int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout) == 0
