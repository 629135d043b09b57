"""Which arrays of a state cross into a compiled function, and how its program finds them.

The compiled function takes just the slots of a state's parts that the program reads or writes, grouped by kind:
`donated` are written, and come back; `kept` are only read.  Inside, the program speaks of arrays by their number
among all arrays of the plan.  Where a part is packed, `spread` takes the arrays that are needed out of the
buffers, and `gather` puts the new ones together again, unless the program made a buffer as a whole.
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

__all__ = ["Arrays", "Operand", "Operands", "numbers_of", "routes_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """Some slots of one kind's part: all of them, or some.

    Attributes:
      kind: the position of the kind.
      slots: which slots.
      pick: takes them out of a part's arrays; None where it is all of them.
    """

    kind: int
    slots: tuple[int, ...]
    pick: Callable[[Sequence[Any]], Any] | None

    @classmethod
    def of(cls, kind: int, slots: Sequence[int], size: int) -> Operand:
        """The route of these slots of a part that has so many."""
        pick: Callable[[Sequence[Any]], Any] | None = None
        if len(slots) == 1 and size > 1:
            only = slots[0]
            pick = lambda arrays: (arrays[only],)  # noqa: E731 - itemgetter gives a bare item for one
        elif len(slots) < size:
            pick = operator.itemgetter(*slots)
        return cls(kind, tuple(slots), pick)


@dataclasses.dataclass(slots=True)
class Arrays:
    """The arrays inside a program.

    Attributes:
      flat: by number; None for those that are not needed.
      slots: what came in, by kind and slot.
      made: buffers that the program made as a whole, by kind and slot.
    """

    flat: list[Any]
    slots: dict[tuple[int, int], Any]
    made: dict[tuple[int, int], Any]

    def store(self, numbers: Sequence[int], arrays: Sequence[Any]) -> None:
        """Gives arrays new values."""
        for number, array in zip(numbers, arrays, strict=True):
            self.flat[number] = array


@dataclasses.dataclass(frozen=True, slots=True)
class Operands:
    """Which arrays cross into the compiled function, and how.

    Attributes:
      plan: the plan.
      donated: slots that are written; their buffers are given away, and the new values come back so.
      kept: slots that are only read.
      needed: the numbers of the arrays that the program uses one by one.
    """

    plan: PlanTables
    donated: tuple[Operand, ...]
    kept: tuple[Operand, ...]
    needed: frozenset[int]

    def spread(self, donated: Any, kept: Any) -> Arrays:
        """The arrays inside the program, from what crossed."""
        offsets = self.plan.offsets
        arrays = Arrays([None] * sum(map(len, self.plan.specs.values())), {}, {})
        for routes, parts in ((self.donated, donated), (self.kept, kept)):
            for route, values in zip(routes, parts, strict=True):
                for slot, value in zip(route.slots, values, strict=True):
                    arrays.slots[route.kind, slot] = value
                    content = self.plan.slots[route.kind][slot]
                    if not isinstance(content, PackedBuffer):
                        arrays.flat[offsets[route.kind] + content] = value
                    elif any(offsets[route.kind] + position in self.needed for position in content.positions):
                        numbers = [offsets[route.kind] + position for position in content.positions]
                        arrays.store(numbers, separated(content, value))
        return arrays

    def gather(self, arrays: Arrays) -> tuple[tuple[Any, ...], ...]:
        """The donated slots' new values, grouped by kind."""
        return tuple(tuple(self._gathered(arrays, route.kind, slot) for slot in route.slots) for route in self.donated)

    def _gathered(self, arrays: Arrays, kind: int, slot: int) -> Any:
        if (kind, slot) in arrays.made:
            return arrays.made[kind, slot]
        content, offset = self.plan.slots[kind][slot], self.plan.offsets[kind]
        if isinstance(content, PackedBuffer):
            return joined([arrays.flat[offset + position] for position in content.positions])
        return arrays.flat[offset + content]


def joined(arrays: Sequence[Any]) -> Any:
    """One buffer of these arrays, inside a compiled function."""
    # Without the barrier XLA fuses whatever made the arrays into one enormous kernel.
    arrays = jax.lax.optimization_barrier(list(arrays))
    return jnp.concatenate([jnp.ravel(array) for array in arrays])


def numbers_of(plan: PlanTables, spots: Sequence[tuple[str, int]]) -> list[int]:
    """The numbers of arrays, from kind and position."""
    return [plan.offsets[plan.kind_index[kind]] + position for kind, position in spots]


def routes_of(
    plan: PlanTables, read: Collection[int], written: Collection[int], whole: Collection[tuple[int, int]] = ()
) -> Operands:
    """The routes of a program.

    Args:
      plan: the plan.
      read: the numbers of the arrays that it reads one by one.
      written: the numbers of the arrays that it writes, one by one or in whole buffers.
      whole: the buffers, by kind and slot, that it makes as a whole.
    """
    donated, kept, needed = [], [], set(read)
    for kind, contents in enumerate(plan.slots):
        gives, keeps = [], []
        for slot, content in enumerate(contents):
            positions = content.positions if isinstance(content, PackedBuffer) else (content,)
            numbers = [plan.offsets[kind] + position for position in positions]
            if any(number in written for number in numbers):
                gives.append(slot)
                if (kind, slot) not in whole:
                    needed.update(numbers)  # those that are not written are put back as they were
            elif any(number in read for number in numbers):
                keeps.append(slot)
        if gives:
            donated.append(Operand.of(kind, gives, len(contents)))
        if keeps:
            kept.append(Operand.of(kind, keeps, len(contents)))
    return Operands(plan, tuple(donated), tuple(kept), frozenset(needed))
