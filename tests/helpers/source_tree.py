"""Reads the package's source by `ast`: which files there are, what each imports, and what its names stand for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ROOT", "SOURCE", "aliases", "dotted", "full_names", "imported", "name_of", "parse", "sources"]

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "statewise"


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported(file: Path, tree: ast.AST | None = None) -> Iterator[tuple[str, str | None, int]]:
    """Yields (module, name or None, line) for every import of a file, wherever it stands, relative ones resolved."""
    package = ("statewise", *file.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree or parse(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((module, alias.name, node.lineno) for alias in node.names)


def dotted(node: ast.AST) -> str:
    """Writes an attribute chain: `nnx.graphlib.flatten`; empty for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def aliases(tree: ast.AST) -> dict[str, str]:
    """Returns what each imported name stands for: `jnp` for `jax.numpy`; relative imports are left out."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields (full name, line) for each name of another package that a file imports, reads, or asks `getattr` for."""
    stands_for = aliases(tree)

    def full(chain: str) -> str:
        root, _, rest = chain.partition(".")
        return ".".join(filter(None, (stands_for.get(root, ""), rest))) if root in stands_for else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and (name := full(dotted(node))):
            yield name, node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            base, asked = full(dotted(node.args[0])), node.args[1]
            if base and isinstance(asked, ast.Constant):
                yield f"{base}.{asked.value}", node.lineno
