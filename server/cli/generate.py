"""`loramux generate`."""

import sys
from typing import Annotated, Any

import typer

from server.cli.connection import AdapterChoice, ApiKey, AsJson, ServerUrl, connected, parse_adapters
from server.cli.console import plain, show_json

__all__ = ["generate"]


def generate(
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads it from standard input.')],
    adapter: AdapterChoice = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 takes the most likely token.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; repeatable.")] = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Generate a text, shown as it comes."""
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    options: Any = given | {"seed": seed, "stop": stop}
    adapters = parse_adapters(adapter)
    text = sys.stdin.read() if prompt == "-" else prompt
    with connected(url, api_key) as client:
        if as_json:
            show_json(client.generate(text, adapters=adapters, **options))
            return
        with client.stream(text, adapters=adapters, **options) as tokens:
            for token in tokens:
                typer.echo(plain(token.text), nl=False)
        typer.echo()
