"""NNX objects among a step's arguments: what the function writes to them would be lost.

JAX takes an argument apart and puts a copy together for the trace.  What is only read of it is as good as the original;
what is written is written to the copy.  So the Variables in the arguments are looked at before the function is called
and afterwards, and the program tells which of them hold something else (see `effects`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import arrays_of, is_array, raw_value, row_of, spec_of
from statewise._src.common.paths import Leaf, Path
from statewise.errors import StructureError

__all__ = ["Passed", "WrittenArgument", "check_foreign_objects", "is_object"]


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenArgument:
    """A leaf of an argument that the function writes.

    Attributes:
      place: the argument's position among those after the objects, or its name.
      inside: the keys that lead from the argument to the object, as JAX has them.
      object: the type of the object that holds it.
      leaf: the leaf; its path begins at the object.
    """

    place: Any
    inside: tuple[Any, ...]
    object: type
    leaf: Leaf


def is_object(thing: Any) -> bool:
    """Whether something is an NNX object: a module, a metric, random streams, a Variable; or a state of Variables."""
    return isinstance(thing, (nnx.Variable, nnx.Pytree, nnx.State))


def _is_variable(thing: Any) -> bool:
    return isinstance(thing, nnx.Variable)


def _flat(thing: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of an object, by the keys that lead to them; of a state only its Variables, for the rest is data."""
    leaves = jax.tree_util.tree_flatten_with_path(thing, is_leaf=_is_variable)[0]
    return {keys: leaf for keys, leaf in leaves if _is_variable(leaf) or not isinstance(thing, nnx.State)}


def _path(keys: tuple[Any, ...]) -> Path:
    return tuple(next(getattr(key, name) for name in ("name", "key", "idx") if hasattr(key, name)) for key in keys)


class Passed:
    """The NNX objects in the arguments of one traced call.

    Args:
      args: the positional arguments, as the function gets them.
      kwargs: the same by name.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        leaves = jax.tree_util.tree_flatten_with_path((tuple(args), dict(kwargs)), is_leaf=is_object)[0]
        self._objects = [(keys, leaf) for keys, leaf in leaves if is_object(leaf)]
        self._number: dict[int, int] = {}
        if self._objects:
            self._number = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves((args, kwargs)))}
        self._before = [_flat(thing) for _, thing in self._objects]
        self._values = [{keys: raw_value(leaf) for keys, leaf in flat.items()} for flat in self._before]
        self._rows = [{keys: row_of(_path(keys), leaf) for keys, leaf in flat.items()} for flat in self._before]
        # Found by `after`: leaves that are another, and those whose arrays the program has to tell about.
        self.written: list[WrittenArgument] = []
        self.asked: list[tuple[WrittenArgument, int]] = []

    @property
    def objects(self) -> list[Any]:
        """The objects."""
        return [thing for _, thing in self._objects]

    @property
    def variables(self) -> list[tuple[Path, Any]]:
        """The leaves, with their paths in their objects."""
        return [(_path(keys), leaf) for flat in self._before for keys, leaf in flat.items()]

    def after(self, out: Any) -> list[Any]:
        """Looks again, after the call; returns the arrays to ask the program about, in the order of `asked`.

        What the function returns is not lost, whether it was written or not.
        """
        self.written, self.asked, arrays = [], [], []
        if not self._objects:
            return []
        returned = {id(leaf) for leaf in jax.tree.leaves(out, is_leaf=_is_variable) if _is_variable(leaf)}
        for number, (keys, thing) in enumerate(self._objects):
            now = _flat(thing)
            for leaf_keys, row in self._rows[number].items():
                leaf = now.pop(leaf_keys, None)
                if id(leaf) in returned:
                    continue
                was = arrays_of(self._values[number][leaf_keys])
                given = None if leaf is None else arrays_of(raw_value(leaf))
                note = _difference(was, given)
                told = WrittenArgument(_place(keys), keys[2:], type(thing), dataclasses.replace(row, note=note))
                if note != _WRITTEN or given is None:
                    self.written.append(told)
                    continue
                for before, array in zip(was[0], given[0], strict=True):
                    if array is not before:
                        self.asked.append((told, self._number[id(before)]))
                        arrays.append(array)
            if not isinstance(thing, nnx.State):
                self.written += [
                    WrittenArgument(_place(keys), keys[2:], type(thing), row_of(_path(own), leaf, note="made"))
                    for own, leaf in now.items()
                    if id(leaf) not in returned and (_is_variable(leaf) or is_array(leaf))
                ]
        return arrays

    def told(self, is_written: Sequence[bool]) -> tuple[WrittenArgument, ...]:
        """All that is written, given for each array that was asked about whether it is."""
        found = [one for (one, _), written in zip(self.asked, is_written, strict=True) if written]
        return tuple(dict.fromkeys([*self.written, *found]))


_WRITTEN = "written"


def _place(keys: tuple[Any, ...]) -> Any:
    """The argument's position or name, from the keys that lead to it in (args, kwargs)."""
    return getattr(keys[1], "idx", getattr(keys[1], "key", None))


def _difference(was: tuple[list[Any], Any], now: tuple[list[Any], Any] | None) -> str:
    """What happened to a leaf whose values are of another structure, shape or dtype; else it may be written."""
    if now is None:
        return "removed"
    if now[1] != was[1] or list(map(spec_of, now[0])) != list(map(spec_of, was[0])):
        return "becomes a value of another shape, dtype or structure"
    return _WRITTEN


def check_foreign_objects(named: Iterator[tuple[str, Any]], step: str) -> None:
    """Raises for arguments that hold NNX objects which JAX cannot take apart: of `pytree=False`, or hijax Variables."""
    for name, value in named:
        for leaf in jax.tree.leaves(value):
            if compat.reference(leaf).startswith("hijax"):
                raise StructureError(
                    f"The argument {name} of {step} holds a hijax Variable, and each version of Flax writes these "
                    "otherwise.",
                    hint=f"{name if name.isidentifier() else 'argument'} = "
                    f"nnx.with_vars({name if name.isidentifier() else 'argument'}, hijax=False, ref=False)"
                    "  # a copy, of plain Variables",
                )
            if isinstance(leaf, nnx.Pytree):
                raise StructureError(
                    f"The argument {name} of {step} holds a {type(leaf).__name__}, which is not a pytree: JAX cannot "
                    "pass it.",
                    hint=f"plan = kinds.plan(model, {name})  # as one more object",
                )
