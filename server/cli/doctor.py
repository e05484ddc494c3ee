"""`loramux doctor`."""

from typing import Annotated

import typer

from server.failpoints import FAILPOINTS

__all__ = ["doctor"]


def doctor(
    list_failpoints: Annotated[
        bool, typer.Option("--failpoints", help="List the places where LORAMUX_FAILPOINT=name[:nth] kills the process.")
    ] = False,
) -> None:
    """Show what helps to find out what is wrong."""
    if not list_failpoints:
        raise typer.BadParameter("say what to show: --failpoints")
    for name, description in FAILPOINTS.items():
        typer.echo(f"{name:<22} {description}")
