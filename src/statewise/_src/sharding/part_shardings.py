"""The shardings of the arrays in a state's parts, determined once for each part.

Left to itself, XLA chooses the layout of a compiled function's results.  The arrays that a step writes must keep
exactly the shardings that they had, so a step is compiled for these.  The part that such a step returns has the
shardings of the part before it, so no call has to inspect arrays one by one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import jax

from statewise._src.common import compat

__all__ = ["UNKNOWN", "PartShardings", "is_on_one_device", "part_shardings_of"]


class PartShardings:
    """The shardings of some arrays; equal ones are one object, so comparing them is free.

    Attributes:
      shardings: of each array, in order; None for one that is not on a mesh.
      whole: whether all of them are on a mesh.
    """

    __slots__ = ("__weakref__", "shardings", "whole")

    def __init__(self, shardings: tuple[Any, ...]) -> None:
        self.shardings = shardings
        self.whole = None not in shardings


# The shardings of a part whose arrays were not inspected yet.
UNKNOWN: Any = PartShardings(())

# By value, weakly: equal shardings stay one object as long as a part, or a compiled step, refers to it.
_known: weakref.WeakValueDictionary[tuple[Any, ...], PartShardings] = weakref.WeakValueDictionary()


def part_shardings_of(arrays: Sequence[Any]) -> PartShardings | None:
    """Returns the shardings of arrays on a mesh; None if none is on a mesh, or if they are being traced."""
    shardings = tuple(map(_sharding, arrays))
    if not any(shardings):
        return None
    return _known.setdefault(shardings, PartShardings(shardings))


def _sharding(array: object) -> jax.NamedSharding | None:
    sharding = None if isinstance(array, compat.Tracer) else getattr(array, "sharding", None)
    on_mesh = isinstance(sharding, jax.NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh)
    return sharding if on_mesh else None


def is_on_one_device(array: object) -> bool:
    """Returns whether an array is known to be on one device, not on a mesh, as then all of a function's results are."""
    return isinstance(array, jax.Array) and isinstance(array.sharding, jax.sharding.SingleDeviceSharding)
