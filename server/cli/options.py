"""Options of the command line: how they are named and read."""

from pathlib import Path
from typing import Any

import typer

__all__ = ["option", "parse_adapter_option", "parse_bytes", "size_option"]

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str | int) -> int:
    """ "1.5GiB", "512M" or plain bytes."""
    if isinstance(text, int):
        return text
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:] in UNITS else ""
    try:
        return int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is no size; write 512M, 2G or a number of bytes") from None


def parse_adapter_option(text: str) -> tuple[str, Path]:
    """ "NAME=DIR"."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise typer.BadParameter(f"{text!r}: write NAME=DIR")
    return name, Path(folder).expanduser()


def option(flag: str, text: str, **kwargs: Any) -> Any:
    """A flag that can also be given as LORAMUX_<NAME>."""
    name = flag.partition("/")[0].strip("-").replace("-", "_").upper()
    return typer.Option(flag, envvar=f"LORAMUX_{name}", help=text, **kwargs)


def size_option(flag: str, text: str) -> Any:
    """The same for a number of bytes."""
    return option(flag, text, parser=parse_bytes, metavar="SIZE")
