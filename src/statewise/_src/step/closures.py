"""The NNX objects that a function can reach without taking them as arguments.

A compiled step reads such an object once, as constants, and can never write it.  Usually this is a slip (`model` where
the parameter is called `m`), so errors say by which name the function reaches which object.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.codes import codes_in
from statewise._src.common.compat import jaxprs
from statewise._src.common.nested_state import is_state
from statewise._src.common.nnx_graph import arrays_of, held_value, is_array, row_of
from statewise._src.common.paths import Leaf, plain_key
from statewise._src.step.arguments import Bound

__all__ = ["STATIC", "Brought", "arrays_in", "brought", "holder_of", "layers_of", "parts_of", "read_by"]


@dataclasses.dataclass(frozen=True, slots=True)
class Brought:
    """An NNX object that a function reaches without taking it as an argument.

    Attributes:
      name: the expression by which the function reaches it.
      where: what that expression is: a variable of its closure, a global variable ...
      obj: the object.
    """

    name: str
    where: str
    obj: Any

    def __str__(self) -> str:
        return f"`{self.name}`, {self.where}"


# Objects inside these packages are not the user's, and there are many of them.
_LIBRARIES = {"flax", "jax", "jaxlib", "numpy", "optax", "orbax", "scipy", "statewise", *sys.stdlib_module_names}
_LIBRARIES -= {"__main__"}
STATIC = "a static argument"
# Limits of the search: how many references in a row, and how many objects are visited.
_DEEPEST = 5
_MOST = 2000


def layers_of(fn: Any) -> Iterator[Any]:
    """Yields a callable and what it wraps: the functions of partials and methods, and `__wrapped__`."""
    seen: set[int] = set()
    while fn is not None and id(fn) not in seen:
        seen.add(id(fn))
        yield fn
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, types.MethodType):
            fn = fn.__func__
        else:
            # Statically, not by getattr: an nnx.Rngs has any attribute that is requested.
            fn = inspect.getattr_static(fn, "__wrapped__", None)


def brought(fn: Any) -> list[Brought]:
    """Returns the NNX objects that a function reaches by closure, globals, defaults, partial, or as its `self`."""
    search = _Search()
    search.callable_(fn)
    return search.reached


class _Search:
    """Follows references from a function, visiting each object once."""

    def __init__(self) -> None:
        self.reached: list[Brought] = []
        self.seen: set[int] = set()

    def callable_(self, fn: Any) -> None:
        """Follows the function that a step was made from."""
        if isinstance(fn, Bound):
            for place, value in fn.static.items():
                self.value(value, fn.names[place], STATIC)
            fn = fn.fn
        for layer in layers_of(fn):
            if isinstance(layer, functools.partial):
                positional = ((f"partial.args[{position}]", value) for position, value in enumerate(layer.args))
                for name, value in (*positional, *layer.keywords.items()):
                    self.value(value, name, "an argument of the partial")
            elif isinstance(layer, types.MethodType):
                self.value(layer.__self__, "self", "the object of the method")
            elif isinstance(layer, types.FunctionType):
                self.function(layer, "its")
            elif not isinstance(layer, (types.BuiltinFunctionType, type)):
                self.value(layer, "self", "the object that is called")
                call = inspect.getattr_static(type(layer), "__call__", None)
                if isinstance(call, types.FunctionType) and not _is_library(call.__module__):
                    self.function(call, "the object's")

    def function(self, fn: types.FunctionType, whose: str, depth: int = 0) -> None:
        """Follows a plain function's closure, its defaults, and the global variables that it reads."""
        if id(fn) in self.seen or depth > _DEEPEST:
            return
        self.seen.add(id(fn))
        for name, value in _closure(fn):
            self.value(value, name, f"a variable of {whose} closure", depth)
        for name, value in _defaults(fn):
            self.value(value, name, f"a default of {whose} parameters", depth)
        if _is_library(fn.__globals__.get("__name__")):
            return  # a wrapper of JAX or Flax
        codes = list(codes_in(fn.__code__))
        instructions = itertools.chain.from_iterable(map(dis.get_instructions, codes))
        names = dict.fromkeys(op.argval for op in instructions if op.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        # The bytecode of `module.model` loads `module`, then an attribute: any name that the code mentions may be it.
        attributes = {name for code in codes for name in code.co_names}
        for name in names:
            value = fn.__globals__.get(name)
            if not isinstance(value, types.ModuleType):
                self.value(value, name, "a global variable", depth)
            elif not _is_library(value.__name__):
                for attribute in sorted(attributes & set(vars(value))):
                    self.value(vars(value)[attribute], f"{name}.{attribute}", "a global variable", depth)

    def value(self, value: Any, name: str, where: str, depth: int = 0) -> None:
        """Follows the object that a name refers to."""
        if id(value) in self.seen or depth > _DEEPEST or len(self.seen) > _MOST:
            return
        if isinstance(value, (nnx.Variable, nnx.Pytree)) or compat.is_nnx_state(value):
            self.seen.add(id(value))
            self.reached.append(Brought(name, where, value))
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
            for key, member in _members(value):
                # The dicts of a state are as deep as its model.
                self.value(member, name + key, where, depth if is_state(value) else depth + 1)


def _closure(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        if cell != types.CellType():  # the cell is empty until the variable is assigned
            yield name, cell.cell_contents


def _defaults(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    given = fn.__defaults__ or ()
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    yield from zip(names[len(names) - len(given) :], given, strict=True)
    yield from (fn.__kwdefaults__ or {}).items()


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what an object holds, each with the expression that leads to it."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", member) for key, member in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{position}]", member) for position, member in enumerate(value))
    elif not isinstance(value, type) and not is_array(value) and not _is_library(type(value).__module__):
        names = dict.fromkeys(getattr(value, "__dict__", ()))
        if dataclasses.is_dataclass(value):
            names |= dict.fromkeys(field.name for field in dataclasses.fields(value))
        for name in names:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)
    elif isinstance(value, types.SimpleNamespace):
        yield from ((f".{name}", member) for name, member in vars(value).items())


# --- which object is meant ---------------------------------------------------------------------------------------


def parts_of(obj: Any) -> Iterator[Any]:
    """Yields an NNX object and all objects and Variables in it."""
    if compat.is_nnx_state(obj):
        yield from jax.tree.leaves(obj, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    else:
        yield from (value for _, value in nnx.iter_graph(obj, graph=True))


def arrays_in(obj: Any) -> list[tuple[Leaf, Any]]:
    """Returns the leaves of an NNX object, each with its arrays."""
    return [(row, arrays_of(held_value(leaf))[0]) for row, leaf in _leaves_in(obj)]


def _leaves_in(obj: Any) -> list[tuple[Leaf, Any]]:
    """Returns the leaves of an NNX object, as data and as they are."""
    leaves = jax.tree_util.tree_flatten_with_path(obj, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    return [
        (row_of(tuple(map(plain_key, keys)), leaf), leaf)
        for keys, leaf in leaves
        if isinstance(leaf, nnx.Variable) or is_array(leaf)
    ]


def holder_of(candidates: Iterable[Brought], part: Any) -> Brought | None:
    """Returns the entry that is, or contains, an NNX object or Variable."""
    holds = (candidate for candidate in candidates if any(other is part for other in parts_of(candidate.obj)))
    return next(holds, None)


def read_by(jaxpr: Any, consts: Sequence[Any], candidates: Iterable[Brought]) -> list[tuple[Brought, list[Leaf]]]:
    """Returns the objects whose arrays are constants of a program, each with the leaves concerned."""
    # By identity: a constant of the program is the very array that the object held when it was traced, or, of a hijax
    # Variable, the Variable itself.
    held = {id(const) for const in consts} | set(_constants(jaxpr))
    objects = []
    for candidate in candidates:
        leaves = [
            row
            for row, leaf in _leaves_in(candidate.obj)
            if any(id(constant) in held for constant in (leaf, *arrays_of(held_value(leaf))[0]))
        ]
        if leaves:
            objects.append((candidate, leaves))
    return objects


def _constants(jaxpr: Any) -> Iterator[int]:
    """Yields the identities of all constants in a program, including those of the bodies that it calls."""
    yield from map(id, jaxprs.consts_of(jaxpr))
    for eqn in jaxprs.inner_jaxpr(jaxpr).eqns:
        yield from (id(var.val) for var in eqn.invars if isinstance(var, jaxprs.Literal))
        for body in jaxprs.bodies_of(eqn):
            yield from _constants(body)
