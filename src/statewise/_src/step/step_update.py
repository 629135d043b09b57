"""What a train step does for each derived thing of a plan: an optimizer's update, an average's step, and others.

`step_update` gives the update of one.  It is a generic function: the file that defines a new subclass of `Derived`
registers how a train step moves it, and nothing else has to know.
"""

from __future__ import annotations

import abc
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
    """What a train step has computed before its updates run.

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
    """What a train step writes before an update runs.

    Attributes:
      kinds: the kinds that its function writes, or that its optimizers update.
      numbers: the numbers of the arrays.
    """

    kinds: frozenset[str]
    numbers: frozenset[int]


class StepUpdate(abc.ABC):
    """One update of a train step, static."""

    @property
    @abc.abstractmethod
    def reads(self) -> AbstractSet[int]:
        """Returns the numbers of the arrays that it reads one by one."""

    @property
    @abc.abstractmethod
    def writes(self) -> AbstractSet[int]:
        """Returns the numbers of the arrays that it writes."""

    @property
    @abc.abstractmethod
    def whole(self) -> AbstractSet[Spot]:
        """Returns the buffers, by kind and slot, that it computes as a unit."""

    @property
    @abc.abstractmethod
    def differentiates(self) -> Sequence[int]:
        """Returns the numbers of the arrays whose gradients it takes; none if it takes no gradient."""

    @abc.abstractmethod
    def run(self, arrays: Arrays, gradients: Gradients) -> None:
        """Updates the arrays."""


@functools.singledispatch
def step_update(derived: Derived, plan: PlanTables, moved: Moved) -> StepUpdate | None:
    """Returns what a train step does for something derived; None where it leaves it as it is.

    Args:
      derived: which.
      plan: the plan.
      moved: what the step writes before.
    """
    return None


def step_updates(plan: PlanTables, trained: Sequence[Derived], written: Sequence[tuple[str, int]]) -> list[StepUpdate]:
    """Returns the updates of a train step, in the order in which they run.

    Args:
      plan: the plan.
      trained: those that it trains by.
      written: kind and position of the arrays that its function writes.
    """
    if not trained:
        return []
    kinds = {kind for one in trained for kind in one.kinds} | {kind for kind, _ in written}
    numbers = frozenset(plan.numbers(written))
    updates: list[StepUpdate] = []
    # What moves the sources runs first: the others follow the values that it makes.
    for one in sorted(plan.derived, key=lambda one: not one.trains):
        if one.trains and one not in trained:
            continue
        update = step_update(one, plan, Moved(frozenset(kinds), numbers))
        if update is not None:
            updates.append(update)
            numbers |= update.writes
    return updates
