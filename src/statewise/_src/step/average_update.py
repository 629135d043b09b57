"""Averages inside a compiled step: after each update, one step toward the new values.

A train step moves the averages of the kinds that it updates, be it by an optimizer or because its function writes
them; those of other kinds stay as they are.  Where the leaves of a buffer are averaged in one buffer of the same order,
which is how `packing` has it, the step is one on the buffers.
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

__all__ = ["Averaging"]


@dataclasses.dataclass(frozen=True, slots=True)
class Averaging(StepUpdate):
    """One average's step.

    Attributes:
      average: which.
      params: the numbers of the arrays that it is of, in order.
      shadows: the numbers of the averages; the count is the last, where there is one.
      buffers: of each buffer that is averaged as a whole, its kind and slot and those of its averages.
      contents: the slots of the averaged kind that hold buffers.
      written: the numbers of the arrays that the step writes.
    """

    average: Average
    params: tuple[int, ...]
    shadows: tuple[int, ...]
    buffers: tuple[tuple[Spot, Spot], ...]
    contents: dict[Spot, Slot]
    written: AbstractSet[int]

    @classmethod
    def of(cls, plan: PlanTables, average: Average, written: AbstractSet[int]) -> Averaging:
        """Returns the step of an average; `written` are the numbers of the arrays that are written before."""
        placed = plan.arrays_of(average)
        params, shadows = numbers_of(placed.sources), numbers_of(placed.arrays)
        contents = {slot.spot: slot for slot in plan.buffers if slot.kind == average.kind}
        spots = {slot.numbers: slot.spot for slot in plan.buffers if slot.kind == average.into}
        shadow_of = dict(zip(params, shadows, strict=False))
        rows = {spot: tuple(shadow_of[number] for number in slot.numbers) for spot, slot in contents.items()}
        buffers = tuple((spot, spots[row]) for spot, row in rows.items() if row in spots)
        return cls(average, params, shadows, buffers, contents, written)

    @property
    def differentiates(self) -> tuple[int, ...]:
        """Returns nothing: an average takes no gradient."""
        return ()

    @property
    def whole(self) -> set[Spot]:
        """Returns the buffers, by kind and slot, that it computes as a unit."""
        return {shadows for _, shadows in self.buffers}

    @property
    def reads(self) -> set[int]:
        """Returns the numbers of the arrays that it reads one by one."""
        inside = set(self._inside)
        return {*self.params, *(number for at, number in enumerate(self.shadows) if at not in inside)}

    @property
    def writes(self) -> set[int]:
        """Returns the numbers of the arrays that it writes."""
        return set(self.shadows)

    @property
    def _inside(self) -> list[int]:
        """Returns the indices of the arrays that are averaged in complete buffers."""
        spots = dict(self.buffers)
        inside = {number for spot, slot in self.contents.items() if spot in spots for number in slot.numbers}
        return [at for at, number in enumerate(self.params) if number in inside]

    def run(self, arrays: Arrays, gradients: Gradients) -> None:
        """Moves the averages toward the current arrays."""
        decay: Any = self.average.ema.decay
        schedule = self.average.ema.schedule
        if schedule:
            count = arrays.flat[self.shadows[-1]]
            decay = schedule(count)
            arrays.flat[self.shadows[-1]] = count + 1
        for spot, shadows in self.buffers:
            arrays.made[shadows] = _moved(decay, arrays.slots[shadows], self._buffer(arrays, spot))
        inside = set(self._inside)
        alone = [pair for at, pair in enumerate(zip(self.params, self.shadows, strict=False)) if at not in inside]
        values = self._values(arrays)
        for number, shadow in alone:
            arrays.flat[shadow] = _moved(decay, arrays.flat[shadow], values.get(number, arrays.flat[number]))

    def _buffer(self, arrays: Arrays, spot: Spot) -> Any:
        """Returns the current value of a buffer of the averaged kind."""
        if spot not in arrays.made:
            numbers = self.contents[spot].numbers
            if self.written.isdisjoint(numbers):
                return arrays.slots[spot]
            arrays.made[spot] = joined([arrays.flat[number] for number in numbers])
        return arrays.made[spot]

    def _values(self, arrays: Arrays) -> dict[int, Any]:
        """Returns the arrays that an optimizer has computed in buffers, by number, if their averages are not packed."""
        values: dict[int, Any] = {}
        for spot, slot in self.contents.items():
            if slot.buffer is not None and spot in arrays.made and spot not in dict(self.buffers):
                values |= zip(slot.numbers, separated(slot.buffer, arrays.made[spot]), strict=True)
        return values


@step_update.register(Average)
def _(derived: Average, plan: PlanTables, moved: Moved) -> Averaging | None:
    return Averaging.of(plan, derived, moved.numbers) if derived.kind in moved.kinds else None


def _moved(decay: Any, average: Any, value: Any) -> Any:
    """Returns an average after one step, computed in its own dtype and in at least 32 bits."""
    dtype = average.dtype if average.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    kept = jnp.asarray(decay, jnp.finfo(dtype).dtype)
    part = jnp.asarray(1 - decay, jnp.finfo(dtype).dtype)
    new = value.astype(dtype)
    if value.dtype == jnp.bfloat16:
        new = jax.lax.reduce_precision(new, 8, 7)  # XLA may leave out the rounding that the parameter has been through
    return (kept * average.astype(dtype) + part * new).astype(average.dtype)
