"""What the plan of an ensemble knows about its members: how many, along which axes, and the plan of one of them.

The plan of an ensemble has `Members`, and the rows of one model, each array with one more axis.  Everything that reads
shapes (a save, a census, a placement) reads those of the ensemble; everything that runs the model runs the plan of one
member.  An axis is counted in the array as a state of one member holds it, with the axis of `PerDevice` if it has one.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.common.nnx_graph import ArraySpec

__all__ = ["Axis", "Members", "grown", "place_of", "shrunk"]

# The axis of an array along which its members are stacked; None for an array that all members share.
Axis = int | None


class Members(NamedTuple):
    """The members of an ensemble.

    Attributes:
      single: the plan of one member.
      number: the number of members.
      axes: for each kind, the axis of each of its arrays, in the order of the plan.
      over: the mesh axis that the members are sharded over; None if each device has all of them.
    """

    single: Any
    number: int
    axes: tuple[tuple[str, tuple[Axis, ...]], ...]
    over: str | None = None

    def of(self, kind: str) -> tuple[Axis, ...]:
        """Returns the axis of each array of a kind."""
        return dict(self.axes)[kind]

    def grown(self, kind: str, specs: Sequence[ArraySpec], start: int = 0) -> tuple[ArraySpec, ...]:
        """Returns shapes and dtypes with the members' axis, from those of one member.

        Args:
          kind: the name of the kind.
          specs: shapes and dtypes of the kind's arrays, or of some of them.
          start: the position of the first of them.
        """
        axes = self.of(kind)[start : start + len(specs)]
        pairs = zip(specs, axes, strict=True)
        return tuple(ArraySpec(grown(spec.shape, axis, self.number), spec.dtype) for spec, axis in pairs)

    def shrunk(self, kind: str, specs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
        """Returns a kind's shapes and dtypes without the members' axis: the inverse of `grown`."""
        pairs = zip(specs, self.of(kind), strict=True)
        return tuple(ArraySpec(shrunk(spec.shape, axis), spec.dtype) for spec, axis in pairs)

    def each(self, fn: Callable[..., Any], arrays: Any, ins: Any, outs: Any) -> Any:
        """Calls a function of one member's arrays for each member.

        Args:
          fn: the function.
          arrays: the arrays of all members.
          ins: the members' axis in each of them, in the same structure.
          outs: the members' axis in each returned array.
        """
        if jax.tree.leaves(ins):
            return jax.vmap(fn, in_axes=(ins,), out_axes=outs)(arrays)
        # All arrays are shared, and `jax.vmap` needs at least one mapped argument to know the number of members.
        called: Any = jax.vmap(lambda _, arrays: fn(arrays), in_axes=(0, ins), out_axes=outs)
        return called(jnp.arange(self.number), arrays)


def place_of(axis: int, rank: int) -> int:
    """Returns an axis counted from the front, in an array of this rank, which includes the axis itself."""
    return axis % rank


def grown(shape: tuple[int, ...], axis: Axis, count: int) -> tuple[int, ...]:
    """Returns a shape with the members' axis."""
    if axis is None:
        return shape
    index = place_of(axis, len(shape) + 1)
    return (*shape[:index], count, *shape[index:])


def shrunk(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Returns a shape without the members' axis."""
    if axis is None:
        return shape
    index = place_of(axis, len(shape))
    return shape[:index] + shape[index + 1 :]
