"""The `loramux` command, put together."""

from importlib.metadata import version
from typing import Annotated

import typer

from server.cli import adapters, jobs, keys
from server.cli.bench import bench
from server.cli.chat import chat
from server.cli.doctor import doctor
from server.cli.generate import generate
from server.cli.jobs import convert, merge, mix
from server.cli.quantize import quantize
from server.cli.serve import serve

__all__ = ["app", "main"]

app = typer.Typer(
    name="loramux",
    help="One base language model in memory, many LoRA and DoRA adapters beside it, one batch.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(version("loramux"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


for command in (serve, quantize, generate, chat, mix, merge, convert, bench, doctor):
    app.command()(command)
app.add_typer(adapters.app, name="adapters")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Entry point of the console script."""
    app()
