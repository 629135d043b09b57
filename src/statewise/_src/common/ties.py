"""The other paths of leaves that several paths reach: tied weights, and everything below shared modules."""

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
    """Returns the other paths of each leaf that has several: its own, and those through shared modules above it.

    Args:
      graphdef: the graph definition.
      paths: the leaves' first paths.
      several: whether the graph definition is of a tuple of objects.
      names: the objects' names, with which the paths start.
    """
    # Finding duplicates takes as long as flattening, and few models have any; the graph definition shows whether.
    if not any(type(node).__name__ == "NodeRef" for node in graphdef.nodes):
        return {}
    objects = rebuild(graphdef, [None] * len(paths), several)
    duplicates = nnx.find_duplicates(objects if several else objects[0])
    groups = ([named(tuple(path), names) for path in paths_of_one] for paths_of_one in duplicates)
    shared = [group for group in groups if not _cyclic(group)]
    if not shared:
        return {}
    aliases: dict[Path, tuple[Path, ...]] = {}
    for first in paths:
        ways = {first}
        grew = True
        # Replace shared prefixes until nothing is new: a shared leaf in a shared module has the product of their paths.
        while grew:
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
            aliases[first] = tuple(sorted(ways - {first}, key=lambda path: [str(key) for key in path]))
    return aliases


def _cyclic(paths: Sequence[Path]) -> bool:
    """Returns whether an object contains itself (a child that knows its parent), which gives infinitely many paths."""
    return any(path != other and other[: len(path)] == path for path in paths for other in paths)
