"""What a function brings along: the NNX objects that it can reach without being given them.

A compiled step reads such an object once, as constants, and can never write it.  Both go wrong most often by a slip
(`model` where the parameter is called `m`), so that errors say by which name the function reaches what.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import arrays_of, is_array, raw_value, row_of
from statewise._src.common.paths import Leaf
from statewise._src.step.arguments import merged

__all__ = ["STATIC", "Bound", "Brought", "arrays_in", "brought", "holder_of", "layers_of", "parts_of", "read_by"]


class Bound:
    """A function with its static arguments in their places.

    Args:
      fn: the function.
      static: the arguments, by position after the objects or by name.
      objects: how many objects the function is given first.
      names: what each of them is called.
    """

    def __init__(
        self, fn: Callable[..., Any], static: Mapping[Any, Any], objects: int, names: Mapping[Any, str]
    ) -> None:
        self.fn, self.static, self.objects, self.names = fn, dict(static), objects, dict(names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        full_args, full_kwargs = merged(args[self.objects :], kwargs, self.static)
        return self.fn(*args[: self.objects], *full_args, **full_kwargs)


@dataclasses.dataclass(frozen=True, slots=True)
class Brought:
    """An NNX object that a function reaches without being given it.

    Attributes:
      name: the expression by which it does.
      where: what that is: a variable of its closure, a global variable ...
      thing: the object.
    """

    name: str
    where: str
    thing: Any

    def __str__(self) -> str:
        return f"`{self.name}`, {self.where}"


# What these packages hold is theirs, and large.
_LIBRARIES = {
    "flax",
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "orbax",
    "scipy",
    "statewise",
    *sys.stdlib_module_names,
}
_LIBRARIES -= {"__main__"}
STATIC = "a static argument"
_DEEPEST = 5
_MOST = 2000  # things looked at


def layers_of(fn: Any) -> Iterator[Any]:
    """A callable and what it is wrapped around: partials, methods' functions, `__wrapped__`."""
    seen: set[int] = set()
    while fn is not None and id(fn) not in seen:
        seen.add(id(fn))
        yield fn
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, types.MethodType):
            fn = fn.__func__
        else:
            # Not of an object's attributes: an nnx.Rngs has any that one asks it for.
            fn = inspect.getattr_static(fn, "__wrapped__", None)


def brought(fn: Any) -> list[Brought]:
    """The NNX objects that a function reaches by its closure, globals, defaults, partial, or the object of a method."""
    found: list[Brought] = []
    _Search(found).callable_(fn, "its")
    return found


class _Search:
    """Follows references from a function, each object once."""

    def __init__(self, found: list[Brought]) -> None:
        self.found = found
        self.seen: set[int] = set()

    def callable_(self, fn: Any, whose: str) -> None:
        """Follows the function that a step was made of."""
        if isinstance(fn, Bound):
            for place, value in fn.static.items():
                self.value(value, fn.names[place], STATIC, 0)
            fn = fn.fn
        for layer in layers_of(fn):
            if isinstance(layer, functools.partial):
                for position, value in enumerate(layer.args):
                    self.value(value, f"partial.args[{position}]", "an argument of the partial", 0)
                for name, value in layer.keywords.items():
                    self.value(value, name, "an argument of the partial", 0)
            elif isinstance(layer, types.MethodType):
                self.value(layer.__self__, "self", "the object of the method", 0)
            elif isinstance(layer, types.FunctionType):
                self.function(layer, whose, 0)
            elif not isinstance(layer, (types.BuiltinFunctionType, type)):
                self.value(layer, "self", "the object that is called", 0)
                call = inspect.getattr_static(type(layer), "__call__", None)
                if isinstance(call, types.FunctionType) and not _is_library(call.__module__):
                    self.function(call, "the object's", 0)

    def function(self, fn: types.FunctionType, whose: str, depth: int) -> None:
        """Follows a plain function's closure, defaults, and the global variables that it reads."""
        if id(fn) in self.seen or depth > _DEEPEST:
            return
        self.seen.add(id(fn))
        for name, value in _closure(fn):
            self.value(value, name, f"a variable of {whose} closure", depth)
        for name, value in _defaults(fn):
            self.value(value, name, f"a default of {whose} parameters", depth)
        if _is_library(fn.__globals__.get("__name__")):
            return  # a wrapper of JAX or Flax
        names = {name: None for code in _codes(fn.__code__) for name in _globals_read(code)}
        attributes = {name for code in _codes(fn.__code__) for name in code.co_names}
        for name in names:
            value = fn.__globals__.get(name)
            if not isinstance(value, types.ModuleType):
                self.value(value, name, "a global variable", depth)
            elif not _is_library(value.__name__):
                for attribute in sorted(attributes & set(vars(value))):
                    self.value(vars(value)[attribute], f"{name}.{attribute}", "a global variable", depth)

    def value(self, value: Any, name: str, where: str, depth: int) -> None:
        """Follows anything that a name stands for."""
        if id(value) in self.seen or depth > _DEEPEST or len(self.seen) > _MOST:
            return
        if isinstance(value, (nnx.Variable, nnx.Pytree, nnx.State)):
            self.seen.add(id(value))
            self.found.append(Brought(name, where, value))
        elif isinstance(value, types.FunctionType):
            for layer in layers_of(value):
                if isinstance(layer, types.FunctionType):
                    self.function(layer, f"{value.__name__}'s", depth + 1)
        elif isinstance(value, (functools.partial, types.MethodType)):
            self.seen.add(id(value))
            owner = value.__self__ if isinstance(value, types.MethodType) else (value.func, value.args, value.keywords)
            self.value(owner, name, where, depth + 1)
        else:
            self.seen.add(id(value))
            for key, one in _members(value):
                self.value(one, name + key, where, depth + 1)


def _closure(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        if cell != types.CellType():  # it is empty until the variable is assigned
            yield name, cell.cell_contents


def _defaults(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    given = fn.__defaults__ or ()
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    yield from zip(names[len(names) - len(given) :], given, strict=True)
    yield from (fn.__kwdefaults__ or {}).items()


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions that stand in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _globals_read(code: types.CodeType) -> Iterator[str]:
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield one.argval


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, with the expression that leads there."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", one) for key, one in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{position}]", one) for position, one in enumerate(value))
    elif not isinstance(value, type) and not is_array(value) and not _is_library(type(value).__module__):
        names = dict.fromkeys(getattr(value, "__dict__", ()))
        if dataclasses.is_dataclass(value):
            names |= dict.fromkeys(field.name for field in dataclasses.fields(value))
        for name in names:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)
    elif isinstance(value, types.SimpleNamespace):
        yield from ((f".{name}", one) for name, one in vars(value).items())


# --- what of it is meant -----------------------------------------------------------------------------------------


def parts_of(thing: Any) -> Iterator[Any]:
    """An NNX object, and all objects and Variables in it."""
    if isinstance(thing, nnx.State):
        yield from jax.tree.leaves(thing, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    else:
        yield from (value for _, value in nnx.iter_graph(thing))


def arrays_in(thing: Any) -> list[tuple[Leaf, Any]]:
    """The leaves of an NNX object, each with its arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(thing, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    found = []
    for keys, leaf in leaves:
        path = tuple(next(getattr(key, at) for at in ("name", "key", "idx") if hasattr(key, at)) for key in keys)
        if isinstance(leaf, nnx.Variable) or is_array(leaf):
            found.append((row_of(path, leaf), arrays_of(raw_value(leaf))[0]))
    return found


def holder_of(things: Iterable[Brought], part: Any) -> Brought | None:
    """The one that is, or holds, an NNX object or Variable."""
    for one in things:
        if any(other is part for other in parts_of(one.thing)):
            return one
    return None


def read_by(jaxpr: Any, consts: Sequence[Any], things: Iterable[Brought]) -> list[tuple[Brought, list[Leaf]]]:
    """The objects whose arrays stand in a program as constants, each with the leaves that do."""
    held = {id(const) for const in consts} | set(_constants(jaxpr))
    found = []
    for one in things:
        leaves = [leaf for leaf, arrays in arrays_in(one.thing) if any(id(array) in held for array in arrays)]
        if leaves:
            found.append((one, leaves))
    return found


def _constants(jaxpr: Any) -> Iterator[int]:
    """The identities of all constants in a program, also in the bodies that it calls."""
    for const in getattr(jaxpr, "consts", ()):
        yield id(const)
    inner = compat.inner_jaxpr(jaxpr)
    for eqn in inner.eqns:
        yield from (id(var.val) for var in eqn.invars if isinstance(var, compat.Literal))
        for value in eqn.params.values():
            for body in value if isinstance(value, (list, tuple)) else (value,):
                if hasattr(body, "eqns") or hasattr(body, "jaxpr"):
                    yield from _constants(body)
