"""Files and functions stay small, and say what is public."""

import ast
import importlib
import inspect

import pytest

from tests.architecture.source_tree import PACKAGES, ROOT, Source, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Longer than they should be, with the reason.
LONG_FUNCTIONS = {
    "lora_core.ops.adapter_kernels.shrink_kernel": "a kernel is compiled as one",
    "lora_core.ops.adapter_kernels.expand_kernel": "ditto",
    "server.engine.attention.kernels._attend": "ditto",
    "server.engine.layer_kernels._rotate": "ditto",
    "server.cli.serve.serve": "one line per flag: its signature is its documentation",
    "server.app.build_server": "puts every part together, in order",
}


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.module)
def test_sizes(source: Source) -> None:
    num_lines = len((ROOT / source.path).read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            name = f"{source.module}.{node.name}"
            assert length <= MAX_FUNCTION_LINES or name in LONG_FUNCTIONS, f"{name}: {length} lines"


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.module)
def test_public_names(source: Source) -> None:
    """`__all__` is there, sorted into what exists, and everything in it has a docstring, as the module has."""
    assert ast.get_docstring(source.tree), "no module docstring"
    body = [node for node in source.tree.body if not isinstance(node, ast.Expr)]
    if not body or source.module == "server.__main__":
        return
    module = importlib.import_module(source.module)
    names = getattr(module, "__all__", None)
    assert names is not None, "no __all__"
    assert len(names) == len(set(names))
    for name in names:
        value = getattr(module, name)
        is_ours = getattr(value, "__module__", "").split(".")[0] in PACKAGES
        is_error = inspect.isclass(value) and issubclass(value, Exception)  # drawn in its module's docstring
        if is_ours and not is_error and (inspect.isclass(value) or inspect.isfunction(value)):
            assert value.__doc__, f"{name} has no docstring"
