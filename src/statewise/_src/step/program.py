"""Turns a traced call into the function that is compiled.

There are two programs for a trace.  `_forward` runs it.  `_train` differentiates it with respect to the arrays of some
optimizers, applies these and moves the averages: it differentiates the jaxpr, so the user's code is traced once.  Both
map `(donated, read_only, args, kwargs)` to `(written, output)`, where `donated` and `written` are the arrays that
change and `read_only` those that are only read, each grouped by kind (see `operands`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import as_it_came
from statewise._src.step.average_update import Averaging, averagings
from statewise._src.step.operands import Operands, numbers_of, operands_of
from statewise._src.step.optimizer_update import Update
from statewise._src.step.trace import Traced

__all__ = ["Program", "program_of"]

Program = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def program_of(
    plan: PlanTables, traced: Traced, groups: Sequence[OptimizerGroup], axes: tuple[str, ...] = ()
) -> tuple[Program, Operands]:
    """Returns the program of a traced call, which trains if there are optimizers to run, and its operands.

    If it runs on each device of some mesh axes, loss and gradients are averaged over them.
    """
    read = {number for number in range(traced.inputs) if traced.effects.read[number]}
    written = set(numbers_of(plan, traced.written))
    if not groups:
        operands = operands_of(plan, read, written)
        return _as_they_came(_forward(plan, traced, operands)), operands
    updates = [Update.of(plan, group, written) for group in groups]
    whole = set()
    for update in updates:
        read |= update.reads
        written |= update.writes
        whole |= update.whole
    averages = averagings(plan, groups, traced.written, written)
    for average in averages:
        read |= average.reads
        written |= average.writes
        whole |= average.whole
    operands = operands_of(plan, read, written, whole)
    return _as_they_came(_train(plan, traced, operands, updates, averages, axes)), operands


def _as_they_came(run: Program) -> Program:
    """Gives each written array the type of its operand: on Explicit axes, the same sharding."""

    def program(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        written, out = run(donated, read_only, args, kwargs)
        typed = [
            tuple(as_it_came(new, old) for new, old in zip(*both, strict=True))
            for both in zip(written, donated, strict=True)
        ]
        return tuple(typed), out

    return program


def _forward(plan: PlanTables, traced: Traced, operands: Operands) -> Program:
    """Makes the program that runs the traced call."""
    spots = numbers_of(plan, traced.written)

    def program(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arrays = operands.unpack(donated, read_only)
        outputs, written = traced.run(arrays.flat + jax.tree.leaves((args, kwargs)))
        arrays.store(spots, written)
        return operands.pack(arrays), jax.tree.unflatten(traced.out_tree, outputs)

    return program


def _train(
    plan: PlanTables,
    traced: Traced,
    operands: Operands,
    updates: Sequence[Update],
    averages: Sequence[Averaging],
    axes: tuple[str, ...],
) -> Program:
    """Makes the program that differentiates the traced call, applies the optimizers, and moves the averages.

    Its output is the loss, or (loss, aux); with what was captured beside it if the step captures.
    """
    spots = numbers_of(plan, traced.written)

    def program(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arrays = operands.unpack(donated, read_only)
        rest = jax.tree.leaves((args, kwargs))
        before = list(arrays.flat)

        def loss_of(wrt: list[list[Any]]) -> tuple[Any, Any]:
            # The traced call reads parameters by number: put the values to differentiate in place of the current ones.
            values = list(before)
            for update, given in zip(updates, wrt, strict=True):
                for number, array in zip(update.params, given, strict=True):
                    values[number] = array
            outputs, written = traced.run(values + rest)
            return outputs[0], (outputs, written)

        wrt = [[before[number] for number in update.params] for update in updates]
        (_, (outputs, written)), grads = jax.value_and_grad(loss_of, has_aux=True)(wrt)
        if axes:
            grads, outputs = jax.lax.pmean(grads, axes), [jax.lax.pmean(outputs[0], axes), *outputs[1:]]
        # First the function's own writes, then the update on top of them, as with `nnx.Optimizer`: layers that
        # normalize their own weights are updated from the normalized ones.
        arrays.store(spots, written)
        for number, update in enumerate(updates):
            # Optimizers that evaluate the loss (a line search) vary their own group; the others stay as they were.
            def loss_of_group(given: Any, number: int = number, update: Update = update) -> Any:
                return loss_of([*wrt[:number], update.group.arrays(given), *wrt[number + 1 :]])[0]

            value_of = averaged(loss_of_group, axes) if axes else loss_of_group
            update.run(arrays, grads[number], outputs[0], value_of)
        for average in averages:
            average.run(arrays)
        return operands.pack(arrays), jax.tree.unflatten(traced.out_tree, outputs)

    return program


def averaged(loss_of: Callable[[Any], Any], axes: tuple[str, ...]) -> Callable[[Any], Any]:
    """Averages a loss, and its gradients, over the devices: for optimizers that evaluate it."""

    def value(given: Any) -> Any:
        return jax.lax.pmean(loss_of(given), axes)

    def forward(given: Any) -> tuple[Any, Any]:
        loss, pull = jax.vjp(loss_of, given)
        return jax.lax.pmean(loss, axes), pull

    def backward(pull: Any, cotangent: Any) -> Any:
        return jax.lax.pmean(pull(cotangent), axes)

    mean = jax.custom_vjp(value)
    mean.defvjp(forward, backward)
    return mean
