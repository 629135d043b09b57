"""The arrays of a state that are passed to a compiled function, and how its program finds them.

The compiled function takes only the slots of a state's parts that the program reads or writes, grouped by kind:
`donated` slots are written and returned; `read_only` slots are only read.  Inside, the program refers to arrays by
their number among all arrays of the plan.  If a part is packed, `unpack` takes the needed arrays out of the buffers,
and `pack` concatenates the new ones, unless the program computed a buffer as a unit.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.plan.packing import PackedBuffer, separated
from statewise._src.plan.tables import PlanTables

__all__ = ["Arrays", "Operand", "Operands", "numbers_of", "operands_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """All, or some, of the slots of one kind's part.

    Attributes:
      kind: the position of the kind.
      slots: the slots.
      pick: selects them from a part's arrays; None for all of them.
    """

    kind: int
    slots: tuple[int, ...]
    pick: Callable[[Sequence[Any]], Any] | None

    @classmethod
    def of(cls, kind: int, slots: Sequence[int], size: int) -> Operand:
        """Makes the operand of these slots of a part with `size` slots."""
        pick: Callable[[Sequence[Any]], Any] | None = None
        if len(slots) == 1 and size > 1:
            only = slots[0]
            pick = lambda arrays: (arrays[only],)  # noqa: E731 - itemgetter returns a bare item for one
        elif len(slots) < size:
            pick = operator.itemgetter(*slots)
        return cls(kind, tuple(slots), pick)


@dataclasses.dataclass(slots=True)
class Arrays:
    """The arrays inside a program.

    Attributes:
      flat: the arrays by number; None for those that are not needed.
      slots: the operands, by kind and slot.
      made: the buffers that the program computed as a unit, by kind and slot.
    """

    flat: list[Any]
    slots: dict[tuple[int, int], Any]
    made: dict[tuple[int, int], Any]

    def store(self, numbers: Sequence[int], arrays: Sequence[Any]) -> None:
        """Sets the new values of arrays."""
        for number, array in zip(numbers, arrays, strict=True):
            self.flat[number] = array


@dataclasses.dataclass(frozen=True, slots=True)
class Operands:
    """The arrays that are passed to the compiled function.

    Attributes:
      plan: the plan.
      donated: the slots that are written; their buffers are donated, and the new values are returned in the same order.
      read_only: the slots that are only read.
      needed: the numbers of the arrays that the program uses one by one.
    """

    plan: PlanTables
    donated: tuple[Operand, ...]
    read_only: tuple[Operand, ...]
    needed: frozenset[int]

    def unpack(self, donated: Any, read_only: Any) -> Arrays:
        """Returns the arrays inside the program, from the operands."""
        offsets = self.plan.offsets
        arrays = Arrays([None] * sum(map(len, self.plan.specs.values())), {}, {})
        for group, parts in ((self.donated, donated), (self.read_only, read_only)):
            for operand, values in zip(group, parts, strict=True):
                for slot, value in zip(operand.slots, values, strict=True):
                    arrays.slots[operand.kind, slot] = value
                    content = self.plan.slots[operand.kind][slot]
                    # An array's number is its kind's offset plus its position in the kind.
                    if not isinstance(content, PackedBuffer):
                        arrays.flat[offsets[operand.kind] + content] = value
                    elif any(offsets[operand.kind] + position in self.needed for position in content.positions):
                        numbers = [offsets[operand.kind] + position for position in content.positions]
                        arrays.store(numbers, separated(content, value))
        return arrays

    def pack(self, arrays: Arrays) -> tuple[tuple[Any, ...], ...]:
        """Returns the new values of the donated slots, grouped by kind."""
        return tuple(
            tuple(self._packed(arrays, operand.kind, slot) for slot in operand.slots) for operand in self.donated
        )

    def _packed(self, arrays: Arrays, kind: int, slot: int) -> Any:
        """Returns the new value of a slot: a buffer computed as a unit, a concatenated buffer, or an array."""
        if (kind, slot) in arrays.made:
            return arrays.made[kind, slot]
        content, offset = self.plan.slots[kind][slot], self.plan.offsets[kind]
        if isinstance(content, PackedBuffer):
            return joined([arrays.flat[offset + position] for position in content.positions])
        return arrays.flat[offset + content]


def joined(arrays: Sequence[Any]) -> Any:
    """Concatenates arrays into one buffer, inside a compiled function."""
    # Without the barrier XLA fuses the computations of all these arrays into one enormous kernel.
    arrays = jax.lax.optimization_barrier(list(arrays))
    return jnp.concatenate([jnp.ravel(array) for array in arrays])


def numbers_of(plan: PlanTables, spots: Sequence[tuple[str, int]]) -> list[int]:
    """Returns the numbers of arrays, given their kinds and positions."""
    return [plan.offsets[plan.kind_index[kind]] + position for kind, position in spots]


def operands_of(
    plan: PlanTables, read: Collection[int], written: Collection[int], whole: Collection[tuple[int, int]] = ()
) -> Operands:
    """Returns the operands of a program.

    Args:
      plan: the plan.
      read: the numbers of the arrays that it reads individually.
      written: the numbers of the arrays that it writes, individually or in buffers.
      whole: the buffers, by kind and slot, that it computes as a unit.
    """
    donated, read_only, needed = [], [], set(read)
    for kind, contents in enumerate(plan.slots):
        gives, keeps = [], []
        for slot, content in enumerate(contents):
            positions = content.positions if isinstance(content, PackedBuffer) else (content,)
            numbers = [plan.offsets[kind] + position for position in positions]
            if any(number in written for number in numbers):
                gives.append(slot)
                if (kind, slot) not in whole:
                    needed.update(numbers)  # the unwritten arrays of the buffer are concatenated with the new ones
            elif any(number in read for number in numbers):
                keeps.append(slot)
        if gives:
            donated.append(Operand.of(kind, gives, len(contents)))
        if keeps:
            read_only.append(Operand.of(kind, keeps, len(contents)))
    return Operands(plan, tuple(donated), tuple(read_only), frozenset(needed))
