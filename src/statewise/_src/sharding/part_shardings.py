"""Where the arrays of a state's parts lie, told once for each part.

Left to itself XLA lays out what a compiled function returns as it likes.  The arrays that a step writes are to leave
with the very shardings that they came in with, so a step is compiled for the places of what it writes.  A part that
comes out of such a step lies where the one before it lay: nothing is looked at array by array from call to call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import jax

from statewise._src.common import compat

__all__ = ["UNKNOWN", "PartShardings", "lies_on_one_device", "part_shardings_of"]


class PartShardings:
    """The shardings of some arrays; equal ones are one object, so that comparing two costs nothing.

    Attributes:
      shardings: of each array, in order; None for one that lies on no mesh.
      whole: whether all lie on a mesh.
    """

    __slots__ = ("__weakref__", "shardings", "whole")

    def __init__(self, shardings: tuple[Any, ...]) -> None:
        self.shardings = shardings
        self.whole = None not in shardings


# Of a part whose arrays nobody has looked at yet.
UNKNOWN: Any = PartShardings(())

_known: weakref.WeakValueDictionary[tuple[Any, ...], PartShardings] = weakref.WeakValueDictionary()


def part_shardings_of(arrays: Sequence[Any]) -> PartShardings | None:
    """Where arrays lie on a mesh; None where none does, or where they are being traced."""
    shardings = tuple(map(_sharding, arrays))
    if not any(shardings):
        return None
    made = PartShardings(shardings)
    return _known.setdefault(shardings, made)


def _sharding(array: Any) -> jax.NamedSharding | None:
    if isinstance(array, compat.Tracer):
        return None
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
        return sharding
    return None


def lies_on_one_device(array: Any) -> bool:
    """Whether an array is known to lie on one device and no mesh; what one function returns lies so, or none of it."""
    return isinstance(array, jax.Array) and isinstance(array.sharding, jax.sharding.SingleDeviceSharding)
