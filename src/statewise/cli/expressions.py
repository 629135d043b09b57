"""Parses the text of a filter, without evaluating anything.

The text is parsed by `ast`, and only the elements of filters are accepted: names of types, tags, `...`, the operators,
and calls of the functions that make filters.
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

# Each function, and whether its arguments are filters (or types) rather than plain values.
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
    """Parses a filter.

    Args:
      text: the filter, written as in Python.
      module: the module in which names of types are looked up first, before the model's leaves and nnx.
      types: the types of the model's leaves, by name.

    Raises:
      UsageError: the text is not a Python expression, or contains something that a filter cannot contain.
      FilterError: a function received arguments that it does not take.

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
        raise UsageError(f"{_short(text)} is not a filter: {type(error).__name__}: {error}") from error


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
            f"{_short(ast.unparse(node))} is not allowed in a filter; types, 'tags', ..., & | ~ and "
            f"{', '.join(WORDS)} are"
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
            raise UsageError(f"{name}(...) is not allowed in a filter; {', '.join(WORDS)} are")
        make, of_filters = WORDS[last]
        try:
            return make(*(self.read(arg) if of_filters else self.literal(arg) for arg in args))
        except TypeError as error:
            if isinstance(error, StatewiseError):
                raise
            raise UsageError(f"{name} received wrong arguments: {error}") from error

    def literal(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise UsageError(f"{_short(ast.unparse(node))} is not a plain value") from None

    def type_named(self, name: str) -> type:
        first, *rest = name.split(".")
        # The module first: it may have a type of its own with a name that nnx has too.
        for scope in (vars(self.module), self.types, PACKAGES, vars(nnx)):
            value = scope.get(first)
            for attribute in rest:
                # Only attributes of modules and types: another object's attribute may run code.
                value = getattr(value, attribute, None) if isinstance(value, (ModuleType, type)) else None
            if isinstance(value, type):
                return value
        known = ", ".join(sorted(self.types)) or "none"
        raise UsageError(
            f"there is no type {name!r} in {self.module.__name__!r} or in nnx; the types of the model's leaves: {known}"
        )


def types_by_name(types: set[type]) -> dict[str, type]:
    """Returns types by the name under which tables show them, without names that two types share."""
    by_name: dict[str, list[type]] = {}
    for cls in types:
        by_name.setdefault(format_type(cls), []).append(cls)
    return {name: named[0] for name, named in by_name.items() if len(named) == 1}
