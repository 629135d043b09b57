"""Text and equality of the values in filters: functions, metadata, and whatever was passed by mistake.

Texts are short, the same in every process, and never show an array's values.  Equality returns one bool, for arrays
too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import Any

import jax
import numpy as np
from flax import nnx

from statewise._src.common import paths

__all__ = [
    "ById",
    "describe_callable",
    "fault_of_callable",
    "hashable",
    "own_copy",
    "reason",
    "row",
    "same",
    "shown",
    "type_as_code",
]


def type_as_code(cls: type) -> str:
    """Returns a type as it is written in code: `nnx.Param` if NNX or JAX has it, otherwise its name."""
    name = paths.format_type(cls)
    module = next((module for module in (nnx, jax) if getattr(module, name.rpartition(".")[2], None) is cls), None)
    return f"{module.__name__.rpartition('.')[2]}.{name.rpartition('.')[2]}" if module else name


def shown(value: Any) -> str:
    """Writes any value in a few words, for an error's text or a table."""
    if isinstance(value, (bool, int, float, complex, str, bytes)) or value is None or value is Ellipsis:
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, (nnx.Variable, jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return str(row((), value)).partition(": ")[2]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        inner = ", ".join(map(shown, value[:8])) + (", ..." if len(value) > 8 else "")
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, type):
        return paths.format_type(value)
    if typing.get_origin(value) is not None:
        return str(value)
    return describe_callable(value) if hasattr(value, "__qualname__") else f"an object of type {type(value).__name__}"


def describe_callable(function: Any) -> str:
    """Writes a callable as `module:qualname`; one without a name by its class, `module:Class(...)`."""
    if isinstance(function, ById):
        return describe_callable(function.function)
    if isinstance(function, functools.partial):
        return f"partial({describe_callable(function.func)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    module = named.__module__ or "builtins"  # a method of a builtin has no module
    return f"{module}:{named.__qualname__}" + ("" if named is function else "(...)")


def reason(error: Exception) -> str:
    """Writes an exception on one line."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def row(path: paths.Path, leaf: Any) -> paths.Leaf:
    """Describes a leaf for an error, under its path as it is printed."""
    if isinstance(path, paths.Ways):
        path = (path.printed or path.relative)[0]
    variable = isinstance(leaf, nnx.Variable)
    value = leaf.get_raw_value() if variable else leaf  # a reference has a shape and a dtype too
    cls = leaf.var_type if variable else jax.Array if isinstance(leaf, jax.Array) else type(leaf)
    # A dict or a module has no shape; a tracer-like object may have one that is not a tuple.
    shape = value.shape if isinstance(getattr(value, "shape", None), tuple) else None
    return paths.Leaf(path, None, cls, shape, getattr(value, "dtype", None))


def same(a: Any, b: Any) -> bool:
    """Compares two values of metadata by `==`, also inside containers; arrays by shape and every element."""
    if a is b:
        return True
    if type(a) is type(b) and type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is type(b) is dict:
        return a.keys() == b.keys() and all(same(item, b[key]) for key, item in a.items())
    if getattr(a, "shape", ()) != getattr(b, "shape", ()):
        return False
    equal = a == b
    return bool(equal.all()) if getattr(equal, "shape", ()) else bool(equal)


def own_copy(value: Any) -> Any:
    """Copies a value's containers, so that changing the original list does not change the filter."""
    if type(value) in (list, tuple, set):
        return type(value)(map(own_copy, value))
    if type(value) is dict:
        return {key: own_copy(item) for key, item in value.items()}
    return value.copy() if isinstance(value, np.ndarray) else value


@dataclasses.dataclass(frozen=True, eq=False)
class ById:
    """A hashable wrapper of an unhashable callable: equal only to itself."""

    function: Any

    def __call__(self, path: paths.Path, leaf: Any) -> Any:
        """Calls the function."""
        return self.function(path, leaf)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.function is other.function

    def __hash__(self) -> int:
        return hash((ById, id(self.function)))


def hashable(function: Any) -> Any:
    """Returns the function itself, or a hashable wrapper."""
    try:
        hash(function)
    except TypeError:
        return ById(function)
    return function


def fault_of_callable(value: Any) -> str:
    """Returns why a value cannot be called with (path, leaf), worded to follow its name; empty if it can."""
    if not callable(value):
        return "is not a filter"
    if isinstance(value, (nnx.Pytree, nnx.Variable)):
        return "is an object of a model, not a filter"  # many are callable, so NNX would accept them
    try:
        inspect.signature(value).bind((), None)
    except TypeError:
        return "cannot be called with (path, leaf)"
    except ValueError:  # a builtin without a signature: only a call would show
        return ""
    return ""
