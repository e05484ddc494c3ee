"""The package's own rules: what is public is listed and documented, and little is imported."""

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_core

MODULES = ["lora_core", *(info.name for info in pkgutil.walk_packages(lora_core.__path__, "lora_core."))]
ALLOWED = {"lora_core", "regex", "safetensors", "torch", *sys.stdlib_module_names}


def tree(name: str) -> ast.Module:
    source = importlib.import_module(name).__file__
    assert source is not None
    return ast.parse(Path(source).read_text(encoding="utf-8"))


def imports(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield child.module or ""


def defined(module: ast.Module) -> Iterator[str]:
    """Names that the module binds itself, at its top level."""
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


@pytest.mark.parametrize("name", MODULES)
def test_only_four_packages_are_imported(name: str) -> None:
    """And where one thing is done with another package, nowhere else."""
    others = {
        "lora_core.quant": {"bitsandbytes"},
        "lora_core.quant_files": {"bitsandbytes"},
        "lora_core.quant_product": {"bitsandbytes"},
        "lora_core.ops.adapter_kernels": {"triton"},
        "lora_core.ops.few_rows": {"triton"},
        "lora_core.ops.four_bit": {"triton"},
        "lora_core.ops.triton": {"triton"},
        "lora_core.ops.tuning": {"triton"},
    }
    allowed = ALLOWED | others.get(name, set())
    assert not {imported for imported in imports(tree(name)) if imported.partition(".")[0] not in allowed}


@pytest.mark.parametrize("name", MODULES)
def test_all_lists_what_is_public(name: str) -> None:
    module, source = importlib.import_module(name), tree(name)
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    assert all(hasattr(module, item) for item in listed)
    own = set(defined(source))
    code = {node.name for node in source.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {item for item in code if not item.startswith("_")} <= set(listed)
    if module.__file__ is not None and not module.__file__.endswith("__init__.py"):
        assert set(listed) <= own, "names of another module"


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name: str) -> None:
    module, source = importlib.import_module(name), tree(name)
    assert ast.get_docstring(source)
    for node in source.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in module.__all__:
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("item", lora_core.__all__)
def test_the_package_offers_what_its_modules_list(item: str) -> None:
    thing = getattr(lora_core, item)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert item in importlib.import_module(thing.__module__).__all__ or thing.__module__ not in MODULES
