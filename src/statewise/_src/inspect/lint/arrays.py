"""Rules of arrays: where they stand, what shares them, and what becomes of them when something is traced."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import arrays_of, is_array, is_deleted
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import counted
from statewise._src.inspect.lint.finding import Found, Rule
from statewise._src.inspect.lint.subject import Subject

__all__ = ["RULES"]


def _raw(subject: Subject) -> Iterator[Found]:
    raw = [number for number, leaf in enumerate(subject.found.leaves) if not compat.is_variable(leaf)]
    if raw:
        yield Found(
            f"{counted(len(raw), 'array stands', 'arrays stand')} outside of any nnx.Variable.",
            subject.rows(raw),
            f"{subject.target(raw[0])} = nnx.Variable(...)  # or a subclass of it that says what it is",
        )


def _static_row(path: Path, value: Any, note: str = "") -> Leaf:
    return Leaf(path, None, jax.Array, tuple(value.shape), value.dtype, note=note)


def _turned_static(subject: Subject) -> Iterator[Found]:
    # A scalar of NumPy is a number like Python's: nothing that is traced makes one.
    rows = tuple(
        _static_row(path, value) for path, value in subject.statics(is_array) if not isinstance(value, np.generic)
    )
    if rows:
        yield Found(
            f"{counted(len(rows), 'array', 'arrays')} of a module made under tracing became part of its graph.",
            rows,
            f"self.{rows[0].path[-1]} = nnx.data(...)  # or nnx.Variable(...)",
        )


def _hidden(subject: Subject) -> Iterator[Found]:
    rows = [
        _static_row(path, array, note=f"in {where}")
        for path, value in subject.statics(_holds_arrays)
        for where, array in _arrays_in(value)
    ]
    if rows:
        yield Found(
            f"{counted(len(rows), 'array', 'arrays')} hidden in what a module holds as static.",
            tuple(rows),
            f"make it a leaf, and pass it on: self.{rows[0].path[-1]}_array = nnx.Variable(...)",
        )


def _holds_arrays(value: Any) -> bool:
    return not is_array(value) and any(True for _ in _arrays_in(value))


def _arrays_in(value: Any) -> Iterator[tuple[str, Any]]:
    """The arrays that a function closes over, that a partial was given, or that a plain object has as attributes."""
    if isinstance(value, functools.partial):
        held = {"the arguments of a partial": (*value.args, *value.keywords.values())}
    elif isinstance(value, types.FunctionType | types.MethodType):
        function = value.__func__ if isinstance(value, types.MethodType) else value
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        held = {"the closure of a function": tuple(cells), "its defaults": function.__defaults__ or ()}
    elif isinstance(value, type | types.ModuleType) or compat.is_variable(value):
        return
    else:
        held = {f"an object of type {type(value).__name__}": tuple(getattr(value, "__dict__", {}).values())}
    for where, things in held.items():
        yield from ((where, thing) for thing in things if is_array(thing) and not _is_number(thing))


def _is_number(array: Any) -> bool:
    """Whether an array is a constant like Python's numbers (a scale, an epsilon), or none that JAX could take."""
    if getattr(array.dtype, "kind", "") == "O":
        return True
    concrete = isinstance(array, np.generic | np.ndarray | jax.Array) and not isinstance(array, jax.core.Tracer)
    # A key is no constant: what draws from it draws the same numbers each time.
    return array.shape == () and concrete and not jnp.issubdtype(array.dtype, jax.dtypes.extended)


def _wide(subject: Subject) -> Iterator[Found]:
    wide: dict[int, list[str]] = {}
    for number, value in enumerate(subject.values):
        for array in arrays_of(value)[0] if value is not None else ():
            if (
                isinstance(array, np.ndarray | np.generic)
                and array.dtype.kind in "iufc"
                and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
            ):
                wide.setdefault(number, []).append(str(array.dtype))
    if wide:
        yield Found(
            f"{counted(len(wide), 'leaf', 'leaves')} of 64-bit numbers of NumPy, which JAX takes as 32-bit ones.",
            tuple(
                subject.row(number, note=f"{' and '.join(dict.fromkeys(dtypes))} in NumPy")
                for number, dtypes in wide.items()
            ),
            "nnx.Variable(jnp.asarray(value))  # the dtype that it will have anyway\n"
            "or, for 64 bits: jax.config.update('jax_enable_x64', True)  # before any array is made",
        )


def _shared(subject: Subject) -> Iterator[Found]:
    by_array: dict[int, list[int]] = {}
    for number, value in enumerate(subject.values):
        for array in arrays_of(value)[0] if value is not None else ():
            if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
                by_array.setdefault(id(array), []).append(number)
    groups = [group for group in by_array.values() if len(group) > 1]
    if groups:
        rows = tuple(
            subject.row(number, note=f"shares its array with {format_path(subject.found.paths[group[0]])}")
            for group in groups
            for number in group[1:]
        )
        yield Found(
            f"{counted(len(rows), 'leaf', 'leaves')} with the very array of another.",
            rows,
            "nnx.Variable(jnp.copy(array))  # or, if they are meant to stay one: share the Variable, not its array",
        )


def _deleted(subject: Subject) -> Iterator[Found]:
    gone = [
        number
        for number, value in enumerate(subject.values)
        if value is not None and any(map(is_deleted, arrays_of(value)[0]))
    ]
    if gone:
        yield Found(
            f"{counted(len(gone), 'leaf', 'leaves')} whose array was donated.",
            subject.rows(gone),
            "take the model from what came back: plan.put(state, model), nnx.update(model, state)\n"
            "or leave the arrays whole: plan.take(model), without copy=False; jax.jit without donate_argnums",
        )


def _tied(subject: Subject) -> Iterator[Found]:
    if subject.plan is not None:  # a state holds a tied leaf once
        return
    # Streams that modules share are no weights: an Rngs is made to be handed on.
    tied = [
        number
        for number, path in enumerate(subject.found.paths)
        if path in subject.aliases and not issubclass(subject.types[number], nnx.RngState)
    ]
    if tied:
        yield Found(
            f"{counted(len(tied), 'leaf is', 'leaves are')} reached by several paths.",
            subject.rows(tied),
            "state = sw.plan(model).take(model), and @sw.step or @sw.train_step  # or nnx.jit instead of jax.jit\n"
            "where this is known: sw.lint(model, ignore='tied-weights')",
        )


RULES = (
    Rule(
        "raw-array",
        "no filter by type means it, no optimizer updates it, and under tracing it turns static",
        _raw,
    ),
    Rule(
        "array-turned-static",
        "it is no leaf: nothing saves, moves or updates it, and the leaked tracer fails when the module is used",
        _turned_static,
    ),
    Rule(
        "hidden-array",
        "it is no leaf: nothing saves, moves or casts it, and every program that is compiled holds a copy",
        _hidden,
    ),
    Rule(
        "wide-numpy-value",
        "the first jitted call changes its dtype, which traces again and fits no checkpoint that was saved before",
        _wide,
    ),
    Rule(
        "shared-array",
        "a function that donates both fails, and the first update takes them apart",
        _shared,
    ),
    Rule("deleted-array", "whatever reads it fails", _deleted),
    Rule(
        "tied-weights",
        "a plain jax.jit (or jax.tree.map) gives back a model in which they have come apart",
        _tied,
    ),
)
