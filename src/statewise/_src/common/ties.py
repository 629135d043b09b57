"""The other paths of leaves that several paths reach: tied weights, and everything below shared modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx

from statewise._src.common.graphdef import is_tree
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
    if is_tree(graphdef):
        return {}
    objects = rebuild(graphdef, [None] * len(paths), several)
    duplicates = nnx.find_duplicates(objects if several else objects[0])
    groups = ([named(tuple(path), names) for path in paths_of_one] for paths_of_one in duplicates)
    shared = [group for group in groups if not _cyclic(group)]
    if not shared:
        return {}
    by_prefix: dict[Path, list[list[Path]]] = {}
    for group in shared:
        for prefix in group:
            by_prefix.setdefault(prefix, []).append(group)
    aliases: dict[Path, tuple[Path, ...]] = {}
    for first in paths:
        ways, new = {first}, {first}
        while new:  # a shared leaf inside a shared module has the product of their paths
            new = {
                other + way[length:]
                for way in new
                for length in range(len(way) + 1)
                for group in by_prefix.get(way[:length], ())
                for other in group
            } - ways
            ways |= new
        if len(ways) > 1:
            aliases[first] = tuple(sorted(ways - {first}, key=lambda path: [str(key) for key in path]))
    return aliases


def _cyclic(paths: Sequence[Path]) -> bool:
    """Returns whether an object contains itself (a child that knows its parent), which gives infinitely many paths."""
    known = set(paths)
    return any(path[:length] in known for path in paths for length in range(len(path)))
