"""The command line against the live server of the API's tests."""

from collections.abc import Callable

import pytest
from click.testing import Result
from typer.testing import CliRunner

from server.cli import app
from tests.api.conftest import Live, live, tiny

__all__ = ["live", "tiny"]

Run = Callable[..., Result]


@pytest.fixture
def run(live: Live, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command; its exit status must be the one that is expected."""
    monkeypatch.setenv("LORAMUX_URL", live.url)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LORAMUX_API_KEY", raising=False)

    def run(*arguments: object, status: int = 0, text: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return run
