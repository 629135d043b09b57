"""The dtypes in which a function sees the state: cast when it is called, and cast back where it writes.

The casts are outside of the traced function, which has inputs of the compute dtype.  So a leaf that only passes through
the function (through a `jax.jit`, or the carry of a scan) is still recognized as unwritten, and is not rounded.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.plan.tables import PlanTables

__all__ = ["ComputeCasts", "casts_of", "compute_specs"]


class ComputeCasts(NamedTuple):
    """The casts around a traced function.

    Attributes:
      compute: the dtype in which the function sees an array of the state, by number.
      stored: the dtype of each array that it writes, in the state; None where it is not cast.
    """

    compute: dict[int, Any]
    stored: tuple[Any, ...]

    def to_compute(self, flat: Sequence[Any]) -> list[Any]:
        """Returns the function's inputs; None stays None."""
        inputs = list(flat)
        for number, dtype in self.compute.items():
            if inputs[number] is not None:
                inputs[number] = inputs[number].astype(dtype)
        return inputs

    def to_stored(self, written: Sequence[Any]) -> list[Any]:
        """Returns the written arrays in the dtypes of the state."""
        return [
            array if dtype is None else array.astype(dtype) for array, dtype in zip(written, self.stored, strict=True)
        ]


def casts_of(plan: PlanTables, written: Sequence[int]) -> ComputeCasts | None:
    """Returns the casts of a function that writes the arrays of these numbers; None if the plan declares none."""
    compute = plan.compute_dtypes
    stored = tuple(plan.arrays[number].spec.dtype if number in compute else None for number in written)
    return ComputeCasts(compute, stored) if compute else None


def compute_specs(plan: PlanTables, arrays: Sequence[Any]) -> list[Any]:
    """Returns the inputs of a trace: the arrays, or the shape and dtype of those that the function sees in another."""
    inputs = list(arrays)
    for number, dtype in plan.compute_dtypes.items():
        inputs[number] = jax.eval_shape(lambda array, dtype=dtype: jnp.asarray(array, dtype), inputs[number])
    return inputs
