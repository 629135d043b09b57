"""From a traced call to the function that gets compiled.

Two programs are made of the same trace.  `forward` runs it.  `train` differentiates it with respect to the
arrays of some optimizers, applies these and moves the averages: the jaxpr is the function that is differentiated, so
the user's code is traced once.  Both go from `(donated, read_only, args, kwargs)` to `(written, output)`, where
`donated` and `written` are the arrays that change and `read_only` those that are only read, each grouped by kind (see
`operands`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from statewise._src.plan.arrays import Spot
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import as_it_came
from statewise._src.step import average_update, optimizer_update  # noqa: F401 - they register their updates
from statewise._src.step.operands import Operands, operands_of
from statewise._src.step.step_update import step_updates
from statewise._src.step.trace import Traced
from statewise._src.step.train_program import TrainProgram
from statewise._src.step.training import PLAIN, Training

__all__ = ["Program", "program_of"]

Program = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def program_of(
    plan: PlanTables,
    traced: Traced,
    groups: Sequence[OptimizerGroup],
    axes: tuple[str, ...] = (),
    training: Training = PLAIN,
) -> tuple[Program, Operands]:
    """Returns the program of a traced call, which trains if there are optimizers to run, and its operands.

    Args:
      plan: the plan.
      traced: the traced call; of one part, if the batch is split.
      groups: the optimizers to run.
      axes: the mesh axes on each device of which it runs: loss and gradients are averaged over them.
      training: the options of a train step.
    """
    updates = step_updates(plan, groups, traced.written)
    read = set(itertools.compress(range(traced.inputs), traced.effects.read))
    operands = operands_of(
        plan,
        read.union(*(update.reads for update in updates)),
        set(plan.numbers(traced.written)).union(*(update.writes for update in updates)),
        frozenset[Spot]().union(*(update.whole for update in updates)),
    )
    run = TrainProgram(plan, traced, operands, updates, axes, training) if groups else _forward(plan, traced, operands)
    return _as_they_came(run), operands


def _as_they_came(run: Program) -> Program:
    """Wraps a program so that what it writes keeps the types of its operands: on Explicit axes, the same sharding."""

    def program(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        written, out = run(donated, read_only, args, kwargs)
        return tuple(tuple(map(as_it_came, *pair)) for pair in zip(written, donated, strict=True)), out

    return program


def _forward(plan: PlanTables, traced: Traced, operands: Operands) -> Program:
    """Makes the program that runs the traced call."""
    numbers = plan.numbers(traced.written)

    def program(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arrays = operands.unpack(donated, read_only)
        outputs, written = traced.run(arrays.flat + jax.tree.leaves((args, kwargs)))
        arrays.store(numbers, written)
        return operands.pack(arrays), traced.result(outputs)

    return program
