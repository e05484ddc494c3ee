"""The live server of the API tests, for clients that are used as their users use them."""

from tests.api.conftest import live, tiny
from tests.auth.conftest import guarded

__all__ = ["guarded", "live", "tiny"]
