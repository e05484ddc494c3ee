"""The project's Python files, parsed."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("lora_core", "server", "loramux_client")
HOMES = {"loramux_client": ROOT / "clients/python"}  # of packages that are not at the top


@dataclass(frozen=True)
class Source:
    """One module: its dotted name, its path below the root, and its syntax tree."""

    module: str
    path: Path
    tree: ast.Module

    def imports(self) -> Iterator[str]:
        """Dotted names of everything it imports, also inside functions."""
        return self._imports(ast.walk(self.tree))

    def imports_at_start(self) -> Iterator[str]:
        """Of those that are not inside anything, which are imported with the module."""
        return self._imports(self.tree.body)

    def _imports(self, nodes: Iterable[ast.AST]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}: relative import"
                yield node.module or ""
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> list[Source]:
    """All modules of the packages, by path."""
    out = []
    for package in PACKAGES:
        home = HOMES.get(package, ROOT)
        for path in sorted((home / package).rglob("*.py")):
            relative = path.relative_to(ROOT)
            parts = path.relative_to(home).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            out.append(Source(module, relative, ast.parse(path.read_text(), filename=str(relative))))
    return out
