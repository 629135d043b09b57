"""Writes values into live objects: all of them, or none.

A Variable takes a new value in place.  A raw array is an item of a container, and containers differ: an attribute, a
list and a dict can be assigned to; a tuple, a named tuple and a frozen dataclass are rebuilt around the new array, and
replace the old one in its own container.

Everything that can be checked is checked before the first write: new containers are made, and compared with the old
ones, ahead of it.  After what cannot be foreseen (a user's setter that raises, an interrupt) the writes are undone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import is_array, is_traced, row_of, value_in
from statewise._src.common.paths import Path, format_path, plain_key
from statewise._src.common.problems import Problems
from statewise._src.common.variable_forms import store, write_reference
from statewise.errors import StructureError

__all__ = ["Objects", "put_values"]

_HINT = "hold it in an nnx.Variable, or in an nnx.List or nnx.Dict"


class Objects(dict[Any, Any]):
    """Several objects by name, held only by the caller: the objects themselves cannot be replaced."""


def put_values(root: Any, leaves: Iterable[Any], writes: Sequence[tuple[Path, Any, Any]]) -> None:
    """Writes values into live objects, all of them or none.

    Args:
      root: the object that the paths start at, or several: a tuple of them, or `Objects` by name.
      leaves: all live leaves; the Variables among them are restored if anything fails.
      writes: the path, the live leaf, and its new value.

    Raises:
      StructureError: raw arrays that cannot be replaced where they are, all of them; nothing was written.
    """
    variables: list[tuple[Any, Any]] = []
    wanted: dict[Any, Any] = {}
    raw: list[tuple[Path, Any]] = []
    for path, leaf, value in writes:
        if compat.is_variable(leaf):
            variables.append((leaf, value))
        elif leaf is not value:
            raw.append((path, leaf))
            _branch(wanted, path[:-1])[path[-1]] = _Value(path, leaf, value)
    assignments = _assignments(root, wanted, raw) if raw else []
    _write(variables, assignments, leaves)


@dataclasses.dataclass(frozen=True, slots=True)
class _Value:
    """The new value of a raw array."""

    path: Path
    leaf: Any
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class _Assignment:
    """One item of a container that can be assigned to."""

    node: Any
    key: Any
    value: Any
    holds: tuple[_Value, ...]  # the new raw arrays in the value

    def run(self) -> None:
        if isinstance(self.node, nnx.Pytree):
            setattr(self.node, str(self.key), self.value)  # an nnx.List stores its items as attributes
        else:
            self.node[self.key] = self.value

    def is_done(self) -> bool:
        """Returns whether the container holds exactly the value: a user's setter may have stored something else."""
        return _children(self.node).get(self.key) is self.value


def _branch(tree: dict[Any, Any], path: Path) -> dict[Any, Any]:
    for key in path:
        tree = tree.setdefault(key, {})
    return tree


# --- before anything is written ----------------------------------------------------------------------------------


class _Stuck(Exception):
    """Raised for a container that can neither be assigned to nor rebuilt."""


def _assignments(root: Any, wanted: Mapping[Any, Any], raw: Sequence[tuple[Path, Any]]) -> list[_Assignment]:
    """Returns the assignments to containers; lists every raw array for which there is none."""
    assignments: list[_Assignment] = []
    stuck: dict[Path, str] = {}

    def replaced(node: Any, tree: Mapping[Any, Any]) -> Any:
        """Returns what replaces a container: itself, or a rebuilt one."""
        # Depth first: a container that was rebuilt is a new item of the container around it.
        children = _children(node)
        new: dict[Any, Any] = {}
        for key, branch in tree.items():
            value = branch.value if isinstance(branch, _Value) else replaced(children[key], branch)
            if value is not children[key]:
                new[key] = value
        if not new:
            return node
        if isinstance(node, Objects):
            return Objects(node | new)
        if _is_assigned_to(node, new, children):
            assignments.extend(_Assignment(node, key, value, _values(tree[key])) for key, value in new.items())
            return node
        try:
            return _rebuilt(node, new)
        except _Stuck as error:
            stuck.update((each.path, str(error)) for key in new for each in _values(tree[key]))
            return node

    # Nothing of the user's holds the root itself, so a rebuilt root would be lost.
    if replaced(root, wanted) is not root:
        outermost = [path for path, _ in raw if _is_immutable_throughout(root, path)]
        stuck.update((path, f"{_outermost(root, path)} that nothing holds") for path in outermost)
    problems = Problems(row_of(path, leaf, note=stuck[path]) for path, leaf in raw if path in stuck)
    problems.raise_as(StructureError, "Arrays cannot be replaced where they are.", _HINT)
    return _without_duplicates(assignments)


def _without_duplicates(assignments: Sequence[_Assignment]) -> list[_Assignment]:
    """Returns each assignment once: a list with two paths has one item for two arrays, which must be equal."""
    first_of: dict[tuple[int, Any], _Assignment] = {}
    conflicts = Problems()
    for assignment in assignments:
        first = first_of.setdefault((id(assignment.node), assignment.key), assignment)
        if first is not assignment and not _equal(first.value, assignment.value):
            others = " and ".join(format_path(each.path) for each in first.holds)
            for each in assignment.holds:
                conflicts.add(row_of(each.path, each.leaf), f"the same item as {others}")
    conflicts.raise_as(
        StructureError,
        "Several paths reach one container, which would have to hold a different array for each.",
        "hold the array in an nnx.Variable, which is one leaf however many paths reach it",
    )
    return list(first_of.values())


def _equal(value: Any, other: Any) -> bool:
    (arrays, structure), (others, other_structure) = jax.tree.flatten(value), jax.tree.flatten(other)
    same: Any = structure
    return bool(same == other_structure) and all(map(_same_bits, arrays, others))


def _same_bits(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if any(isinstance(array, compat.Tracer | jax.ShapeDtypeStruct) for array in (value, other)):
        return False
    left, right = (
        np.asarray(jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.extended) else array)
        for array in (value, other)
    )
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _values(branch: Any) -> tuple[_Value, ...]:
    """Returns all the new raw arrays below a container."""
    if isinstance(branch, _Value):
        return (branch,)
    return tuple(value for each in branch.values() for value in _values(each))


def _is_immutable_throughout(root: Any, path: Path) -> bool:
    node = root
    for key in path:
        if isinstance(node, nnx.Pytree | list | MutableMapping) and not isinstance(node, Objects):
            return False
        node = _children(node)[key]
    return True


def _outermost(root: Any, path: Path) -> str:
    """Describes the outermost container of the user's: several objects are in one of ours."""
    below = _children(root)[path[0]]
    if is_array(below) and isinstance(root, Objects):
        return "is an object by itself"
    return f"is in a {type(root if is_array(below) else below).__name__}"


def _children(node: Any) -> dict[Any, Any]:
    """Returns the children of a container, by NNX's keys."""
    if isinstance(node, nnx.Pytree):
        # An nnx.List stores its items as attributes named "0", "1" ..., but their keys in paths are integers.
        attributes = vars(node)
        return {**attributes, **{int(name): item for name, item in attributes.items() if name.isdecimal()}}
    if compat.is_nnx_state(node):
        return dict(node.raw_mapping)
    if isinstance(node, dict):
        return dict(node)
    return dict(_keyed(node)[0])


def _keyed(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns the children of a pytree with their keys, in JAX's order, and its structure."""
    # One level only: everything except the node itself counts as a leaf.
    keyed, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return [(plain_key(keys[0]), child) for keys, child in keyed], structure


def _is_assigned_to(node: Any, new: Mapping[Any, Any], children: Mapping[Any, Any]) -> bool:
    if isinstance(node, nnx.Pytree | list):
        return True
    # In a user's own type, items may differ from the children that JAX sees.
    return compat.is_nnx_state(node) or (
        isinstance(node, MutableMapping) and all(node.get(key) is children[key] for key in new)
    )


def _rebuilt(node: Any, new: Mapping[Any, Any]) -> Any:
    """Rebuilds a container with other items; checks that its type keeps exactly these."""
    keyed, structure = _keyed(node)
    wanted = [new.get(key, child) for key, child in keyed]
    try:
        rebuilt = jax.tree.unflatten(structure, wanted)
        now = _keyed(rebuilt)[0]
    except Exception as error:  # a user's own type may raise anything
        raise _Stuck(f"is in a {type(node).__name__}, which cannot be rebuilt: {error}") from error
    same = type(rebuilt) is type(node) and [key for key, _ in now] == [key for key, _ in keyed]
    if not same or any(have is not want for (_, have), want in zip(now, wanted, strict=True)):
        raise _Stuck(f"is in a {type(node).__name__}, which changes its items")
    return rebuilt


# --- writing -----------------------------------------------------------------------------------------------------


def _write(variables: Sequence[tuple[Any, Any]], assignments: Sequence[_Assignment], leaves: Iterable[Any]) -> None:
    """Writes everything; if that fails, undoes what was written."""
    # All undo steps are prepared before the first write: an interrupt may come between any two lines.
    # All Variables, not only the written ones: a user's setter may change others.
    live = {id(leaf): leaf for leaf in leaves if compat.is_variable(leaf)} | {id(leaf): leaf for leaf, _ in variables}
    before = [(leaf, leaf.get_raw_value(), value_in(leaf)) for leaf in live.values()]
    undo = [_undo_container(node) for node in {id(each.node): each.node for each in assignments}.values()]
    try:
        for assignment in assignments:
            assignment.run()
        failed = [each for assignment in assignments if not assignment.is_done() for each in assignment.holds]
        problems = Problems(row_of(each.path, each.leaf) for each in failed)
        problems.raise_as(
            StructureError, "A setter of the model stored something other than the array that it received.", _HINT
        )
        _set_values(variables)
    except BaseException:
        for leaf, held, value in before:
            _restore_variable(leaf, held, value)
        for back in undo:
            back()
        raise


def _is_never_written(leaf: Any, value: Any) -> bool:
    """Returns whether Flax refuses every write of a Variable: a hijax one in a trace, where it reads as a new value."""
    return is_traced(jax.tree.leaves(value)) and compat.is_hijax(leaf)


def _set_values(variables: Iterable[tuple[Any, Any]]) -> None:
    for leaf, value in variables:
        if leaf.get_raw_value() is not value:
            store(leaf, value)


def _restore_variable(variable: Any, held: Any, value: Any) -> None:
    """Gives a Variable back what it held; if that is a reference, also the reference its array."""
    if variable.get_raw_value() is not held and not _is_never_written(variable, held):
        variable.set_raw_value(held)
    if isinstance(held, jax.Ref):
        write_reference(held, value)


def _undo_container(node: Any) -> Callable[[], None]:
    held: Any = vars(node) if isinstance(node, nnx.Pytree) else node
    before = list(held) if isinstance(held, list) else dict(held.raw_mapping if compat.is_nnx_state(held) else held)

    def back() -> None:
        if isinstance(before, list):
            held[:] = before
            return
        for key in [key for key in held if key not in before]:
            del held[key]
        for key, value in before.items():
            held[key] = value

    return back
