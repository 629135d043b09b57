"""NNX objects among a step's arguments, to which the function's writes would be lost.

JAX flattens an argument and rebuilds a copy for the trace.  Reading the copy is as good as reading the original, but
writes go to the copy.  So the Variables in the arguments are compared before and after the call, and the program shows
which of them hold another value (see `effects`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import arrays_of, held_value, is_array, is_object, row_of, spec_of
from statewise._src.common.paths import Leaf, Path, plain_key
from statewise.errors import StructureError

__all__ = ["Passed", "WrittenArgument", "check_foreign_objects", "holds_leaves", "plain_arguments"]


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenArgument:
    """A leaf of an argument that the function writes.

    Attributes:
      place: the argument's position among those after the objects, or its name.
      inside: the keys that lead from the argument to the object, as JAX gives them.
      object: the type of the object that holds it.
      leaf: the leaf; its path starts at the object.
    """

    place: int | str
    inside: tuple[Any, ...]
    object: type
    leaf: Leaf


def holds_leaves(obj: object) -> bool:
    """Returns whether a value is an NNX object, or an `nnx.State`."""
    return is_object(obj) or compat.is_nnx_state(obj)


def _flat(obj: Any) -> dict[tuple[Any, ...], Any]:
    """Returns the leaves of an object by their keys; of an `nnx.State` only the Variables, as the rest is data."""
    leaves = jax.tree_util.tree_flatten_with_path(obj, is_leaf=compat.is_variable)[0]
    return {keys: leaf for keys, leaf in leaves if compat.is_variable(leaf) or not compat.is_nnx_state(obj)}


def _path(keys: tuple[Any, ...]) -> Path:
    return tuple(map(plain_key, keys))


class Passed:
    """The NNX objects in the arguments of one traced call.

    Args:
      args: the positional arguments, as the function receives them.
      kwargs: the keyword arguments.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        leaves = jax.tree_util.tree_flatten_with_path((tuple(args), dict(kwargs)), is_leaf=holds_leaves)[0]
        self._objects = [(keys, leaf) for keys, leaf in leaves if holds_leaves(leaf)]
        self._number: dict[int, int] = {}
        if self._objects:
            self._number = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves((args, kwargs)))}
        # The leaves of each object by their keys, with what they hold, and as data: all of it from before the call.
        self._before = [
            {keys: (leaf, held_value(leaf), row_of(_path(keys), leaf)) for keys, leaf in _flat(obj).items()}
            for _, obj in self._objects
        ]
        # Set by `after`: leaves that were replaced, and those whose arrays the program must decide about.
        self.written: list[WrittenArgument] = []
        self.unclear: list[tuple[WrittenArgument, int]] = []

    @property
    def objects(self) -> list[Any]:
        """Returns the objects."""
        return [obj for _, obj in self._objects]

    @property
    def variables(self) -> list[tuple[Path, Any]]:
        """Returns the leaves, with their paths in their objects."""
        return [(_path(keys), leaf) for before in self._before for keys, (leaf, _, _) in before.items()]

    def after(self, out: Any) -> list[Any]:
        """Examines the objects after the call; returns the arrays of `unclear`, about which the program must decide.

        What the function returns is not lost, written or not.
        """
        self.written, self.unclear, arrays = [], [], []
        if not self._objects:
            return []
        returned = {id(leaf) for leaf in jax.tree.leaves(out, is_leaf=compat.is_variable) if compat.is_variable(leaf)}
        for (keys, obj), before in zip(self._objects, self._before, strict=True):
            now = _flat(obj)
            # Keys in (args, kwargs): which of the two, the argument's position or name, and the way inside it.
            write_to = functools.partial(WrittenArgument, plain_key(keys[1]), keys[2:], type(obj))
            for leaf_keys, (_, value, row) in before.items():
                leaf = now.pop(leaf_keys, None)
                if id(leaf) in returned:
                    continue
                old, new = arrays_of(value), None if leaf is None else arrays_of(held_value(leaf))
                note = _difference(old, new)
                write = write_to(dataclasses.replace(row, note=note))
                if note != _WRITTEN or new is None:
                    self.written.append(write)
                    continue
                # A new tracer may hold the same value (after nnx.jit, say): only the program knows.
                for old_array, array in zip(old[0], new[0], strict=True):
                    if array is not old_array:
                        self.unclear.append((write, self._number[id(old_array)]))
                        arrays.append(array)
            if not compat.is_nnx_state(obj):
                self.written += [
                    write_to(row_of(_path(leaf_keys), leaf, note="made"))
                    for leaf_keys, leaf in now.items()
                    if id(leaf) not in returned and (compat.is_variable(leaf) or is_array(leaf))
                ]
        return arrays

    def lost(self, is_written: Sequence[bool]) -> tuple[WrittenArgument, ...]:
        """Returns everything that is written, given for each array of `unclear` whether it is."""
        decided = [write for (write, _), written in zip(self.unclear, is_written, strict=True) if written]
        return tuple(dict.fromkeys([*self.written, *decided]))


_WRITTEN = "written"


def _difference(was: tuple[list[Any], Any], now: tuple[list[Any], Any] | None) -> str:
    """Returns how a leaf's structure, shape or dtype changed; `written` if at most the value did."""
    if now is None:
        return "removed"
    if now[1] != was[1] or list(map(spec_of, now[0])) != list(map(spec_of, was[0])):
        return "becomes a value of another shape, dtype or structure"
    return _WRITTEN


def plain_arguments(args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Returns a step's arguments with plain copies of the hijax Variables in them; None if there are none.

    A step only reads the objects among its arguments, and plain Variables are read alike in every trace.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    if not any(compat.is_hijax(leaf) for leaf in leaves):
        return None
    plain = [leaf.copy(hijax=False, ref=False) if compat.is_variable(leaf) else leaf for leaf in leaves]
    own_args, own_kwargs = jax.tree.unflatten(structure, plain)
    return own_args, own_kwargs


def check_foreign_objects(named: Iterator[tuple[str, Any]], step: str) -> None:
    """Checks that no argument holds an NNX object that JAX cannot flatten: one of `pytree=False`."""
    for name, value in named:
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, nnx.Pytree):
                raise StructureError(
                    f"The argument {name} of {step} holds a {type(leaf).__name__}, which is not a pytree: JAX cannot "
                    "pass it.",
                    hint=f"plan = kinds.plan(model, {name})  # as an additional object",
                )
