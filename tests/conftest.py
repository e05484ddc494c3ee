"""What holds for a whole run of the tests.

Processes that tests start import `tests` without it, and so without torch.
"""

import gc
import os

# What is imported stays: the garbage collector does not look for what might go, now or later.
gc.disable()

import torch  # noqa: E402

# Without a GPU, kernels run in Triton's interpreter, which must be told before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests that run beside each other have a core each: teams of threads would wait for each other's cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
