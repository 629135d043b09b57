"""Putting what a function made in a copy of an object into the object itself.

Functions are run on copies, rebuilt from arrays.  A new value goes back into the object's own Variable; but a function
may also make Variables, replace some, or make whole modules, dicts and lists of them.  `graft` takes such parts out of
the copy and puts them into the object at the same places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from statewise._src.common.paths import Path

__all__ = ["at", "graft"]

_MISSING = object()
_NODES = (nnx.Variable, nnx.Pytree, jax.Array)
_CHANGEABLE = (nnx.Pytree, Mapping, list)


def at(thing: Any, path: Path) -> Any:
    """Returns what is at a path of an object: an attribute, or an item."""
    for key in path:
        thing = _child(thing, key)
    return thing


def graft(thing: Any, copy: Any, paths: Iterable[Path]) -> None:
    """Puts what is at these paths of a copy at the same places of an object.

    Where an object on the way is not there, or cannot be changed (a tuple), the copy's takes its place.

    Args:
      thing: the object.
      copy: what was rebuilt from it; it has something at each path.
      paths: the paths of leaves.
    """
    roots = {_root(thing, copy, tuple(path)) for path in paths}
    # Within a list in the order of its items: what is new there is appended.
    for root in sorted(roots, key=lambda path: [(not isinstance(key, int), str(key).zfill(12)) for key in path]):
        if not any(root[:length] in roots for length in range(1, len(root))):
            _put(at(thing, root[:-1]), root[-1], at(copy, root))


def _root(thing: Any, copy: Any, path: Path) -> Path:
    """The shortest start of a path at which the object has to take over what the copy has."""
    for depth, key in enumerate(path):
        # The copy may have put another kind of thing there: a dict where a list was, a module where None was.
        if depth and (type(thing) is not type(copy) or not isinstance(thing, _CHANGEABLE)):
            return path[:depth]
        child = _child(thing, key)
        if child is _MISSING:
            return path[: depth + 1]
        thing, copy = child, _child(copy, key)
    return path


def _child(thing: Any, key: Any) -> Any:
    if isinstance(thing, Mapping | list | tuple | nnx.List):
        try:
            return thing[key]
        except (KeyError, IndexError):
            return _MISSING
    if isinstance(key, str):
        return getattr(thing, key, _MISSING)
    try:
        return thing[key]
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
        # A plain dict of Variables, or what takes the place of a None, is data to NNX only where one says so.
        plain = isinstance(part, _NODES) and isinstance(getattr(parent, key, part), _NODES)
        setattr(parent, key, part if plain else nnx.data(part))
