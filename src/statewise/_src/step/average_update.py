"""Averages inside a compiled step: after each update, one step toward the new values.

A train step moves the averages of the kinds that it writes, by an optimizer or in its function; the averages of other
kinds do not change.  If the averages of a buffer's leaves are in one buffer in the same order, as `packing` arranges
it, one step moves the buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.plan.arrays import Slot, Spot, numbers_of
from statewise._src.plan.averages import Average
from statewise._src.plan.packing import separated
from statewise._src.plan.tables import PlanTables
from statewise._src.step.operands import Arrays, joined
from statewise._src.step.step_update import Gradients, Moved, StepUpdate, step_update

__all__: list[str] = []


@dataclasses.dataclass(frozen=True, slots=True)
class _Averaging:
    """One average's step.

    Attributes:
      average: the average.
      count: the number of the count of steps; None if the decay does not follow a schedule.
      alone: the numbers of the arrays that are averaged one by one, each with that of its average.
      buffers: for each buffer that is averaged as a whole, the kind and slot of its average.
      contents: the slots of the averaged kind that hold buffers.
      written: the numbers of the arrays that the step writes before.
    """

    average: Average
    count: int | None
    alone: tuple[tuple[int, int], ...]
    buffers: dict[Spot, Spot]
    contents: dict[Spot, Slot]
    written: AbstractSet[int]

    def run(self, arrays: Arrays, gradients: Gradients) -> None:
        """Moves the averages toward the current arrays."""
        decay: Any = self.average.ema.decay
        if self.average.ema.schedule and self.count is not None:
            count = arrays.flat[self.count]
            decay = self.average.ema.schedule(count)
            arrays.flat[self.count] = count + 1
        for spot, average in self.buffers.items():
            arrays.computed[average] = _moved(decay, arrays.slots[average], self._buffer(arrays, spot))
        # An optimizer may have computed arrays in buffers whose averages are not packed in the same way.
        values: dict[int, Any] = {}
        for spot, slot in self.contents.items():
            if slot.buffer is not None and spot in arrays.computed and spot not in self.buffers:
                values |= zip(slot.numbers, separated(slot.buffer, arrays.computed[spot]), strict=True)
        for number, average_number in self.alone:
            value = values.get(number, arrays.flat[number])
            arrays.flat[average_number] = _moved(decay, arrays.flat[average_number], value)

    def _buffer(self, arrays: Arrays, spot: Spot) -> Any:
        """Returns the current value of a buffer of the averaged kind."""
        if spot not in arrays.computed:
            numbers = self.contents[spot].numbers
            if self.written.isdisjoint(numbers):
                return arrays.slots[spot]
            arrays.computed[spot] = joined([arrays.flat[number] for number in numbers])
        return arrays.computed[spot]


@step_update.register(Average)
def _(derived: Average, plan: PlanTables, moved: Moved) -> StepUpdate | None:
    if derived.kind not in moved.kinds:
        return None
    placed = plan.arrays_of(derived)
    params, averages = numbers_of(placed.sources), numbers_of(placed.arrays)
    average_of = dict(zip(params, averages, strict=False))  # the count of a schedule comes after the averages
    contents = {slot.spot: slot for slot in plan.buffers if slot.kind == derived.kind}
    spots = {slot.numbers: slot.spot for slot in plan.buffers if slot.kind == derived.into}
    # A buffer is averaged as a whole if the averages of its arrays are one buffer too, in the same order.
    rows = {spot: tuple(average_of[number] for number in slot.numbers) for spot, slot in contents.items()}
    buffers = {spot: spots[row] for spot, row in rows.items() if row in spots}
    inside = {number for spot in buffers for number in contents[spot].numbers}
    alone = tuple((number, average) for number, average in average_of.items() if number not in inside)
    count = averages[-1] if derived.ema.schedule else None
    # What is written array by array is joined for its average, and then the step's new buffer as well.
    joins = {spot for spot in buffers if not moved.numbers.isdisjoint(contents[spot].numbers)}
    averaging = _Averaging(derived, count, alone, buffers, contents, moved.numbers)
    return StepUpdate(
        reads={*params, *averages} - {average_of[number] for number in inside},
        writes={*averages},
        run=averaging.run,
        whole={*buffers.values(), *joins},
    )


def _moved(decay: Any, average: Any, value: Any) -> Any:
    """Returns an average after one step, computed in its own dtype and in at least 32 bits."""
    dtype = average.dtype if average.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    kept = jnp.asarray(decay, jnp.finfo(dtype).dtype)
    part = jnp.asarray(1 - decay, jnp.finfo(dtype).dtype)
    new = value.astype(dtype)
    if value.dtype == jnp.bfloat16:
        new = jax.lax.reduce_precision(new, 8, 7)  # XLA may leave out the rounding that the parameter has been through
    return (kept * average.astype(dtype) + part * new).astype(average.dtype)
