"""The index of a plan's arrays: where each array is in a state, what it belongs to, and how it is stored.

`tables.arrays[number]` is an array by its number: kind by kind, and within a kind in the order of the plan.  Its
*position* counts the arrays of the kind, its *slot* what a state stores of the kind.  Without packing the two are
equal; a packed part stores several arrays in one buffer, which is one slot.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
from collections.abc import Sequence
from typing import Any, NamedTuple

from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.paths import Leaf
from statewise._src.plan.derived import Derived
from statewise._src.plan.members import Axis
from statewise._src.plan.packing import PackedBuffer

__all__ = ["ArrayInfo", "DerivedArrays", "Slot", "Spot", "numbers_of"]

# The name of a kind, and a slot of its part.
Spot = tuple[str, int]


class ArrayInfo(NamedTuple):
    """One array of a state.

    Attributes:
      number: its index among all arrays of the plan.
      kind: the name of its kind.
      position: its index among the arrays of the kind.
      slot: the slot of the kind's part that stores it.
      buffer: the buffer in that slot; None if the array is stored alone.
      leaf: the leaf that it belongs to.
      spec: its shape and dtype; in the plan of an ensemble, those of all members together.
      held: its shape and dtype in a state, which include the leading axis of an array that is stored per device.
      derived: what derives it, such as an optimizer; None for an array of the model.
      devices: the number of devices that have a value of their own; 0 if there is one value for all.
      axis: the axis of an ensemble's members; None if it has none.
    """

    number: int
    kind: str
    position: int
    slot: int
    buffer: PackedBuffer | None
    leaf: Leaf
    spec: ArraySpec
    held: ArraySpec
    derived: Derived | None
    devices: int
    axis: Axis


class Slot(NamedTuple):
    """The content of one slot of a kind's part: one array, or a buffer of several.

    Attributes:
      kind: the name of the kind.
      position: its index in the kind's part.
      arrays: the arrays that it stores, in the order of the buffer.
      buffer: the buffer that holds them; None for an array that is stored alone.
      leaf: the leaf that is stored here; for a buffer, a leaf that is named for its content.
      spec: the stored shape and dtype.
    """

    kind: str
    position: int
    arrays: tuple[ArrayInfo, ...]
    buffer: PackedBuffer | None
    leaf: Leaf
    spec: ArraySpec

    @property
    def axis(self) -> Axis:
        """Returns the axis of an ensemble's members, which the arrays of a buffer share; None if it has none."""
        return self.arrays[0].axis

    @property
    def spot(self) -> Spot:
        """Returns the name of its kind, and its index in the kind's part."""
        return self.kind, self.position

    @property
    def numbers(self) -> tuple[int, ...]:
        """Returns the numbers of its arrays."""
        return numbers_of(self.arrays)


class DerivedArrays(NamedTuple):
    """An optimizer, an average or the like, with its own arrays and the arrays that it is derived from.

    Attributes:
      derived: the optimizer, the average, or the like.
      order: its index in `tables.derived`.
      start: the position of its first array in its kind.
      arrays: its arrays.
      sources: the arrays that it is derived from, in its order.
    """

    derived: Any
    order: int
    start: int
    arrays: tuple[ArrayInfo, ...]
    sources: tuple[ArrayInfo, ...]

    @property
    def stop(self) -> int:
        """Returns the position after its last array."""
        return self.start + len(self.arrays)


def numbers_of(arrays: Sequence[ArrayInfo]) -> tuple[int, ...]:
    """Returns the numbers of some arrays."""
    return tuple(array.number for array in arrays)
