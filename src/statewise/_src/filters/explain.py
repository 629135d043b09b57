"""How a filter decides: which part decides about a leaf, whether types alone decide, and the filter as code."""

from __future__ import annotations

import abc
import ast
import functools
from collections.abc import Hashable
from typing import Any

import jax
from flax import nnx

from statewise._src.common import compat, paths
from statewise._src.filters.combinators import And, Filter, Not, Or, Ours, compound, describe, normalize, predicate
from statewise._src.filters.primitives import Exactly, Meta, Where
from statewise._src.filters.primitives import Path as Glob
from statewise._src.filters.values import ById, type_as_code

__all__ = ["as_code", "explain_leaf", "is_python", "static_only", "type_key", "type_only"]


def explain_leaf(filter: object, path: paths.Path, leaf: Any) -> tuple[bool, str]:
    """Determines whether a filter matches a leaf, and which part of the filter decided.

    The deciding part is the first of an "and" that fails, or the first of an "or" that matches; if every part had to be
    evaluated, it is all of them.

    Args:
      filter: any filter.
      path: the leaf's path, a tuple of keys.
      leaf: an `nnx.Variable` or a raw array.

    Returns:
      Whether it matches, and the deciding part as `describe` writes it.

    Raises:
      FilterError: as `predicate` does.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from statewise._src.filters.explain import explain_leaf
      >>> base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
      >>> explain_leaf(base, ("lora_a",), nnx.LoRAParam(jnp.ones(2)))
      (False, '~LoRAParam')
      >>> explain_leaf(base, ("kernel",), nnx.Param(jnp.ones(2)))
      (True, 'Param & ~LoRAParam')
    """
    matched, part = _decide(normalize(filter), path, leaf)
    return matched, describe(part)


def _decide(filter: Filter, path: paths.Path, leaf: Any) -> tuple[bool, Filter]:
    of = compound(filter)
    if of is None:
        return predicate(filter)(path, leaf), filter
    sign, parts = of
    if sign == "~":
        matched, by = _decide(parts[0], path, leaf)
        return not matched, by.part if isinstance(by, Not) else Not(by)
    evaluated = []
    for part in parts:
        matched, by = _decide(part, path, leaf)
        if matched == (sign == "|"):
            return matched, by
        evaluated.append(by)
    return sign == "&", (And if sign == "&" else Or)(tuple(evaluated))


def type_only(filter: object) -> bool:
    """Returns whether a filter's answer depends only on `type_key(leaf)`; False if that is not certain.

    Raises:
      FilterError: the filter, or a part of it, is not a filter.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise._src.filters.explain import type_only
      >>> type_only(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))), type_only(nnx.Param & sw.Path("head/**"))
      (True, False)
    """
    return _looks_only_at_types(normalize(filter))


def _looks_only_at_types(filter: Filter, or_paths: bool = False) -> bool:
    of = compound(filter)
    if of is not None:
        return all(_looks_only_at_types(part, or_paths) for part in of[1])
    if or_paths and type(filter) in _OF_PATHS:
        return True
    if isinstance(filter, Ours):
        return filter.by_type
    if type(filter) is nnx.OfType:
        return _looks_only_at_types(filter.type)
    if isinstance(filter, type):
        # A metaclass may let isinstance inspect the value: jaxtyping's array types, runtime protocols.
        metaclass: Any = type(filter)
        owner = next(cls for cls in metaclass.__mro__ if "__instancecheck__" in vars(cls))
        return owner in (type, abc.ABCMeta, type(nnx.Variable), type(jax.Array))
    literal = filter is None or filter is Ellipsis or isinstance(filter, bool)
    return literal or type(filter) in (nnx.Everything, nnx.Nothing)


def static_only(filter: object) -> bool:
    """Returns whether a filter's answer depends only on `type_key(leaf)` and the leaf's paths; False if not certain.

    Raises:
      FilterError: the filter, or a part of it, is not a filter.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise._src.filters.explain import static_only
      >>> static_only(nnx.Param & sw.Path("head/**")), static_only(lambda path, leaf: leaf.ndim == 2)
      (True, False)
    """
    return _looks_only_at_types(normalize(filter), or_paths=True)


# Filters that look at paths alone.
_OF_PATHS = (Glob, nnx.PathContains, nnx.filterlib.PathIn)


def type_key(leaf: Any) -> Hashable:
    """Returns everything that a `type_only` filter can see of a leaf: equal keys get equal answers.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from statewise._src.filters.explain import type_key
      >>> type_key(nnx.Param(jnp.ones(2)))
      <class 'flax.nnx.variablelib.Param'>
    """
    if compat.is_variable(leaf):
        return leaf.var_type
    if isinstance(leaf, compat.Tracer):
        # Whether a tracer is an array depends on what it stands for, not on its class.
        return type(leaf), isinstance(leaf, jax.Array)
    key: Any = type(leaf)
    return key


def as_code(filter: object) -> str:
    """Writes a filter as code, for an error's hint: `nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))`.

    The result is valid Python: a function is written by its name, a lambda as `lambda path, leaf: ...`.

    Raises:
      FilterError: the filter, or a part of it, is not a filter.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise._src.filters.explain import as_code
      >>> as_code(nnx.Param & ~sw.Path("head/**") | nnx.Cache)
      "(nnx.All(nnx.Param, nnx.Not(sw.Path('head/**'))), nnx.Cache)"
    """
    return _as_code(normalize(filter))


def _as_code(filter: Any) -> str:
    of = compound(filter)
    if of is not None:
        sign, parts = of
        inner = ", ".join(map(_as_code, parts))
        name = {"&": "nnx.All", "|": "", "~": "nnx.Not"}[sign]
        return f"{name}({inner}{',' if sign == '|' and len(parts) == 1 else ''})"
    if isinstance(filter, Exactly):
        return f"sw.Exactly({', '.join(map(_as_code, filter.types))})"
    if isinstance(filter, Where):
        return f"sw.Where({_name_of(filter.predicate)})"
    if isinstance(filter, Meta) and not is_python(repr(filter)):
        return f"sw.Meta({filter.name!r}, ...)"
    if isinstance(filter, Ours):
        return f"sw.{filter!r}"
    if isinstance(filter, nnx.PathContains):
        return f"nnx.{describe(filter)}"
    if type(filter) is nnx.filterlib.PathIn:
        return f"nnx.filterlib.PathIn({', '.join(sorted(map(repr, filter.paths)))})"
    cls = filter.type if type(filter) is nnx.OfType else filter
    if isinstance(cls, type):
        return type_as_code(cls)
    return describe(filter) if filter is None or filter is ... or isinstance(filter, bool | str) else _name_of(filter)


def _name_of(function: Any) -> str:
    """Returns the name by which code refers to a function; `lambda path, leaf: ...` if it has none."""
    if isinstance(function, ById):
        return _name_of(function.function)
    if isinstance(function, functools.partial):
        return f"functools.partial({_name_of(function.func)}, ...)"
    text = describe(function)
    if not is_python(text):
        named = getattr(function, "__qualname__", None)
        text = (named or f"{type(function).__qualname__}(...)").rpartition("<locals>.")[2]
    return text if is_python(text) else "lambda path, leaf: ..."


def is_python(text: str) -> bool:
    """Returns whether a text is a Python expression."""
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True
