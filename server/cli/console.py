"""Where the command line writes: people's words to standard error, results to standard output."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console", "plain", "report", "show_json", "show_table"]

console = Console(stderr=True, highlight=False, soft_wrap=True)

PIPE_WIDTH = 1000
# What could steer a terminal, in texts that come from models and strangers.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def report(line: str) -> None:
    """One line about what goes on."""
    console.print(f"[dim]loramux[/dim] {line}")


def plain(text: object) -> str:
    """A text without anything that could steer the terminal."""
    return CONTROLS.sub("\ufffd", str(text))


def show_json(value: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """A result for scripts: one JSON document on standard output."""
    shown: Any = value
    if isinstance(value, BaseModel):
        shown = value.model_dump(mode="json")
    elif not isinstance(value, dict):
        shown = [item.model_dump(mode="json") for item in value]
    typer.echo(json.dumps(shown, indent=2))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A result for people. Where the output is no terminal, lines are never cut."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    out.print(table)
