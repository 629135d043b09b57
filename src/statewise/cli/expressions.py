"""From the text of a filter to the filter, without evaluating anything.

The text is parsed by `ast`, and only what can stand in a filter is understood: names of types, tags, `...`, the
operators, and calls of the words that make filters.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
from flax import nnx

import statewise
from statewise._src.common.paths import format_type
from statewise._src.filters.primitives import Exactly, Meta, Path
from statewise.cli.targets import UsageError
from statewise.errors import StatewiseError

__all__ = ["parse_filter", "types_by_name"]

# Each word with whether its arguments are filters (or types), or plain values.
WORDS: dict[str, tuple[Callable[..., Any], bool]] = {
    "Exactly": (Exactly, True),
    "Path": (Path, False),
    "Meta": (Meta, False),
    "All": (nnx.All, True),
    "Any": (nnx.Any, True),
    "Not": (nnx.Not, True),
    "OfType": (nnx.OfType, True),
    "WithTag": (nnx.WithTag, False),
    "PathContains": (nnx.PathContains, False),
}
PACKAGES = {"nnx": nnx, "sw": statewise, "statewise": statewise, "jax": jax}


def parse_filter(text: str, module: ModuleType, types: Mapping[str, type]) -> Any:
    """Reads a filter.

    Args:
      text: the filter, written as in Python.
      module: where names of types are looked up first, before the types of the model's leaves and those of nnx.
      types: the types of the model's leaves, by name.

    Raises:
      UsageError: the text is no Python expression, or says something that no filter says.
      FilterError: a word that got arguments which it does not take.

    Example:
      >>> import types
      >>> from statewise.cli.expressions import parse_filter
      >>> from statewise._src.filters.combinators import describe
      >>> describe(parse_filter("Param & ~Path('head/**')", types.ModuleType("models"), {}))
      "Param & ~Path('head/**')"
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _Reader(text, module, types).read(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, StatewiseError):
            raise
        raise UsageError(f"{_short(text)} is no filter: {type(error).__name__}: {error}") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


class _Reader:
    def __init__(self, text: str, module: ModuleType, types: Mapping[str, type]) -> None:
        self.text = text
        self.module = module
        self.types = types

    def read(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value) if value is None or value is ... or isinstance(value, (str, bool)):
                return value
            case ast.Name() | ast.Attribute():
                return self.type_named(self.dotted(node))
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(map(self.read, parts))
            case ast.UnaryOp(op=ast.Invert(), operand=part):
                return nnx.Not(self.read(part))
            case ast.BinOp(op=ast.BitAnd(), left=left, right=right):
                return nnx.All(self.read(left), self.read(right))
            case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                return nnx.Any(self.read(left), self.read(right))
            case ast.Call(func=function, args=args, keywords=[]):
                return self.word(self.dotted(function), args)
        raise self.refused(node)

    def refused(self, node: ast.expr) -> UsageError:
        return UsageError(
            f"{_short(ast.unparse(node))} cannot stand in a filter; types, 'tags', ..., & | ~ and "
            f"{', '.join(WORDS)} can"
        )

    def dotted(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return name
            case ast.Attribute(value=value, attr=name):
                return f"{self.dotted(value)}.{name}"
        raise self.refused(node)

    def word(self, name: str, args: list[ast.expr]) -> Any:
        package, _, last = name.rpartition(".")
        if last not in WORDS or (package and package not in PACKAGES):
            raise UsageError(f"{name}(...) cannot stand in a filter; {', '.join(WORDS)} can")
        make, of_filters = WORDS[last]
        try:
            return make(*(self.read(arg) if of_filters else self.literal(arg) for arg in args))
        except TypeError as error:
            if isinstance(error, StatewiseError):
                raise
            raise UsageError(f"{name} got other arguments than it takes: {error}") from error

    def literal(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise UsageError(f"{_short(ast.unparse(node))} is no plain value") from None

    def type_named(self, name: str) -> type:
        first, *rest = name.split(".")
        for scope in (vars(self.module), self.types, PACKAGES, vars(nnx)):
            found = scope.get(first)
            for attribute in rest:
                # Of modules and types only: another object's attribute may run code.
                found = getattr(found, attribute, None) if isinstance(found, (ModuleType, type)) else None
            if isinstance(found, type):
                return found
        seen = ", ".join(sorted(self.types)) or "none"
        raise UsageError(
            f"there is no type {name!r} in {self.module.__name__!r} or in nnx; the model's leaves are of: {seen}"
        )


def types_by_name(types: set[type]) -> dict[str, type]:
    """Types by the name under which tables show them; names that two types share are left out."""
    by_name: dict[str, list[type]] = {}
    for cls in types:
        by_name.setdefault(format_type(cls), []).append(cls)
    return {name: found[0] for name, found in by_name.items() if len(found) == 1}
