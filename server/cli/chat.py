"""`loramux chat`: a conversation on the terminal, whose adapters can be changed at any time."""

from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape

from loramux_client import Client, LoraMuxError
from server.cli.connection import AdapterChoice, ApiKey, ServerUrl, connected, parse_adapters
from server.cli.console import console, plain

__all__ = ["Conversation", "chat"]

HELP = """/use NAME             answer with one adapter
/mix NAME=W NAME=W    answer with a weighted mix
/base                 answer with the base model
/adapters             what there is
/system TEXT          begin anew with a system message
/set NAME VALUE       temperature, top_p, top_k, seed or max_tokens
/clear                begin anew
/quit                 leave"""
OPTIONS: dict[str, Callable[[str], float | int]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "max_tokens": int,
}


class Conversation:
    """What has been said, and who answers next."""

    def __init__(self, client: Client, adapters: str | dict[str, float] | None = None) -> None:
        self._client = client
        self.adapters = adapters
        self.messages: list[dict[str, str]] = []
        self.options: dict[str, Any] = {}

    @property
    def who(self) -> str:
        """Who answers next."""
        if isinstance(self.adapters, dict):
            return " + ".join(f"{weight:g} {name}" for name, weight in self.adapters.items()) or "base"
        return self.adapters or "base"

    def say(self, text: str) -> None:
        """Send a message and show the answer as it comes. What fails leaves no trace in the conversation."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            with self._client.chat_stream(messages, adapters=self.adapters, **self.options) as pieces:
                for piece in pieces:
                    answer += piece.text
                    typer.echo(plain(piece.text), nl=False)
            typer.echo()
        except KeyboardInterrupt:
            console.print(" [dim](stopped)")
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; False ends the conversation.

        Raises:
            ValueError: it cannot be understood; says why.
        """
        name, _, rest = line.removeprefix("/").partition(" ")
        rest = rest.strip()
        if name in {"quit", "exit", "q"}:
            return False
        if name == "use" and rest:
            self.adapters = self._client.adapters.get(rest).name if "@" not in rest else rest
        elif name == "mix" and rest:
            weights = parse_adapters(rest.split())
            self.adapters = {weights: 1.0} if isinstance(weights, str) else weights
        elif name == "base":
            self.adapters = None
        elif name == "adapters":
            console.print(escape(plain(", ".join(one.name for one in self._client.adapters.list()) or "none")))
        elif name == "system" and rest:
            self.messages = [{"role": "system", "content": rest}]
        elif name == "clear":
            self.messages = []
        elif name == "set":
            self._set(*rest.partition(" ")[::2])
        else:
            console.print(HELP, markup=False)
        return True

    def _set(self, name: str, value: str) -> None:
        if name not in OPTIONS:
            raise ValueError(f"there is no option {name!r}: {', '.join(OPTIONS)}")
        self.options[name] = OPTIONS[name](value)


def chat(
    adapter: AdapterChoice = None,
    url: ServerUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to the model. /help shows how to switch adapters and mixes on the fly."""
    adapters = parse_adapters(adapter)
    with connected(url, api_key) as client:
        conversation = Conversation(client, adapters)
        console.print(f"[dim]{escape(plain(client.info().model_id))}; /help for commands, /quit to leave")
        while True:
            try:
                line = console.input(f"[bold]{escape(plain(conversation.who))}>[/bold] ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
            if not line:
                continue
            try:
                if not line.startswith("/"):
                    conversation.say(line)
                elif not conversation.command(line):
                    return
            except (LoraMuxError, ValueError, typer.BadParameter) as error:
                console.print(f"[red]{escape(plain(error))}")
