"""Fixtures of the engine's tests."""

from tests.fresh_seed import seed

__all__ = ["seed"]
