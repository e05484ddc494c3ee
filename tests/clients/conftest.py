"""The live server of the API's tests, for the client's."""

from tests.api.conftest import live, tiny

__all__ = ["live", "tiny"]
