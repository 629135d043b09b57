"""Leaves nested by path, in the container in which NNX gives them: today `nnx.State`, later plain dicts.

`compat.state_type` says which of the two the installed Flax gives, and `nested` makes it; nothing else in Statewise
makes one.  What a user passes may be either, whatever Flax gives: both are mappings, `flat_items` reads both, and
`is_state` recognizes both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from statewise._src.common import compat
from statewise._src.common.paths import Path

__all__ = ["flat_items", "is_state", "nested"]


def nested(items: Iterable[tuple[Any, Any]], container: type | None = None) -> Any:
    """Returns leaves nested by their paths.

    Args:
      items: the leaves with their paths, which have at least one key.
      container: what to nest them in; by default what `nnx.state` returns.

    Example:
      >>> from statewise._src.common.nested_state import nested
      >>> nested([(("layers", 0, "bias"), 1), (("layers", 1, "bias"), 2)], dict)
      {'layers': {0: {'bias': 1}, 1: {'bias': 2}}}
    """
    root: dict[Any, Any] = {}
    for path, leaf in items:
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    container = compat.state_type() if container is None else container
    # An nnx.State is one only at its root: the levels below are plain dicts, which it wraps when they are read.
    return root if container is dict else container(root)


def flat_items(state: Mapping[Any, Any]) -> Iterator[tuple[Path, Any]]:
    """Yields the leaves of a nested state, each with its path.

    Example:
      >>> from statewise._src.common.nested_state import flat_items
      >>> list(flat_items({"layers": {0: {"bias": 1}}}))
      [(('layers', 0, 'bias'), 1)]
    """
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from (((key, *path), leaf) for path, leaf in flat_items(value))
        else:
            yield (key,), value


def is_state(value: object) -> bool:
    """Returns whether a value is what `nnx.state` returns: an `nnx.State`, or nested dicts of Variables alone.

    Example:
      >>> from flax import nnx
      >>> from statewise._src.common.nested_state import is_state
      >>> is_state({"layers": {0: nnx.Param(1.0)}}), is_state({"x": 1.0}), is_state({})
      (True, False, False)
    """
    if compat.is_nnx_state(value):
        return True
    # Most dicts are something else, and their first item says so.
    return (
        type(value) is dict
        and bool(value)
        and all(compat.is_variable(item) or is_state(item) for item in value.values())
    )
