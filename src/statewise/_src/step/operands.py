"""The arrays of a state that are passed to a compiled function, and how its program finds them.

The compiled function takes just the slots of a state's parts that the program reads or writes, grouped by kind:
`donated` are written, and come back; `read_only` are only read.  Inside, the program speaks of arrays by their number
among all arrays of the plan.  If a part is packed, `unpack` takes the arrays that are needed out of the
buffers, and `pack` joins the new ones again, unless the program has computed a buffer as a unit.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.plan.arrays import Slot, Spot
from statewise._src.plan.packing import separated
from statewise._src.plan.tables import PlanTables

__all__ = ["Arrays", "Operand", "Operands", "joined", "operands_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """Some slots of one kind's part: all of them, or some.

    Attributes:
      kind: the position of the kind.
      name: its name.
      slots: which slots.
      pick: takes them out of a part's arrays; None if that is all of them.
    """

    kind: int
    name: str
    slots: tuple[int, ...]
    pick: Callable[[Sequence[Any]], Any] | None

    @classmethod
    def of(cls, kind: int, stored: Sequence[Slot], size: int) -> Operand:
        """Returns the operand of these slots of a part with `size` slots."""
        slots = tuple(slot.position for slot in stored)
        pick: Callable[[Sequence[Any]], Any] | None = None
        if len(slots) == 1 and size > 1:
            only = slots[0]
            pick = lambda arrays: (arrays[only],)  # noqa: E731 - itemgetter gives a bare item for one
        elif len(slots) < size:
            pick = operator.itemgetter(*slots)
        return cls(kind, stored[0].kind, slots, pick)


@dataclasses.dataclass(slots=True)
class Arrays:
    """The arrays inside a program.

    Attributes:
      flat: by number; None for those that are not needed.
      slots: what came in, by kind and slot.
      computed: buffers that the program has computed as a unit, by kind and slot.
    """

    flat: list[Any]
    slots: dict[Spot, Any]
    computed: dict[Spot, Any]

    def store(self, numbers: Sequence[int], arrays: Sequence[Any]) -> None:
        """Gives arrays new values."""
        for number, array in zip(numbers, arrays, strict=True):
            self.flat[number] = array


@dataclasses.dataclass(frozen=True, slots=True)
class Operands:
    """The arrays that are passed to a compiled function.

    Attributes:
      plan: the plan.
      donated: slots that are written; their memory is donated, and the new values are returned in the same order.
      read_only: slots that are only read.
      needed: the numbers of the arrays that the program uses one by one.
      read: the numbers of the arrays whose values it reads.
      written: the numbers of the arrays that it gives new values.
    """

    plan: PlanTables
    donated: tuple[Operand, ...]
    read_only: tuple[Operand, ...]
    needed: frozenset[int]
    read: frozenset[int]
    written: frozenset[int]

    def unpack(self, donated: Any, read_only: Any) -> Arrays:
        """Returns the arrays inside the program, from what was passed."""
        arrays = Arrays([None] * len(self.plan.arrays), {}, {})
        for operands, parts in ((self.donated, donated), (self.read_only, read_only)):
            for operand, values in zip(operands, parts, strict=True):
                for slot, value in zip(self._slots(operand), values, strict=True):
                    arrays.slots[slot.spot] = value
                    if slot.buffer is None:
                        arrays.flat[slot.arrays[0].number] = value
                    elif not self.needed.isdisjoint(slot.numbers):
                        arrays.store(slot.numbers, separated(slot.buffer, value))
        return arrays

    def pack(self, arrays: Arrays) -> tuple[tuple[Any, ...], ...]:
        """Returns the donated slots' new values, grouped by kind."""
        return tuple(tuple(_stored(arrays, slot) for slot in self._slots(operand)) for operand in self.donated)

    def _slots(self, operand: Operand) -> list[Slot]:
        stored = self.plan.stored[operand.name]
        return [stored[slot] for slot in operand.slots]


def _stored(arrays: Arrays, slot: Slot) -> Any:
    """Returns the new value of a slot."""
    if slot.spot in arrays.computed:
        return arrays.computed[slot.spot]
    values = [arrays.flat[number] for number in slot.numbers]
    return values[0] if slot.buffer is None else joined(values)


def joined(arrays: Sequence[Any]) -> Any:
    """Concatenates arrays into one buffer, inside a compiled function."""
    # Without the barrier XLA fuses whatever made the arrays into one enormous kernel.
    arrays = jax.lax.optimization_barrier(list(arrays))
    return jnp.concatenate([jnp.ravel(array) for array in arrays])


def operands_of(
    plan: PlanTables, read: Collection[int], written: Collection[int], whole: Collection[Spot] = ()
) -> Operands:
    """Returns the operands of a program.

    Args:
      plan: the plan.
      read: the numbers of the arrays that it reads one by one.
      written: the numbers of the arrays that it writes, one by one or in whole buffers.
      whole: the buffers, by kind and slot, that it computes as a unit.
    """
    donated, read_only, needed = [], [], set(read)
    for kind, slots in enumerate(plan.stored.values()):
        gives, keeps = [], []
        for slot in slots:
            if any(number in written for number in slot.numbers):
                gives.append(slot)
                if slot.spot not in whole:
                    needed.update(slot.numbers)  # those that are not written are put back as they were
            elif any(number in read for number in slot.numbers):
                keeps.append(slot)
        if gives:
            donated.append(Operand.of(kind, gives, len(slots)))
        if keeps:
            read_only.append(Operand.of(kind, keeps, len(slots)))
    return Operands(plan, tuple(donated), tuple(read_only), frozenset(needed), frozenset(read), frozenset(written))
