"""Moves what a function made in a copy of an object into the object itself.

Functions run on copies, rebuilt from arrays.  A new value is written to the object's own Variable; but a function may
also make Variables, replace some, or make modules, dicts and lists of them.  `graft` takes such parts out of the copy
and puts them at the same paths of the object.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from statewise._src.common.paths import Path

__all__ = ["graft", "part_at"]

_MISSING = object()
_NODES = (nnx.Variable, nnx.Pytree, jax.Array)
_CHANGEABLE = (nnx.Pytree, Mapping, list)


def part_at(target: Any, path: Path) -> Any:
    """Returns what is at a path of an object: an attribute or an item."""
    return functools.reduce(_child, path, target)


def graft(target: Any, copy: Any, paths: Iterable[Path]) -> None:
    """Moves what is at these paths of a copy to the same paths of an object.

    If an object on the way is missing or cannot be changed (a tuple), the copy's object replaces it.

    Args:
      target: the object.
      copy: the object rebuilt from it; it has a value at each path.
      paths: the paths of leaves.
    """
    roots = {_root(target, copy, tuple(path)) for path in paths}
    # Items of a list in the order of their numbers, as new ones are appended; hence the zeros before short ones.
    for root in sorted(roots, key=lambda path: [(not isinstance(key, int), str(key).zfill(12)) for key in path]):
        # What is inside of another part that moves moves with it.
        if not any(root[:length] in roots for length in range(1, len(root))):
            _put(part_at(target, root[:-1]), root[-1], part_at(copy, root))


def _root(target: Any, copy: Any, path: Path) -> Path:
    """Returns the shortest prefix of a path at which the object must take over the copy's value."""
    for depth, key in enumerate(path):
        # The copy may hold another type there: a dict where a list was, a module where None was.
        if depth and (type(target) is not type(copy) or not isinstance(target, _CHANGEABLE)):
            return path[:depth]
        child = _child(target, key)
        if child is _MISSING:
            return path[: depth + 1]
        target, copy = child, _child(copy, key)
    return path


def _child(target: Any, key: Any) -> Any:
    if isinstance(key, str) and not isinstance(target, Mapping | list | tuple | nnx.List):
        return getattr(target, key, _MISSING)
    try:
        return target[key]
    except (TypeError, KeyError, IndexError):
        return _MISSING


def _put(parent: Any, key: Any, part: Any) -> None:
    if isinstance(parent, list | nnx.List):
        if key < len(parent):
            parent[key] = part
        else:
            parent.append(part)
    elif isinstance(parent, Mapping) and not isinstance(parent, nnx.Pytree):
        parent[key] = part  # type: ignore[index]
    else:
        # NNX takes a plain dict of Variables, or a value that replaces None, for data only if it is marked as such.
        plain = isinstance(part, _NODES) and isinstance(getattr(parent, key, part), _NODES)
        setattr(parent, key, part if plain else nnx.data(part))
