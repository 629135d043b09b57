"""What a filter is, and how filters are combined.

A filter may be NNX's or ours: `normalize` rejects it or makes it hashable and equal by value, `predicate` makes it
callable, `describe` writes it.  All three treat a compound filter (a tuple, `nnx.All`, our `&` ...) by its sign and
parts, which `compound` returns.
"""

from __future__ import annotations

import abc
import dataclasses
import operator
import types
import typing
from collections.abc import Callable, Iterator, Set
from typing import Any, ClassVar, TypeAlias

from flax import nnx

from statewise._src.common import paths
from statewise._src.filters.values import (
    describe_callable,
    fault_of_callable,
    hashable,
    reason,
    row,
    shown,
    type_as_code,
)
from statewise.errors import FilterError

__all__ = ["And", "Filter", "Not", "Or", "Ours", "Predicate", "ask", "compound", "describe", "normalize", "predicate"]

Predicate: TypeAlias = Callable[[tuple[Any, ...], Any], bool]
# NNX's own alias is recursive, and lacks the unions of types that Statewise accepts: `normalize` is the check.
Filter: TypeAlias = (
    type | types.UnionType | str | bool | Predicate | types.EllipsisType | tuple[Any, ...] | list[Any] | None
)


class Ours(abc.ABC):
    """The base of Statewise's own filters: callables of (path, leaf), combined by `&`, `|` and `~`."""

    # Without this, NumPy would evaluate `numpy_array | Path("x")` element by element.
    __array_ufunc__: ClassVar[None] = None

    # Whether the answer depends on the leaf's type alone (see `type_only`).
    by_type: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether the filter matches the leaf."""

    def __and__(self, other: Filter) -> And:
        return And((*_flat(And, self), *_flat(And, other)))

    def __rand__(self, other: Filter) -> And:
        return And((*_flat(And, other), *_flat(And, self)))

    def __or__(self, other: Filter) -> Or:
        return Or((*_flat(Or, self), *_flat(Or, other)))

    def __ror__(self, other: Filter) -> Or:
        return Or((*_flat(Or, other), *_flat(Or, self)))

    def __invert__(self) -> Ours:
        return Not(self)

    def __repr__(self) -> str:
        return _describe(self)


def _flat(cls: type[_Parts], filter: Any) -> tuple[Any, ...]:
    # Flattened, so that (a & b) & c and a & (b & c) are equal.
    return filter.parts if type(filter) is cls else (filter,)


@dataclasses.dataclass(frozen=True, repr=False)
class _Parts(Ours):
    parts: tuple[Any, ...]  # filters, once `__post_init__` has checked them
    # Compiled once; not part of the filter's equality, hash and text.
    _predicates: tuple[Predicate, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(map(normalize, self.parts)))
        object.__setattr__(self, "_predicates", tuple(map(_compile, self.parts)))


class And(_Parts):
    """Matches what all of its parts match: `a & b`."""

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether every part matches the leaf; stops at the first that does not."""
        return all(part(path, leaf) for part in self._predicates)


class Or(_Parts):
    """Matches what any of its parts matches: `a | b`."""

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether some part matches the leaf; stops at the first that does."""
        return any(part(path, leaf) for part in self._predicates)


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Ours):
    """Matches what its part does not: `~a`."""

    part: Filter
    _predicate: Predicate = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", normalize(self.part))
        object.__setattr__(self, "_predicate", _compile(self.part))

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        """Returns whether the part does not match the leaf."""
        return not self._predicate(path, leaf)

    def __invert__(self) -> Ours:
        return self.part if isinstance(self.part, Ours) else Not(self)


def compound(filter: Any) -> tuple[str, tuple[Any, ...]] | None:
    """Returns the sign and the parts of a normalized compound filter; None for any other.

    NNX's filters are recognized by their exact class: a subclass may mean something else.
    """
    match filter:
        case And(parts=parts):
            return "&", parts
        case Or(parts=parts):
            return "|", parts
        case Not(part=part):
            return "~", (part,)
        case tuple():
            return "|", filter
    if type(filter) in (nnx.All, nnx.Any):
        return ("&" if type(filter) is nnx.All else "|"), filter.predicates
    return ("~", (filter.predicate,)) if type(filter) is nnx.Not else None


# NNX's own filters that cannot fail at a leaf.
_PLAIN = (nnx.OfType, nnx.WithTag, nnx.PathContains, nnx.filterlib.PathIn, nnx.Everything, nnx.Nothing)
_CLASSES = (Ours, nnx.All, nnx.Any, nnx.Not, *_PLAIN)


def normalize(filter: object) -> Filter:
    """Checks a filter and all of its parts, and makes it hashable and equal by value.

    Lists and unions of types (`nnx.Param | nnx.Cache`) become tuples, also inside `nnx.All`, `nnx.Any` and `nnx.Not`;
    a filter that needs no change is returned as it is.  A function is kept, and is equal only to itself.

    Raises:
      FilterError: the filter, or a part of it, is not a filter; the error says which part.

    Example:
      >>> from flax import nnx
      >>> from statewise._src.filters.combinators import normalize
      >>> normalize([nnx.Param, [nnx.Cache, "dropout"]]) == (nnx.Param, (nnx.Cache, "dropout"))
      True
    """
    return _normalize(filter, "")


def _normalize(filter: Any, at: str) -> Any:
    if filter is None or filter is Ellipsis or isinstance(filter, (str, bool, Ours)):
        return filter
    if isinstance(filter, (list, tuple)):
        return tuple(_normalize(part, f"{at}[{i}]") for i, part in enumerate(filter))
    origin: Any = typing.get_origin(filter)
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(filter)
        return tuple(_normalize(None if m is type(None) else m, f"{at}[{i}]") for i, m in enumerate(members))
    if type(filter) in (nnx.All, nnx.Any):
        parts = tuple(_normalize(part, f"{at}.predicates[{i}]") for i, part in enumerate(filter.predicates))
        return filter if all(map(operator.is_, parts, filter.predicates)) else type(filter)(*parts)
    if type(filter) is nnx.Not:
        part = _normalize(filter.predicate, f"{at}.predicate")
        return filter if part is filter.predicate else nnx.Not(part)
    fault = "" if type(filter) in _PLAIN else _fault(filter)
    if fault:
        raise FilterError(f"{shown(filter)} {fault}{f' (at filter{at})' if at else ''}.", hint=_hint(filter))
    return hashable(filter)


def _fault(filter: Any) -> str:
    """Returns why this is not a filter, worded to follow its name; empty if it is one."""
    if isinstance(filter, type):
        if issubclass(filter, _CLASSES):
            return "is a class of filters, not a filter"
        try:
            isinstance(None, filter)
        except TypeError:
            return "is a type that isinstance does not accept"
        return ""
    if typing.get_origin(filter) is not None:
        return "is a generic alias, not a type"  # it is callable, so NNX would accept it
    return fault_of_callable(filter)


def _hint(filter: Any) -> str:
    if isinstance(filter, type) and issubclass(filter, _CLASSES):
        return f"{filter.__name__}(...)"
    if isinstance(filter, nnx.Variable):
        return type_as_code(filter.var_type)
    origin = typing.get_origin(filter)
    if isinstance(origin, type) and issubclass(origin, nnx.Variable):
        return type_as_code(origin)
    if isinstance(filter, (Set, Iterator)):
        return "(nnx.Param, nnx.Cache)  # a tuple"
    if callable(filter) and origin is None and not isinstance(filter, (type, nnx.Pytree)):
        return "lambda path, leaf: ..."
    return "nnx.Param  # or 'tag', ..., sw.Path('layers/**'), sw.Where(lambda path, leaf: ...), or a tuple of these"


def predicate(filter: object) -> Predicate:
    """Makes one function of (path, leaf) of any filter, with NNX's meaning.

    Unlike `nnx.filterlib.to_predicate` it rejects what is not a filter, and an exception in a callable becomes an error
    with the leaf's path.

    Raises:
      FilterError: the filter, or a part of it, is not a filter; at a leaf, a callable in it raised.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> from statewise._src.filters.combinators import predicate
      >>> matches = predicate([nnx.Cache, nnx.LoRAParam])
      >>> matches(("k",), nnx.Cache(jnp.ones(2))), matches(("w",), nnx.Param(jnp.ones(2)))
      (True, False)
    """
    return _compile(normalize(filter))


def _compile(filter: Any) -> Predicate:
    # Always an instance of a class, never a closure, so that filters can be pickled.
    if isinstance(filter, Ours):
        return filter
    if (of := compound(filter)) is not None:
        sign, parts = of
        return Not(*parts) if sign == "~" else (And if sign == "&" else Or)(parts)
    if callable(filter) and not isinstance(filter, (type, *_PLAIN)):
        return _Called(filter)
    return typing.cast(Predicate, nnx.filterlib.to_predicate(filter))


@dataclasses.dataclass(frozen=True)
class _Called:
    """A user's own callable, used as NNX uses it: its result is converted to a bool."""

    function: Any

    def __call__(self, path: paths.Path, leaf: Any) -> bool:
        return bool(ask(self.function, self._answer, path, leaf))

    def _answer(self, path: paths.Path, leaf: Any) -> bool:
        return bool(self.function(path, leaf))


def ask(filter: object, function: Callable[..., Any], path: paths.Path, leaf: Any) -> Any:
    """Calls a user's function for a filter at a leaf; an exception becomes an error that names both.

    Raises:
      FilterError: the function raised another exception.
    """
    try:
        return function(tuple(path), leaf)  # a plain tuple, even if our own filters receive a `Ways`
    except FilterError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise FilterError(
            f"{_describe(filter)} raised {reason(error)}.",
            leaves=[row(path, leaf)],
            hint="sw.Where(lambda path, leaf: isinstance(leaf, nnx.Variable) and ...)  # called for every leaf",
        ) from error


def describe(filter: object) -> str:
    """Writes a filter as short text: `Param & ~LoRAParam`, `Path('layers/**')`, `module:function` for a callable.

    Raises:
      FilterError: the filter, or a part of it, is not a filter.

    Example:
      >>> from flax import nnx
      >>> from statewise._src.filters.combinators import describe
      >>> describe(nnx.All(nnx.Param, nnx.Not((nnx.LoRAParam, "frozen"))))
      "Param & ~(LoRAParam | 'frozen')"
    """
    return _describe(normalize(filter))


_BINDS = {"|": 0, "&": 1, "~": 2}


def _describe(filter: Any, within: str = "|") -> str:
    of = compound(filter)
    if of is None:
        return _describe_one(filter)
    sign, parts = of
    if not parts:  # an empty "and" matches every leaf; an empty "or" matches none
        return "..." if sign == "&" else "()"
    if sign == "~":
        return f"~{_describe(parts[0], sign)}"
    if len(parts) == 1:
        return _describe(parts[0], within)
    text = f" {sign} ".join(_describe(part, sign) for part in parts)
    return f"({text})" if _BINDS[sign] < _BINDS[within] else text


def _describe_one(filter: object) -> str:
    match filter:
        case Ours():
            return repr(filter)
        case type() | nnx.OfType():
            return paths.format_type(filter.type if isinstance(filter, nnx.OfType) else filter)
        case nnx.WithTag(tag=tag):
            return repr(tag)
        case nnx.filterlib.PathIn(paths=members):
            return f"PathIn({', '.join(sorted(map(paths.format_path, members)))})"
        case bool() | str() | None | nnx.PathContains() | nnx.Everything() | nnx.Nothing():
            return repr(filter)
    return "..." if filter is Ellipsis else describe_callable(filter)
