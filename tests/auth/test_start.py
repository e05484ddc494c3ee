"""What a server refuses to start with."""

from pathlib import Path

import pytest

from server.app import build_server
from server.errors import InvalidRequestError
from server.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", ""])
def test_it_does_not_start_open_where_others_can_reach_it(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--allow-open") as refused:
        build_server(Settings(host=host, store=tmp_path))
    assert refused.value.code == "open_on_public_address"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_does_not_start_without_the_keys_that_it_was_told_of(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="loramux keys create") as refused:
        build_server(Settings(host=host, store=tmp_path, keys=tmp_path / "missing.json"))
    assert refused.value.code == "keys_invalid"
