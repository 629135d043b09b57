"""Rules of arrays: where they are, what shares them, and what happens to them under tracing."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import is_array, is_deleted
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.problems import counted
from statewise._src.inspect.lint.finding import Found, Rules
from statewise._src.inspect.lint.subject import Subject

__all__ = ["RULES"]

RULES = Rules()


@RULES.rule("raw-array", "no filter by type matches it, no optimizer updates it, and under tracing it becomes static")
def raw_array(subject: Subject) -> Iterator[Found]:
    """Finds arrays that are not in a Variable."""
    raw = [number for number, leaf in enumerate(subject.graph.leaves) if not compat.is_variable(leaf)]
    if raw:
        yield Found(
            f"{counted(len(raw), 'array is', 'arrays are')} outside of any nnx.Variable.",
            subject.rows(raw),
            f"{subject.target(raw[0])} = nnx.Variable(...)  # or a subclass of it that says what it is",
        )


def _static_row(path: Path, value: Any, note: str = "") -> Leaf:
    return Leaf(path, None, jax.Array, tuple(value.shape), value.dtype, note=note)


@RULES.rule(
    "array-turned-static",
    "it is not a leaf: nothing saves, moves or updates it, and the leaked tracer fails when the module is used",
)
def array_turned_static(subject: Subject) -> Iterator[Found]:
    """Finds arrays among the static attributes of modules."""
    # A NumPy scalar is a number like Python's: nothing under tracing makes one.
    arrays = subject.statics(lambda value: is_array(value) and not isinstance(value, np.generic))
    rows = tuple(itertools.starmap(_static_row, arrays))
    if rows:
        yield Found(
            f"{counted(len(rows), 'array', 'arrays')} of a module made under tracing became part of its graph.",
            rows,
            f"self.{rows[0].path[-1]} = nnx.data(...)  # or nnx.Variable(...)",
        )


@RULES.rule(
    "hidden-array",
    "it is not a leaf: nothing saves, moves or casts it, and every program that is compiled contains a copy",
)
def hidden_array(subject: Subject) -> Iterator[Found]:
    """Finds arrays inside the static attributes of modules."""
    statics = subject.statics(lambda value: not is_array(value) and any(True for _ in _arrays_in(value)))
    rows = tuple(
        _static_row(path, array, note=f"in {where}") for path, value in statics for where, array in _arrays_in(value)
    )
    if rows:
        yield Found(
            f"{counted(len(rows), 'array is', 'arrays are')} hidden in static attributes of modules.",
            rows,
            f"make it a leaf, and pass it on: self.{rows[0].path[-1]}_array = nnx.Variable(...)",
        )


def _arrays_in(value: object) -> Iterator[tuple[str, Any]]:
    """Yields the arrays in the closure of a function, the arguments of a partial, or the attributes of an object."""
    if isinstance(value, functools.partial):
        contents = {"the arguments of a partial": (*value.args, *value.keywords.values())}
    elif isinstance(value, types.FunctionType | types.MethodType):
        function = value.__func__ if isinstance(value, types.MethodType) else value
        # The cell of a name that has no value yet raises when its contents are read; it equals an empty one.
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        contents = {"the closure of a function": tuple(cells), "its defaults": function.__defaults__ or ()}
    elif isinstance(value, type | types.ModuleType) or compat.is_variable(value):
        return
    else:
        contents = {f"an object of type {type(value).__name__}": tuple(getattr(value, "__dict__", {}).values())}
    for where, items in contents.items():
        yield from ((where, item) for item in items if is_array(item) and not _is_number(item))


def _is_number(array: Any) -> bool:
    """Returns whether an array is a constant like Python's numbers (a scale, an epsilon), or not one JAX could use."""
    if getattr(array.dtype, "kind", "") == "O":
        return True
    concrete = isinstance(array, np.generic | np.ndarray | jax.Array) and not isinstance(array, compat.Tracer)
    # A key is not a constant: code that uses it draws the same numbers each time.
    return array.shape == () and concrete and not jnp.issubdtype(array.dtype, jax.dtypes.extended)


@RULES.rule(
    "wide-numpy-value",
    "the first jitted call changes its dtype, which traces again and does not fit checkpoints saved before",
)
def wide_numpy_value(subject: Subject) -> Iterator[Found]:
    """Finds values in 64-bit NumPy dtypes that JAX narrows."""
    wide: dict[int, dict[str, None]] = {}
    for number, array in subject.arrays:
        if (
            isinstance(array, np.ndarray | np.generic)
            and array.dtype.kind in "iufc"
            and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
        ):
            wide.setdefault(number, {})[str(array.dtype)] = None
    if wide:
        yield Found(
            f"{counted(len(wide), 'leaf', 'leaves')} of 64-bit NumPy numbers, which JAX takes as 32-bit ones.",
            tuple(subject.row(number, note=f"{' and '.join(dtypes)} in NumPy") for number, dtypes in wide.items()),
            "nnx.Variable(jnp.asarray(value))  # the dtype that it will have anyway\n"
            "or, for 64 bits: jax.config.update('jax_enable_x64', True)  # before any array is made",
        )


@RULES.rule("shared-array", "a function that donates both fails, and the first update separates them")
def shared_array(subject: Subject) -> Iterator[Found]:
    """Finds leaves that hold the same array object."""
    by_array: dict[int, list[int]] = {}
    for number, array in subject.arrays:
        if isinstance(array, jax.Array) and not isinstance(array, compat.Tracer):
            by_array.setdefault(id(array), []).append(number)
    rows = subject.repeats(by_array.values(), "shares its array with {}")
    if rows:
        yield Found(
            f"{counted(len(rows), 'leaf holds', 'leaves hold')} the same array as another.",
            rows,
            "nnx.Variable(jnp.copy(array))  # or, if they are meant to stay one: share the Variable, not its array",
        )


@RULES.rule("deleted-array", "everything that reads it fails")
def deleted_array(subject: Subject) -> Iterator[Found]:
    """Finds leaves whose array was donated."""
    donated = dict.fromkeys(number for number, array in subject.arrays if is_deleted(array))
    if donated:
        yield Found(
            f"{counted(len(donated), 'leaf', 'leaves')} whose array was donated.",
            subject.rows(donated),
            "update the model with the arrays that came back: plan.put(state, model), nnx.update(model, state)\n"
            "or do not donate its arrays: plan.take(model), without copy=False; jax.jit without donate_argnums",
        )


@RULES.rule("tied-weights", "a plain jax.jit (or jax.tree.map) returns a model in which they are separate")
def tied_weights(subject: Subject) -> Iterator[Found]:
    """Finds leaves that several paths reach."""
    if subject.plan is not None:  # a state holds a tied leaf once
        return
    # Streams that modules share are not weights: an Rngs is meant to be shared.
    tied = [
        number
        for number, path in enumerate(subject.paths)
        if path in subject.aliases and not issubclass(subject.types[number], nnx.RngState)
    ]
    if tied:
        yield Found(
            f"{counted(len(tied), 'leaf is', 'leaves are')} reached by several paths.",
            subject.rows(tied),
            "state = sw.plan(model).take(model), and @sw.step or @sw.train_step  # or nnx.jit instead of jax.jit\n"
            "if this is known: sw.lint(model, ignore='tied-weights')",
        )
