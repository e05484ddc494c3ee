"""How the C library keeps the memory of freed tensors, which its defaults get wrong for a model and for a server.

glibc takes large blocks from the system and gives them back when they are freed, until the first one is: from then on
blocks of that size live on a heap, where a tensor that stays keeps all that was freed beside it. A model that is
quantized while it is read took up to 3.7 times its file that way, by chance. Steps want the opposite: the same
large activations come and go, and memory that went back to the system costs a fault per page when it comes again.

Other C libraries are left as they are.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_freed", "return_freed", "settle_memory", "trim"]

# Of mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
# Blocks from this size on go back to the system at once while models are read.
SMALL_BLOCK_BYTES = 64 << 10
# While steps run, from this size on, the largest that glibc takes.
LARGE_BLOCK_BYTES = 32 << 20
# What may lie unused at the end of a heap meanwhile.
KEPT_BYTES = 256 << 20
# oneDNN compiles a kernel per shape and keeps 1,024 of them, 200 MB and more when the number of rows keeps changing.
# A step uses some ten.
NUM_KERNELS = "128"


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def settle_memory() -> None:
    """For a process that serves, before it loads a model: one heap for all threads, and fewer compiled kernels.

    A heap per thread keeps what that thread has freed from the others, and is made of pieces of 64 MiB, which large
    tensors fill badly. What the environment says of either is left as it is.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", NUM_KERNELS)
    if (library := _glibc()) is not None and "MALLOC_ARENA_MAX" not in os.environ:
        library.mallopt(M_ARENA_MAX, 1)


def return_freed() -> None:
    """From here on, tensors' memory goes back to the system when they are freed."""
    if (library := _glibc()) is not None:
        library.mallopt(M_MMAP_THRESHOLD, SMALL_BLOCK_BYTES)


@contextmanager
def keep_freed() -> Iterator[None]:
    """From the end of the block on, tensors' memory is kept for the next ones; within it, it is given back."""
    return_freed()
    try:
        yield
    finally:
        if (library := _glibc()) is not None:
            library.malloc_trim(0)
            library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
            library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def trim() -> None:
    """Give back what is free on the heaps; takes some milliseconds, in which other threads may wait for memory."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
