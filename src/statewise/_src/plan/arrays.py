"""The index of a plan's arrays: where each one is in a state, what it belongs to, and what it is stored with.

`tables.arrays[number]` is an array by its number: kind by kind, and within a kind in the order of the plan.  Its
*position* counts within the kind, its *slot* within what a state stores of the kind.  Without packing the two are the
same; a packed part stores several arrays in one buffer, which is one slot.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

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
      number: its place among all arrays of the plan.
      kind: the name of its kind.
      position: its place among the arrays of the kind.
      slot: the slot of the kind's part that it is stored in.
      buffer: the buffer in that slot; None where the array is stored alone.
      leaf: the leaf that it belongs to.
      spec: its shape and dtype, those of all members in the plan of an ensemble.
      held: the same as a state holds it, with the leading axis of what is stored per device.
      derived: what it is derived with, such as an optimizer; None for an array of the model.
      devices: how many devices have a value of their own; 0 where there is one value for all.
      axis: the axis of an ensemble's members; None where there is none.
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
    """What a state stores in one slot of a kind's part: one array, or a buffer of several.

    Attributes:
      kind: the name of the kind.
      position: its place in the kind's part.
      arrays: the arrays that are stored there, in their order.
      buffer: the buffer that holds them; None for an array that is stored alone.
    """

    kind: str
    position: int
    arrays: tuple[ArrayInfo, ...]
    buffer: PackedBuffer | None

    @property
    def spot(self) -> Spot:
        """Its kind, and its place in the kind's part."""
        return self.kind, self.position

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of its arrays."""
        return tuple(array.number for array in self.arrays)

    def leaf(self, number: int) -> Leaf:
        """Returns the leaf that is stored here; a buffer, which has this number, counts as one that says what it is."""
        if self.buffer is None:
            return self.arrays[0].leaf
        name = f"buffer {number} of {len(self.arrays)} arrays"
        return Leaf((name,), self.kind, jax.Array, self.buffer.spec.shape, self.buffer.spec.dtype)


class DerivedArrays(NamedTuple):
    """Something derived, with its own span of arrays and those that it is derived from.

    Attributes:
      derived: the optimizer, the average, or another.
      order: which of the things that the plan derives.
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
        """The position after its last array."""
        return self.start + len(self.arrays)


def numbers_of(arrays: Sequence[ArrayInfo]) -> tuple[int, ...]:
    """Returns the numbers of some arrays."""
    return tuple(array.number for array in arrays)
