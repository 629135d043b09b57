"""From a traced call to the function that gets compiled.

Two programs are made of the same trace.  `forward` runs it.  `train` differentiates it with respect to the
arrays of some optimizers, applies these and moves the averages: the jaxpr is the function that is differentiated, so
the user's code is traced once.  Both go from `(donated, kept, args, kwargs)` to `(written, output)`, where `donated`
and `written` are the arrays that change and `kept` those that are only read, each grouped by kind (see `routes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import as_it_came
from statewise._src.step.average_update import Averaging, averagings
from statewise._src.step.operands import Operands, numbers_of, routes_of
from statewise._src.step.optimizer_update import Update
from statewise._src.step.trace import Traced

__all__ = ["Program", "program_of"]

Program = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def program_of(
    plan: PlanTables, traced: Traced, groups: Sequence[OptimizerGroup], axes: tuple[str, ...] = ()
) -> tuple[Program, Operands]:
    """The program of a traced call, which trains if there are optimizers to run, and its routes.

    Where it runs on each device of some mesh axes, loss and gradients are averaged over them.
    """
    read = {number for number in range(traced.inputs) if traced.effects.read[number]}
    written = set(numbers_of(plan, traced.written))
    if not groups:
        routes = routes_of(plan, read, written)
        return _as_they_came(_forward(plan, traced, routes)), routes
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
    routes = routes_of(plan, read, written, whole)
    return _as_they_came(_train(plan, traced, routes, updates, averages, axes)), routes


def _as_they_came(run: Program) -> Program:
    """The program, which gives back what it writes with the types that it came with: on Explicit axes, split alike."""

    def program(donated: Any, kept: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        written, out = run(donated, kept, args, kwargs)
        held = [
            tuple(as_it_came(new, old) for new, old in zip(*both, strict=True))
            for both in zip(written, donated, strict=True)
        ]
        return tuple(held), out

    return program


def _forward(plan: PlanTables, traced: Traced, routes: Operands) -> Program:
    """Runs the traced call."""
    spots = numbers_of(plan, traced.written)

    def program(donated: Any, kept: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arrays = routes.spread(donated, kept)
        outputs, written = traced.run(arrays.flat + jax.tree.leaves((args, kwargs)))
        arrays.store(spots, written)
        return routes.gather(arrays), jax.tree.unflatten(traced.out_tree, outputs)

    return program


def _train(
    plan: PlanTables,
    traced: Traced,
    routes: Operands,
    updates: Sequence[Update],
    averages: Sequence[Averaging],
    axes: tuple[str, ...],
) -> Program:
    """Differentiates the traced call, applies the optimizers, and moves the averages.

    The output is the loss, or (loss, aux); `captured` beside it if the step captures.
    """
    spots = numbers_of(plan, traced.written)

    def program(donated: Any, kept: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        arrays = routes.spread(donated, kept)
        rest = jax.tree.leaves((args, kwargs))
        before = list(arrays.flat)

        def loss_of(wrt: list[list[Any]]) -> tuple[Any, Any]:
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
        # First what the function wrote, then the update on top of it, as `nnx.Optimizer` has it: layers that
        # normalise their own weights are updated from the normalised ones.
        arrays.store(spots, written)
        for number, update in enumerate(updates):

            def loss_of_group(given: Any, number: int = number, update: Update = update) -> Any:
                return loss_of([*wrt[:number], update.group.arrays(given), *wrt[number + 1 :]])[0]

            value_of = averaged(loss_of_group, axes) if axes else loss_of_group
            update.run(arrays, grads[number], outputs[0], value_of)
        for average in averages:
            average.run(arrays)
        return routes.gather(arrays), jax.tree.unflatten(traced.out_tree, outputs)

    return program


def averaged(loss_of: Callable[[Any], Any], axes: tuple[str, ...]) -> Callable[[Any], Any]:
    """A loss averaged over the devices, with gradients that are averaged too: for optimizers that evaluate it."""

    def value(given: Any) -> Any:
        return jax.lax.pmean(loss_of(given), axes)

    def forward(given: Any) -> tuple[Any, Any]:
        loss, pull = jax.vjp(loss_of, given)
        return jax.lax.pmean(loss, axes), pull

    def backward(pull: Any, cotangent: Any) -> Any:
        return jax.lax.pmean(pull(cotangent), axes)

    made = jax.custom_vjp(value)
    made.defvjp(forward, backward)
    return made
