"""What is there is documented: codes, flags, routes and metrics."""

import ast
import re

import pytest
from fastapi import FastAPI
from typer.main import get_command

from server.api.routers import ROUTERS
from server.cli import app as cli
from server.settings import Settings
from tests.architecture.source_tree import ROOT, sources

README = (ROOT / "README.md").read_text()


def _codes() -> set[str]:
    """Every stable code in the source: `code="..."` in a call, `code = "..."` in a class or on an error."""
    out = set()
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                out.add(node.value.value)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = {getattr(target, "id", getattr(target, "attr", "")) for target in node.targets}
                if "code" in names:
                    out.add(node.value.value)
    return out


@pytest.mark.parametrize("code", sorted(_codes()))
def test_every_code_is_in_the_readme(code: str) -> None:
    assert f"`{code}`" in README


def test_every_flag_is_a_setting_and_in_the_readme() -> None:
    flags = {name for option in get_command(cli).commands["serve"].params for name in option.opts}
    settings = {"--" + name.replace("_", "-") for name in Settings.model_fields}
    repeated = {"--adapter": "--adapters", "--model-alias": "--model-aliases"}
    assert {repeated.get(flag, flag) for flag in flags} == settings
    for flag in flags:
        assert f"`{flag}" in README, flag


def test_every_flag_can_come_from_the_environment() -> None:
    for option in get_command(cli).commands["serve"].params:
        assert option.envvar == "LORAMUX_" + option.opts[0][2:].replace("-", "_").upper()


def test_every_route_is_in_the_readme() -> None:
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    for path, methods in app.openapi()["paths"].items():
        shown = re.sub(r"\{model_id\}", "{id}", path)
        for method in methods:
            assert f"`{method.upper()} {shown}`" in README, (method, path)


def test_every_metric_is_in_the_readme() -> None:
    source = (ROOT / "server/metrics.py").read_text()
    for name in re.findall(r'"((?:loramux_|vllm:)\w+)"', source):
        assert f"`{name}" in README, name
