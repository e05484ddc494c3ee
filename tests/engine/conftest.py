"""Fixtures of the engine's tests."""

import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh one for each test; a failure shows it."""
    value = random.SystemRandom().randrange(1 << 30)
    print(f"seed {value}")
    random.seed(value)
    torch.manual_seed(value)
    return value
