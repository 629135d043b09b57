"""What a plan of an ensemble knows of its members: how many, along which axes, and the plan of one of them.

The plan of an ensemble has the rows of one model, each array with one axis more, and `Members`.  Everything that reads
shapes (a save, a census, a placement) reads those of the ensemble; whatever runs the model runs the plan of one member.
An axis counts in the array as a state of one member holds it, the axis of `PerDevice` included.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.common.nnx_graph import ArraySpec

__all__ = ["Axis", "Members", "grown", "place_of", "shrunk"]

# Of an array the axis that its members lie along; None for one that all members share.
Axis = int | None


class Members(NamedTuple):
    """The members of an ensemble.

    Attributes:
      single: the plan of one member.
      number: how many there are.
      axes: for each kind the axis of each of its arrays, in the order of the plan.
      over: the mesh axis that the members are split over; None where each device has all of them.
    """

    single: Any
    number: int
    axes: tuple[tuple[str, tuple[Axis, ...]], ...]
    over: str | None = None

    def of(self, kind: str) -> tuple[Axis, ...]:
        """The axis of each array of a kind."""
        return dict(self.axes)[kind]

    def grown(self, kind: str, specs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
        """A kind's shapes and dtypes with the axis, from those of one member."""
        return self.grown_at(kind, 0, specs)

    def grown_at(self, kind: str, start: int, specs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
        """The same of some of a kind's arrays, from a position on."""
        axes = self.of(kind)[start : start + len(specs)]
        pairs = zip(specs, axes, strict=True)
        return tuple(ArraySpec(grown(spec.shape, axis, self.number), spec.dtype) for spec, axis in pairs)

    def shrunk(self, kind: str, specs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
        """A kind's shapes and dtypes without the axis: the inverse of `grown`."""
        return tuple(
            ArraySpec(shrunk(spec.shape, axis), spec.dtype) for spec, axis in zip(specs, self.of(kind), strict=True)
        )

    def each(self, fn: Callable[..., Any], arrays: Any, ins: Any, outs: Any) -> Any:
        """Calls a function of one member's arrays for each member.

        Args:
          fn: the function.
          arrays: the arrays of all.
          ins: for each of them its axis, in the same structure.
          outs: for each array that comes back the axis that it is to have.
        """
        if jax.tree.leaves(ins):
            return jax.vmap(fn, in_axes=(ins,), out_axes=outs)(arrays)
        # One argument that is mapped in any case: of arrays that all members share `jax.vmap` alone would make nothing.
        called: Any = jax.vmap(lambda _, arrays: fn(arrays), in_axes=(0, ins), out_axes=outs)
        return called(jnp.arange(self.number), arrays)


def place_of(axis: int, rank: int) -> int:
    """The axis counted from the front, in an array of so many dimensions, itself included."""
    return axis % rank


def grown(shape: tuple[int, ...], axis: Axis, count: int) -> tuple[int, ...]:
    """A shape with the axis of the members."""
    if axis is None:
        return shape
    at = place_of(axis, len(shape) + 1)
    return (*shape[:at], count, *shape[at:])


def shrunk(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """A shape without the axis of the members."""
    if axis is None:
        return shape
    at = place_of(axis, len(shape))
    return shape[:at] + shape[at + 1 :]
