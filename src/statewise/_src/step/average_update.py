"""Averages inside a compiled step: after each update, one step toward the new values.

A train step moves the averages of the kinds that it updates, whether an optimizer or its function writes them; the
averages of other kinds stay as they are.  `packing` stores the averages of a packed buffer in a buffer of the same
order, and then one operation moves the buffer as a unit.
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
    """The step of one average.

    Attributes:
      average: the average.
      params: the numbers of the arrays that it averages, in order.
      shadows: the numbers of the averages; the last is the count, where there is one.
      buffers: for each buffer that is averaged as a unit, its kind and slot and those of its averages.
      contents: the contents of the averaged kind's buffers, by kind and slot, each with the numbers of its arrays.
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
        """Builds the step of an average; `written` are the numbers of the arrays that the complete step writes."""
        params = tuple(numbers_of(plan, plan.params_of(average)))
        start, stop = plan.derived_spans[plan.derived.index(average)]
        shadows = tuple(numbers_of(plan, [(average.into, position) for position in range(start, stop)]))
        contents = _buffers(plan, average.kind)
        shadow_buffers = {numbers: spot for spot, (_, numbers) in _buffers(plan, average.into).items()}
        shadow_of = dict(zip(params, shadows, strict=False))
        # A buffer can be averaged as a unit only if some buffer holds exactly its averages, in the same order.
        rows = {spot: tuple(shadow_of[number] for number in numbers) for spot, (_, numbers) in contents.items()}
        buffers = tuple((spot, shadow_buffers[row]) for spot, row in rows.items() if row in shadow_buffers)
        return cls(average, params, shadows, buffers, contents, frozenset(written))

    @property
    def whole(self) -> set[Spot]:
        """Returns the buffers, by kind and slot, that this computes as a unit."""
        return {shadows for _, shadows in self.buffers}

    @property
    def reads(self) -> set[int]:
        """Returns the numbers of the arrays that it reads one by one."""
        inside = set(self._inside)
        return {*self.params, *(number for index, number in enumerate(self.shadows) if index not in inside)}

    @property
    def writes(self) -> set[int]:
        """Returns the numbers of the arrays that it writes."""
        return set(self.shadows)

    @property
    def _inside(self) -> list[int]:
        """Returns the indices of the arrays that are averaged as part of a buffer."""
        spots = dict(self.buffers)
        inside = {number for spot, (_, numbers) in self.contents.items() if spot in spots for number in numbers}
        return [index for index, number in enumerate(self.params) if number in inside]

    def run(self, arrays: Arrays) -> None:
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
        pairs = enumerate(zip(self.params, self.shadows, strict=False))  # without the count, which has no parameter
        alone = [pair for index, pair in pairs if index not in inside]
        values = self._values(arrays)
        for number, shadow in alone:
            arrays.flat[shadow] = _moved(decay, arrays.flat[shadow], values.get(number, arrays.flat[number]))

    def _buffer(self, arrays: Arrays, spot: Spot) -> Any:
        """Returns a buffer of the averaged kind with its current values."""
        if spot not in arrays.made:
            numbers = self.contents[spot][1]
            if self.written.isdisjoint(numbers):
                return arrays.slots[spot]
            arrays.made[spot] = joined([arrays.flat[number] for number in numbers])
        return arrays.made[spot]

    def _values(self, arrays: Arrays) -> dict[int, Any]:
        """Returns, by number, arrays that an optimizer computed in buffers but whose averages are stored separately."""
        values: dict[int, Any] = {}
        for spot, (buffer, numbers) in self.contents.items():
            if spot in arrays.made and spot not in dict(self.buffers):
                values |= zip(numbers, separated(buffer, arrays.made[spot]), strict=True)
        return values


def averagings(
    plan: PlanTables, groups: Sequence[OptimizerGroup], written: Sequence[tuple[str, int]], numbers: Collection[int]
) -> list[Averaging]:
    """Returns the averages that a step moves: none if it trains nothing.

    Args:
      plan: the plan.
      groups: the optimizers that the step runs.
      written: kind and position of the arrays that the step's function writes.
      numbers: the numbers of all arrays that the step writes.
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
    """Returns an average after one step, computed in its own dtype but in at least 32 bits."""
    dtype = average.dtype if average.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    kept = jnp.asarray(decay, jnp.finfo(dtype).dtype)
    part = jnp.asarray(1 - decay, jnp.finfo(dtype).dtype)
    new = value.astype(dtype)
    if value.dtype == jnp.bfloat16:
        new = jax.lax.reduce_precision(new, 8, 7)  # XLA may skip the rounding that the stored parameter went through
    return (kept * average.astype(dtype) + part * new).astype(average.dtype)
