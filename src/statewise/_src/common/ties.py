"""The other paths of leaves that several paths reach: tied weights, and whatever hangs below shared modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx

from statewise._src.common.nnx_graph import named, rebuild
from statewise._src.common.paths import Path

__all__ = ["aliases_of"]


def aliases_of(
    graphdef: Any, paths: Sequence[Path], several: bool, names: Sequence[str] = ()
) -> dict[Path, tuple[Path, ...]]:
    """The other paths of each leaf that has several: its own, and those of modules that are shared above it.

    Args:
      graphdef: the graph definition.
      paths: the leaves' first paths.
      several: whether it is of a tuple of objects.
      names: the objects' names, with which the paths then begin.
    """
    # Looking for them takes as long as flattening, and few models have any; the graph says whether.
    if not any(type(node).__name__ == "NodeRef" for node in graphdef.nodes):
        return {}
    objects = rebuild(graphdef, [None] * len(paths), several)
    found_twice = nnx.find_duplicates(objects if several else objects[0])
    groups = ([named(tuple(path), names) for path in ways] for ways in found_twice)
    shared = [group for group in groups if not _cyclic(group)]
    if not shared:
        return {}
    found: dict[Path, tuple[Path, ...]] = {}
    for first in paths:
        ways = {first}
        grew = True
        while grew:  # a shared leaf inside a shared module has the product of their paths
            more = {
                other + way[len(prefix) :]
                for way in ways
                for group in shared
                for prefix in group
                if way[: len(prefix)] == prefix
                for other in group
            }
            grew = not more <= ways
            ways |= more
        if len(ways) > 1:
            found[first] = tuple(sorted(ways - {first}, key=lambda path: [str(key) for key in path]))
    return found


def _cyclic(paths: Sequence[Path]) -> bool:
    """Whether an object can be reached from itself (a child that knows its parent): paths without end."""
    return any(one != other and other[: len(one)] == one for one in paths for other in paths)
