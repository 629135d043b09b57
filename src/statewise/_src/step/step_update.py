"""The updates of a train step, one for each derived thing of a plan: of an optimizer, of an average, or another.

`step_update` returns the update of one of them.  It is a generic function: for a new subclass of `Derived`, a file
beside `average_update` registers how a train step moves it, and `program` imports that file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from statewise._src.plan.arrays import Spot
from statewise._src.plan.derived import Derived
from statewise._src.plan.tables import PlanTables
from statewise._src.step.operands import Arrays

__all__ = ["Gradients", "Moved", "StepUpdate", "step_update", "step_updates"]


@dataclasses.dataclass(frozen=True, slots=True)
class Gradients:
    """The results that a train step has computed before its updates run.

    Attributes:
      loss: the loss.
      of: the gradient of each array that is differentiated, by number.
      loss_with: the loss with other values, in order, for the arrays of these numbers.
    """

    loss: Any
    of: dict[int, Any]
    loss_with: Callable[[Sequence[int], Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Moved:
    """The arrays that a train step writes before an update runs.

    Attributes:
      kinds: the kinds that its function writes, or that its optimizers update.
      numbers: the numbers of the arrays.
    """

    kinds: frozenset[str]
    numbers: frozenset[int]


@dataclasses.dataclass(frozen=True, slots=True)
class StepUpdate:
    """One update of a train step, static.

    Attributes:
      reads: the numbers of the arrays that it reads one by one.
      writes: the numbers of the arrays that it writes.
      run: updates the arrays.
      whole: the buffers, by kind and slot, that it computes as a unit.
      differentiates: the numbers of the arrays whose gradients it takes.
      overwrites: whether these gradients are the new values.
    """

    reads: AbstractSet[int]
    writes: AbstractSet[int]
    run: Callable[[Arrays, Gradients], None]
    whole: AbstractSet[Spot] = frozenset()
    differentiates: Sequence[int] = ()
    overwrites: bool = False


@functools.singledispatch
def step_update(derived: Derived, plan: PlanTables, moved: Moved) -> StepUpdate | None:
    """Returns what a train step does for something derived; None if it leaves it unchanged.

    Args:
      derived: the optimizer, the average, or another.
      plan: the plan.
      moved: what the step writes before.
    """
    return None


def step_updates(plan: PlanTables, trained: Sequence[Derived], written: Sequence[tuple[str, int]]) -> list[StepUpdate]:
    """Returns the updates of a train step, in the order in which they run.

    Args:
      plan: the plan.
      trained: the optimizers that it runs.
      written: kind and position of the arrays that its function writes.
    """
    if not trained:
        return []
    kinds = frozenset([*(kind for derived in trained for kind in derived.kinds), *(kind for kind, _ in written)])
    numbers = frozenset(plan.numbers(written))
    updates: list[StepUpdate] = []
    # What moves the sources runs first: the others follow the values that it computes.
    for derived in sorted(plan.derived, key=lambda derived: not derived.trains):
        if derived.trains and derived not in trained:
            continue
        update = step_update(derived, plan, Moved(kinds, numbers))
        if update is not None:
            updates.append(update)
            numbers |= update.writes  # the buffers that came in are outdated for these
    return updates
