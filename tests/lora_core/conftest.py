"""Every test starts from a fresh seed, which pytest shows when the test fails, and computes on one thread."""

import random
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes a team of threads only waits for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.SystemRandom().randrange(1 << 30)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value
