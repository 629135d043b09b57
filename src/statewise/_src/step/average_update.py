"""Averages inside a compiled step: after each update, one step towards the new values.

A train step moves the averages of the kinds that it updates, be it by an optimizer or because its function writes
them; those of other kinds stay as they are.  Where the leaves of a buffer are averaged in one buffer of the same order,
which is how `packing` has it, the step is one on the buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.plan.averages import Average
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.packing import PackedBuffer, separated
from statewise._src.plan.tables import PlanTables
from statewise._src.step.operands import Arrays, joined, numbers_of

__all__ = ["Averaging", "averagings"]

Spot = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Averaging:
    """One average's step.

    Attributes:
      average: which.
      params: the numbers of the arrays that it is of, in order.
      shadows: the numbers of the averages; the count is the last, where there is one.
      buffers: of each buffer that is averaged as a whole, its kind and slot and those of its averages.
      contents: what stands in the buffers of the averaged kind, by kind and slot, each with its arrays' numbers.
      written: the numbers of the arrays that the step writes.
    """

    average: Average
    params: tuple[int, ...]
    shadows: tuple[int, ...]
    buffers: tuple[tuple[Spot, Spot], ...]
    contents: dict[Spot, tuple[PackedBuffer, tuple[int, ...]]]
    written: frozenset[int]

    @classmethod
    def of(cls, plan: PlanTables, average: Average, written: Collection[int]) -> Averaging:
        """The step of an average; `written` are the numbers of the arrays that the whole step writes."""
        params = tuple(numbers_of(plan, plan.params_of(average)))
        start, stop = plan.derived_spans[plan.derived.index(average)]
        shadows = tuple(numbers_of(plan, [(average.into, position) for position in range(start, stop)]))
        contents = _buffers(plan, average.kind)
        theirs = {numbers: spot for spot, (_, numbers) in _buffers(plan, average.into).items()}
        shadow_of = dict(zip(params, shadows, strict=False))
        rows = {spot: tuple(shadow_of[number] for number in numbers) for spot, (_, numbers) in contents.items()}
        buffers = tuple((spot, theirs[row]) for spot, row in rows.items() if row in theirs)
        return cls(average, params, shadows, buffers, contents, frozenset(written))

    @property
    def whole(self) -> set[Spot]:
        """The buffers, by kind and slot, that it makes as a whole."""
        return {shadows for _, shadows in self.buffers}

    @property
    def reads(self) -> set[int]:
        """The numbers of the arrays that it reads one by one."""
        inside = set(self._inside)
        return {*self.params, *(number for at, number in enumerate(self.shadows) if at not in inside)}

    @property
    def writes(self) -> set[int]:
        """The numbers of the arrays that it writes."""
        return set(self.shadows)

    @property
    def _inside(self) -> list[int]:
        """Which of the arrays are averaged in whole buffers."""
        spots = dict(self.buffers)
        inside = {number for spot, (_, numbers) in self.contents.items() if spot in spots for number in numbers}
        return [at for at, number in enumerate(self.params) if number in inside]

    def run(self, arrays: Arrays) -> None:
        """Moves the averages towards the arrays as they are now."""
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
        """A buffer of the averaged kind, as it is now."""
        if spot not in arrays.made:
            numbers = self.contents[spot][1]
            if self.written.isdisjoint(numbers):
                return arrays.slots[spot]
            arrays.made[spot] = joined([arrays.flat[number] for number in numbers])
        return arrays.made[spot]

    def _values(self, arrays: Arrays) -> dict[int, Any]:
        """The arrays that an optimizer has just made in buffers, by number, where their averages stand alone."""
        values: dict[int, Any] = {}
        for spot, (buffer, numbers) in self.contents.items():
            if spot in arrays.made and spot not in dict(self.buffers):
                values |= zip(numbers, separated(buffer, arrays.made[spot]), strict=True)
        return values


def averagings(
    plan: PlanTables, groups: Sequence[OptimizerGroup], written: Sequence[tuple[str, int]], numbers: Collection[int]
) -> list[Averaging]:
    """The averages that a step moves: none where it trains nothing.

    Args:
      plan: the plan.
      groups: the optimizers that the step runs.
      written: kind and position of the arrays that its function writes.
      numbers: the numbers of all arrays that it writes.
    """
    if not groups:
        return []
    updated = {kind for group in groups for kind in group.kinds} | {kind for kind, _ in written}
    return [Averaging.of(plan, average, numbers) for average in plan.averages if average.kind in updated]


def _buffers(plan: PlanTables, name: str) -> dict[Spot, tuple[PackedBuffer, tuple[int, ...]]]:
    kind = plan.kind_index[name]
    offset = plan.offsets[kind]
    return {
        (kind, slot): (content, tuple(offset + position for position in content.positions))
        for slot, content in enumerate(plan.slots[kind])
        if isinstance(content, PackedBuffer)
    }


def _moved(decay: Any, average: Any, value: Any) -> Any:
    """One step of an average, computed in its own dtype, and in no less than 32 bits."""
    dtype = average.dtype if average.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    kept = jnp.asarray(decay, jnp.finfo(dtype).dtype)
    part = jnp.asarray(1 - decay, jnp.finfo(dtype).dtype)
    new = value.astype(dtype)
    if value.dtype == jnp.bfloat16:
        new = jax.lax.reduce_precision(new, 8, 7)  # XLA may leave out the rounding that the parameter has been through
    return (kept * average.astype(dtype) + part * new).astype(average.dtype)
