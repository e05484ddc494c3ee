"""How commands reach a server, and what they end with when it refuses.

Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no such thing, 4 the key is not valid or does not reach so
far, 5 the server cannot be reached, 6 busy: try again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.markup import escape

from loramux_client import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    Client,
    LoraMuxError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitedError,
    UnavailableError,
)
from server.cli.console import console, plain

__all__ = ["AdapterChoice", "ApiKey", "AsJson", "ServerUrl", "connected", "parse_adapters", "refusals"]

ServerUrl = Annotated[
    str | None, typer.Option("--url", envvar="LORAMUX_URL", help="Where the server is: http://127.0.0.1:8000.")
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="LORAMUX_API_KEY", help="Your key, if it asks for one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for scripts.")]
AdapterChoice = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="NAME[=WEIGHT]", help="Adapter; repeat it, with weights, for a mix."),
]

STATUS_BY_ERROR: tuple[tuple[type[LoraMuxError], int], ...] = (
    (NotFoundError, 3),
    (AuthenticationError, 4),
    (PermissionDeniedError, 4),
    (APIConnectionError, 5),
    (RateLimitedError, 6),
    (UnavailableError, 6),
)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the client's errors into one line and an exit status."""
    try:
        yield
    except (LoraMuxError, FileNotFoundError) as error:
        code = f" [dim]({escape(plain(error.code))})" if isinstance(error, APIStatusError) and error.code else ""
        console.print(f"[red]error[/red] {escape(plain(error))}{code}")
        status = next((status for kind, status in STATUS_BY_ERROR if isinstance(error, kind)), 1)
        raise typer.Exit(status) from None


@contextmanager
def connected(url: str | None, api_key: str | None) -> Iterator[Client]:
    """A client; its errors end the command."""
    with refusals(), Client(url, api_key=api_key) as client:
        yield client


def parse_adapters(texts: list[str] | None) -> str | dict[str, float] | None:
    """ "pirate", or "pirate=1" and "json=0.5" for a mix.

    Raises:
        typer.BadParameter: a weight is no number.
    """
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    weights = {}
    for text in texts:
        name, equals, weight = text.partition("=")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise typer.BadParameter(f"{text!r}: write NAME=WEIGHT") from None
    return weights
