"""Every test starts from a fresh seed, which pytest shows when the test fails, and computes on one thread."""

from collections.abc import Iterator

import pytest
import torch

from tests.fresh_seed import seed

__all__ = ["one_thread", "seed"]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes a team of threads only waits for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
