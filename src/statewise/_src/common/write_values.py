"""Writing values into live objects: all of them, or none.

A Variable takes a new value in place.  A raw array is an item of a container, and what a container allows differs: an
attribute, a list and a dict are assigned to; a tuple, a named tuple and a frozen dataclass are built anew around the
new array, and take the old one's place in what holds them.

Everything that can be refused is refused before the first write: new containers are made, and compared with the old
ones, ahead of it.  What cannot be foreseen (a setter of the user's that raises, an interruption) is taken back.
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
from statewise._src.common.nnx_graph import is_array, raw_value, row_of
from statewise._src.common.paths import Leaf, Path, format_path
from statewise.errors import StructureError

__all__ = ["Objects", "put_values"]

_MEND = "hold it in an nnx.Variable, or in an nnx.List or nnx.Dict"


class Objects(dict[Any, Any]):
    """Several objects by name, which only the caller holds: what stands in their places is not to be replaced."""


def put_values(root: Any, leaves: Iterable[Any], writes: Sequence[tuple[Path, Any, Any]]) -> None:
    """Writes values into live objects, all of them or none.

    Args:
      root: what the paths begin at: an object, or several: a tuple of them, or `Objects` by name.
      leaves: the live leaves of all there is; Variables among them are as before if anything fails.
      writes: the path, the live leaf, and its new value.

    Raises:
      StructureError: raw arrays that cannot be replaced where they stand, all of them; nothing is written then.
    """
    variables = [(leaf, value) for _, leaf, value in writes if compat.is_variable(leaf)]
    wanted: dict[Any, Any] = {}
    raw: list[tuple[Path, Any]] = []
    for path, leaf, value in writes:
        if not compat.is_variable(leaf) and leaf is not value:
            raw.append((path, leaf))
            _branch(wanted, path[:-1])[path[-1]] = _Value(path, leaf, value)
    assignments = _assignments(root, wanted, raw) if raw else []
    _write(variables, assignments, leaves)


@dataclasses.dataclass(frozen=True, slots=True)
class _Value:
    """What is to stand in the place of a raw array."""

    path: Path
    leaf: Any
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class _Assignment:
    """One item of a container that can be assigned to."""

    node: Any
    key: Any
    value: Any
    holds: tuple[_Value, ...]  # the raw arrays that are in the value

    def run(self) -> None:
        if isinstance(self.node, nnx.Pytree):
            setattr(self.node, str(self.key), self.value)  # an nnx.List has its items as attributes
        else:
            self.node[self.key] = self.value

    def stands(self) -> bool:
        """Whether the container holds just that: a setter of the user's may have stored something else."""
        return _children(self.node).get(self.key) is self.value


def _branch(tree: dict[Any, Any], path: Path) -> dict[Any, Any]:
    for key in path:
        tree = tree.setdefault(key, {})
    return tree


# --- before anything is written ----------------------------------------------------------------------------------


class _Stuck(Exception):
    """A container that can neither be assigned to nor be built anew."""


def _assignments(root: Any, wanted: Mapping[Any, Any], raw: Sequence[tuple[Path, Any]]) -> list[_Assignment]:
    """What to assign to which container; every raw array for which there is no such way is listed."""
    made: list[_Assignment] = []
    stuck: dict[Path, str] = {}

    def replaced(node: Any, tree: Mapping[Any, Any]) -> Any:
        """What is to stand in a container's place: itself, or one built anew."""
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
            made.extend(_Assignment(node, key, value, _values(tree[key])) for key, value in new.items())
            return node
        try:
            return _rebuilt(node, new)
        except _Stuck as error:
            stuck.update((each.path, str(error)) for key in new for each in _values(tree[key]))
            return node

    if replaced(root, wanted) is not root:
        outermost = [path for path, _ in raw if _is_immutable_throughout(root, path)]
        stuck.update((path, f"{_outermost(root, path)} that nothing holds") for path in outermost)
    if stuck:
        rows = [row_of(path, leaf, note=stuck[path]) for path, leaf in raw if path in stuck]
        raise StructureError("Arrays cannot be replaced where they stand.", leaves=rows, hint=_MEND)
    return _told_apart(made)


def _told_apart(made: Sequence[_Assignment]) -> list[_Assignment]:
    """Each item once: a list that is reached by two paths has one place for two arrays, which must be equal."""
    places: dict[tuple[int, Any], _Assignment] = {}
    odd: list[Leaf] = []
    for one in made:
        first = places.setdefault((id(one.node), one.key), one)
        if first is not one and not _equal(first.value, one.value):
            others = " and ".join(format_path(each.path) for each in first.holds)
            odd += [row_of(each.path, each.leaf, note=f"the same place as {others}") for each in one.holds]
    if odd:
        raise StructureError(
            "A container is reached by several paths, and would have to hold another array for each.",
            leaves=odd,
            hint="hold the array in an nnx.Variable, which is one leaf however many paths lead to it",
        )
    return list(places.values())


def _equal(one: Any, other: Any) -> bool:
    mine, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
    same: Any = mine[1]
    return bool(same == theirs[1]) and all(map(_same_bits, mine[0], theirs[0]))


def _same_bits(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if any(isinstance(array, compat.Tracer | jax.ShapeDtypeStruct) for array in (one, other)):
        return False
    mine, theirs = (
        np.asarray(jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.extended) else array)
        for array in (one, other)
    )
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes()


def _values(branch: Any) -> tuple[_Value, ...]:
    """All raw arrays below a container that are to be replaced."""
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
    """The outermost container that the user made: several objects come in one of ours."""
    below = _children(root)[path[0]]
    if is_array(below) and isinstance(root, Objects):
        return "is an object of its own"
    return f"stands in a {type(root if is_array(below) else below).__name__}"


def _children(node: Any) -> dict[Any, Any]:
    """What a container holds, by NNX's keys."""
    if isinstance(node, nnx.Pytree):
        attributes = vars(node)
        return {**attributes, **{int(name): item for name, item in attributes.items() if name.isdecimal()}}
    if isinstance(node, nnx.State):
        return dict(node.raw_mapping)
    if isinstance(node, dict):
        return dict(node)
    return dict(_keyed(node)[0])


def _keyed(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """The children of a pytree with their keys, in JAX's order, and its structure."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda thing: thing is not node)
    return [(_plain_key(keys[0]), child) for keys, child in keyed], structure


def _plain_key(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def _is_assigned_to(node: Any, new: Mapping[Any, Any], children: Mapping[Any, Any]) -> bool:
    if isinstance(node, nnx.Pytree | list):
        return True
    # A type of the user's may call something else an item than what JAX sees.
    return isinstance(node, nnx.State) or (
        isinstance(node, MutableMapping) and all(node.get(key) is children[key] for key in new)
    )


def _rebuilt(node: Any, new: Mapping[Any, Any]) -> Any:
    """A container with other items; what its type makes of them must be just these."""
    keyed, structure = _keyed(node)
    wanted = [new.get(key, child) for key, child in keyed]
    try:
        made = jax.tree.unflatten(structure, wanted)
        now = _keyed(made)[0]
    except Exception as error:  # a user's own type raises what it likes
        raise _Stuck(f"stands in a {type(node).__name__}, which cannot be made anew: {error}") from error
    same = type(made) is type(node) and [key for key, _ in now] == [key for key, _ in keyed]
    if not same or any(have is not want for (_, have), want in zip(now, wanted, strict=True)):
        raise _Stuck(f"stands in a {type(node).__name__}, which makes something else of its items")
    return made


# --- writing -----------------------------------------------------------------------------------------------------


def _write(variables: Sequence[tuple[Any, Any]], assignments: Sequence[_Assignment], leaves: Iterable[Any]) -> None:
    """Writes, or takes back what was written and fails."""
    # All of it is known before the first write: an interruption may come between any two lines.
    live = {id(leaf): leaf for leaf in (*leaves, *(leaf for leaf, _ in variables)) if compat.is_variable(leaf)}
    undo = [_undo_variable(leaf) for leaf in live.values()]
    undo += [_undo_container(one.node) for one in {id(one.node): one for one in assignments}.values()]
    try:
        for one in assignments:
            one.run()
        odd = [one for one in assignments if not one.stands()]
        if odd:
            raise StructureError(
                "A setter of the model stored something else than the array that it was given.",
                leaves=[row_of(each.path, each.leaf) for one in odd for each in one.holds],
                hint=_MEND,
            )
        for leaf, value in variables:
            if raw_value(leaf) is not value:
                leaf.set_raw_value(value)
    except BaseException:
        for back in undo:
            back()
        raise


def _undo_variable(leaf: Any) -> Callable[[], None]:
    before = raw_value(leaf)

    def back() -> None:
        if raw_value(leaf) is not before:
            leaf.set_raw_value(before)

    return back


def _undo_container(node: Any) -> Callable[[], None]:
    held = vars(node) if isinstance(node, nnx.Pytree) else node
    if isinstance(held, list):
        items = list(held)

        def back() -> None:
            held[:] = items

        return back
    before = dict(held.raw_mapping if isinstance(held, nnx.State) else held)

    def restore() -> None:
        for key in [key for key in held if key not in before]:
            del held[key]
        for key, value in before.items():
            held[key] = value

    return restore
