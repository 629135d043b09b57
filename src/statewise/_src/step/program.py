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
from statewise._src.step.step_update import Gradients, StepUpdate, step_updates
from statewise._src.step.trace import Traced

__all__ = ["Program", "program_of"]

Program = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def program_of(
    plan: PlanTables, traced: Traced, groups: Sequence[OptimizerGroup], axes: tuple[str, ...] = ()
) -> tuple[Program, Operands]:
    """Returns the program of a traced call, which trains if there are optimizers to run, and its operands.

    If it runs on each device of some mesh axes, loss and gradients are averaged over them.
    """
    updates = step_updates(plan, groups, traced.written)
    read = set(itertools.compress(range(traced.inputs), traced.effects.read))
    operands = operands_of(
        plan,
        read.union(*(update.reads for update in updates)),
        set(plan.numbers(traced.written)).union(*(update.writes for update in updates)),
        frozenset[Spot]().union(*(update.whole for update in updates)),
    )
    run = _train(plan, traced, operands, updates, axes) if groups else _forward(plan, traced, operands)
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
        return operands.pack(arrays), jax.tree.unflatten(traced.out_tree, outputs)

    return program


def _train(
    plan: PlanTables, traced: Traced, operands: Operands, updates: Sequence[StepUpdate], axes: tuple[str, ...]
) -> Program:
    """Makes the program that differentiates the traced call and runs the updates: optimizers first, then averages.

    The output is the loss, or (loss, aux); `captured` beside it if the step captures.
    """
    numbers = plan.numbers(traced.written)
    differentiated = [number for update in updates for number in update.differentiates]

    def program(donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arrays = operands.unpack(donated, read_only)
        rest = jax.tree.leaves((args, kwargs))
        before = list(arrays.flat)

        def loss_of(wrt: dict[int, Any]) -> tuple[Any, Any]:
            values = list(before)
            for number, array in wrt.items():
                values[number] = array
            outputs, written = traced.run(values + rest)
            return outputs[0], (outputs, written)

        wrt = {number: before[number] for number in differentiated}
        (_, (outputs, written)), grads = jax.value_and_grad(loss_of, has_aux=True)(wrt)
        if axes:
            grads, outputs = jax.lax.pmean(grads, axes), [jax.lax.pmean(outputs[0], axes), *outputs[1:]]

        def loss_with(numbers: Sequence[int], values: Sequence[Any]) -> Any:
            def loss_of_these(values: Sequence[Any]) -> Any:
                return loss_of(wrt | dict(zip(numbers, values, strict=True)))[0]

            return (averaged(loss_of_these, axes) if axes else loss_of_these)(list(values))

        # First what the function wrote, then the updates on top of it, as `nnx.Optimizer` has it: layers that
        # normalize their own weights are updated from the normalized ones.
        arrays.store(numbers, written)
        for update in updates:
            update.run(arrays, Gradients(outputs[0], grads, loss_with))
        return operands.pack(arrays), jax.tree.unflatten(traced.out_tree, outputs)

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
