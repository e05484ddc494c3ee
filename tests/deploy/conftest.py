"""The tiny model, for servers in processes of their own."""

from tests.api.conftest import tiny

__all__ = ["tiny"]
