"""The fixture with which tests start from a fresh seed; a package's conftest imports it."""

import random

import pytest
import torch

__all__ = ["seed"]


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh one for each test; a failure shows it."""
    value = random.SystemRandom().randrange(1 << 30)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value
