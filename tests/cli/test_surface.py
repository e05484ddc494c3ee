"""What all commands have in common: help, `--json`, a place in the README, and completion in the shell."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from typer.main import get_command

from server.cli import app
from tests.architecture.source_tree import ROOT

README = (ROOT / "README.md").read_text()
# They answer nobody's question: one runs until it is stopped, the other talks.
WITHOUT_JSON = {("serve",), ("chat",)}


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from (((name, sub), leaf) for sub, leaf in command.commands.items())
        else:
            yield (name,), command


COMMANDS = dict(commands())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command(path: tuple[str, ...]) -> None:
    options = {option for parameter in COMMANDS[path].params for option in parameter.opts}
    assert ("--json" in options) == (path not in WITHOUT_JSON)
    assert COMMANDS[path].help
    section = README[README.index("## Flags of") : README.index("## The Python client")]
    assert f"`{path[0]}" in section or f"`loramux {path[0]}" in section
    assert path[-1] in section
    shown = CliRunner().invoke(get_command(app), [*path, "--help"])
    assert shown.exit_code == 0
    assert COMMANDS[path].help.split(".")[0].split()[0] in shown.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    command = [str(Path(sys.executable).with_name("loramux"))]

    def complete(**environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | environment
        )
        return done.stdout

    assert "_LORAMUX_COMPLETE" in complete(_LORAMUX_COMPLETE=f"source_{shell}")
    words = {"COMP_WORDS": "loramux adap", "COMP_CWORD": "1"}
    words |= {"_TYPER_COMPLETE_ARGS": "loramux adap", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "adapters" in complete(_LORAMUX_COMPLETE=f"complete_{shell}", **words)
