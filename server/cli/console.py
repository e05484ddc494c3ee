"""Where the command line writes: people's words to standard error, results to standard output."""

from rich.console import Console

__all__ = ["console", "report"]

console = Console(stderr=True, highlight=False, soft_wrap=True)


def report(line: str) -> None:
    """One line about what goes on."""
    console.print(f"[dim]loramux[/dim] {line}")
