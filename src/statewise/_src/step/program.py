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
import jax.numpy as jnp

from statewise._src.plan.arrays import Spot
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import as_it_came
from statewise._src.step import average_update, optimizer_update  # noqa: F401 - they register their updates
from statewise._src.step.microbatches import Mean, PartResult, mean_of_parts
from statewise._src.step.nonfinite import all_finite, everywhere, keep_old, stays_finite
from statewise._src.step.operands import Operands, operands_of
from statewise._src.step.step_update import Gradients, StepUpdate, step_updates
from statewise._src.step.trace import Traced
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
    run = _train(plan, traced, operands, updates, axes, training) if groups else _forward(plan, traced, operands)
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


def _train(
    plan: PlanTables,
    traced: Traced,
    operands: Operands,
    updates: Sequence[StepUpdate],
    axes: tuple[str, ...],
    training: Training,
) -> Program:
    """Makes the program that differentiates the traced call and runs the updates: optimizers first, then averages.

    The output is the loss, or (loss, aux); `captured` beside it if the step captures.
    """
    numbers = plan.numbers(traced.written)
    differentiated = [number for update in updates for number in update.differentiates]
    # What the function itself writes changes from part to part, also where it is differentiated.
    fixed = set(differentiated).difference(numbers)
    dtype = traced.effects.jaxpr.outvars[0].aval.dtype

    def program(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arrays = operands.unpack(donated, read_only)
        leaves, before, slots = jax.tree.leaves((args, kwargs)), list(arrays.flat), dict(arrays.slots)
        start = [before[number] for number in numbers]
        wrt = {number: before[number] for number in differentiated}

        def loss_of(wrt: dict[int, Any], written: Sequence[Any], own: Sequence[Any]) -> tuple[Any, Any]:
            values = list(before)
            for number, array in (*zip(numbers, written, strict=True), *wrt.items()):
                values[number] = array
            outputs, new = traced.run(values + list(own))
            return outputs[0], (outputs, new)

        def differentiated_at(written: Sequence[Any], own: Sequence[Any]) -> PartResult:
            now = dict(zip(numbers, written, strict=True))
            own_wrt = {number: array if number in fixed else now[number] for number, array in wrt.items()}
            (_, (outputs, new)), grads = jax.value_and_grad(loss_of, has_aux=True)(own_wrt, written, own)
            return outputs, new, grads

        if training.is_plain:
            mean = Mean(*differentiated_at(start, leaves), True, None)
            if axes:
                loss, *others = mean.outputs
                loss, grads = jax.lax.pmean((loss, mean.grads), axes)
                mean = mean._replace(outputs=[loss, *others], grads=grads)
        else:
            mean = mean_of_parts(training, traced.batch, leaves, start, wrt, differentiated_at, dtype, axes)

        def loss_with(changed: Sequence[int], values: Sequence[Any]) -> Any:
            def loss_of_these(values: Sequence[Any]) -> Any:
                new = wrt | dict(zip(changed, values, strict=True))
                if training.is_plain:
                    return loss_of(new, start, leaves)[0]

                def run(written: Sequence[Any], own: Sequence[Any]) -> PartResult:
                    return *loss_of(new, written, own)[1], {}

                own = mean_of_parts(training, traced.batch, leaves, start, {}, run, dtype)
                # `averaged` takes the mean over the devices, each of which has its own sum of weights.
                share = own.weight * jax.lax.psum(1, axes) / mean.weight if axes else 1
                return own.outputs[0] * share

            return (averaged(loss_of_these, axes) if axes else loss_of_these)(list(values))

        # First what the function wrote, then the updates on top of it, as `nnx.Optimizer` has it: layers that
        # normalize their own weights are updated from the normalized ones.
        arrays.store(numbers, mean.written)
        for update in updates:
            update.run(arrays, Gradients(mean.outputs[0], mean.grads, loss_with))
        outputs = mean.outputs
        if training.weighted or training.skips_nonfinite:
            changes = jnp.asarray(mean.is_valid)
            if training.skips_nonfinite:
                changes &= all_finite([outputs[0], *mean.grads.values()]) & stays_finite(mean.written, start)
            changes = everywhere(changes, axes)
            keep_old(changes, plan, arrays, before, slots)
            # A loss that is finite would not say that nothing changed.
            outputs = [jnp.where(changes | ~jnp.isfinite(outputs[0]), outputs[0], jnp.nan), *outputs[1:]]
        return operands.pack(arrays), traced.result(outputs)

    return program


def averaged(loss_of: Callable[[Any], Any], axes: tuple[str, ...]) -> Callable[[Any], Any]:
    """Averages a loss, and its gradients, over the devices: for optimizers that evaluate the loss."""

    def value(given: Any) -> Any:
        return jax.lax.pmean(loss_of(given), axes)

    def forward(given: Any) -> tuple[Any, Any]:
        loss, pull = jax.vjp(loss_of, given)
        return jax.lax.pmean(loss, axes), pull

    def backward(pull: Any, cotangent: Any) -> Any:
        return jax.lax.pmean(pull(cotangent), axes)

    differentiable = jax.custom_vjp(value)
    differentiable.defvjp(forward, backward)
    return differentiable
