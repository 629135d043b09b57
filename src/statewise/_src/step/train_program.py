"""The program of a train step: gradients of the traced call, then optimizers, then averages.

The jaxpr of the trace is the function that is differentiated, so the user's code is traced once, also where a loop runs
it on one part of the batch after another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.plan.arrays import Spot
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import as_it_came
from statewise._src.step.instruments import Pair, columns_of, current_arrays, measured_of
from statewise._src.step.measured import Measured
from statewise._src.step.microbatches import Mean, PartResult, mean_of_parts
from statewise._src.step.nonfinite import all_finite, everywhere, keep_old, protected, stays_finite
from statewise._src.step.operands import Arrays, Operands
from statewise._src.step.step_update import Gradients, StepUpdate
from statewise._src.step.trace import Traced
from statewise._src.step.training import Training

__all__ = ["TrainProgram"]


class TrainProgram:
    """A function from (donated, read_only, args, kwargs) to (written, output).

    The output is the loss, or (loss, aux); `captured` beside it if the step captures.  A step that measures returns
    (loss, measured) in place of the loss.

    Args:
      plan: the plan.
      traced: the traced call; of one part, if the batch is split.
      operands: the arrays that are passed.
      updates: the updates, in the order in which they run.
      axes: the mesh axes over whose devices loss and gradients are averaged.
      training: the options of the step.
    """

    def __init__(
        self,
        plan: PlanTables,
        traced: Traced,
        operands: Operands,
        updates: Sequence[StepUpdate],
        axes: tuple[str, ...],
        training: Training,
    ) -> None:
        self.plan, self.traced, self.operands, self.updates = plan, traced, operands, updates
        self.axes, self.training = axes, training
        self.written = plan.numbers(traced.written)
        self.differentiated = [number for update in updates for number in update.differentiates]
        self.overwritten = [number for update in updates if update.overwrites for number in update.differentiates]
        # What changes from part to part: what the function writes, and what its gradients replace.
        self.carried = [*self.written, *self.overwritten]
        self.changed = sorted({*self.written, *(number for update in updates for number in update.writes)})
        self.dtype = traced.effects.jaxpr.outvars[0].aval.dtype
        self.columns = columns_of(plan, training.measures, self.written, self.differentiated)

    def __call__(self, donated: Any, read_only: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Runs the step."""
        arrays = self.operands.unpack(donated, read_only)
        before, slots, leaves = list(arrays.flat), dict(arrays.slots), jax.tree.leaves((args, kwargs))
        mean = self._gradients(before, leaves)
        # First what the function wrote, then the updates on top of it, as `nnx.Optimizer` has it: layers that
        # normalize their own weights are updated from the normalized ones.
        arrays.store(self.written, mean.written)
        loss, *others = mean.outputs
        gradients = Gradients(loss, mean.grads, functools.partial(self._loss_with, before, leaves))
        if self.training.may_keep:
            changes = jnp.asarray(mean.is_valid)
            if self.training.skips_nonfinite:
                changes &= all_finite([loss, *mean.grads.values()])
                changes &= stays_finite(mean.written, [before[number] for number in self.written])
            changes = everywhere(changes, self.axes)
            self._update_if(changes, arrays, gradients, before, slots)
            # A loss that is finite would not say that nothing changed.
            loss = jnp.where(changes | ~jnp.isfinite(loss), loss, jnp.nan)
        else:
            self._update(arrays, gradients)
        if self.training.measures:
            loss = (loss, self._measured(arrays, before, mean))
        return self.operands.pack(arrays), self.traced.result([loss, *others])

    def _update(self, arrays: Arrays, gradients: Gradients) -> None:
        for update in self.updates:
            update.run(arrays, gradients)

    def _update_if(
        self, changes: Any, arrays: Arrays, gradients: Gradients, before: Sequence[Any], slots: Mapping[Spot, Any]
    ) -> None:
        """Updates the arrays, or puts the old ones back where the step changes nothing."""
        # XLA's CPU backend updates in place inside a branch, and makes copies for a select.  Elsewhere a branch waits
        # for the host or splits kernels.  On each device of a mesh by itself, both branches would have to agree on
        # what varies between the devices.
        if self.axes or jax.default_backend() != "cpu":
            self._update(arrays, gradients)
            keep_old(changes, self.plan, arrays, before, slots)
            return

        def updated() -> tuple[list[Any], dict[Spot, Any]]:
            own = Arrays(list(arrays.flat), arrays.slots, dict(arrays.computed))
            self._update(own, gradients)
            new = [as_it_came(own.flat[number], before[number]) for number in kept]
            return new, {spot: own.computed[spot] for spot in whole}

        def old() -> tuple[list[Any], dict[Spot, Any]]:
            return [before[number] for number in kept], {spot: slots[spot] for spot in whole}

        kept = protected(self.plan, self.changed, before)
        whole = frozenset[Spot]().union(*(update.whole for update in self.updates))
        new, computed = jax.lax.cond(changes, updated, old)
        arrays.store(kept, new)
        arrays.computed |= computed

    def _measured(self, arrays: Arrays, before: Sequence[Any], mean: Mean) -> Measured:
        """Returns the figures of a step that has run."""
        written = dict(zip(self.written, mean.written, strict=True))
        new = current_arrays(self.plan, arrays, self.differentiated)
        pairs: dict[str, Callable[[int], Pair]] = {
            "written": lambda number: (written[number], None),
            "grads": lambda number: (mean.grads[number], None),
            "updates": lambda number: (new[number], before[number]),
            "params": lambda number: (new[number], None),
        }
        return measured_of(self.columns, [pairs[what](number) for what, number in self.columns.entries], self.axes)

    def _run(
        self, before: Sequence[Any], changed: dict[int, Any], own: Sequence[Any]
    ) -> tuple[Any, tuple[list[Any], list[Any]]]:
        """Runs the traced call on a state with some arrays changed; returns the loss, and (outputs, written)."""
        values = list(before)
        for number, array in changed.items():
            values[number] = array
        outputs, written = self.traced.run(values + list(own))
        return outputs[0], (outputs, written)

    def _gradients(self, before: Sequence[Any], leaves: Sequence[Any]) -> Mean:
        """Returns loss, gradients and written arrays of the batch."""
        wrt = {number: before[number] for number in self.differentiated}
        start = [before[number] for number in self.carried]

        def of_part(carried: Sequence[Any], own: Sequence[Any]) -> PartResult:
            now = dict(zip(self.carried, carried, strict=True))
            loss_of = lambda wrt: self._run(before, now | wrt, own)  # noqa: E731
            at = {number: now.get(number, array) for number, array in wrt.items()}
            (_, (outputs, written)), grads = jax.value_and_grad(loss_of, has_aux=True)(at)
            replaced = [grads[number] for number in self.overwritten]
            if self.training.weighted:  # a part of weight 0 replaces nothing
                old = [now[number] for number in self.overwritten]
                replaced = [jnp.where(outputs[1] == 0, *pair) for pair in zip(old, replaced, strict=True)]
            return outputs, [*written, *replaced], grads

        count = len(self.written)
        if not self.training.is_plain:
            mean = mean_of_parts(self.training, self.traced.batch, leaves, start, wrt, of_part, self.dtype, self.axes)
            last = dict(zip(self.overwritten, mean.written[count:], strict=True))
            last = jax.lax.pmean(last, self.axes) if self.axes else last
            return mean._replace(written=mean.written[:count], grads=mean.grads | last)
        (loss, *others), written, grads = of_part(start, leaves)
        if self.axes:
            loss, grads = jax.lax.pmean((loss, grads), self.axes)
        return Mean([loss, *others], written[:count], grads, True)

    def _loss_with(
        self, before: Sequence[Any], leaves: Sequence[Any], numbers: Sequence[int], values: Sequence[Any]
    ) -> Any:
        """Returns the loss of the batch with other values of some arrays: for optimizers that evaluate it."""

        def loss_of(values: Sequence[Any]) -> Any:
            return self._run(before, dict(zip(numbers, values, strict=True)), leaves)[0]

        if not self.training.is_plain:
            return self._loss_of_parts(before, leaves, numbers)(list(values))
        return (_averaged(loss_of, self.axes) if self.axes else loss_of)(list(values))

    def _loss_of_parts(
        self, before: Sequence[Any], leaves: Sequence[Any], numbers: Sequence[int]
    ) -> Callable[[list[Any]], Any]:
        """Returns the loss as a function of some arrays, whose gradient is taken of one part after another.

        JAX's own gradient of the loop would keep what the backward pass of every part needs, and would be NaN where
        the mean of a part without weight is 0 / 0, although the part does not count.
        """
        start = [before[number] for number in self.carried]

        def mean_at(values: Sequence[Any], differentiates: bool) -> Mean:
            new = dict(zip(numbers, values, strict=True))

            def of_part(carried: Sequence[Any], own: Sequence[Any]) -> PartResult:
                now = dict(zip(self.carried, carried, strict=True))
                grads: dict[int, Any] = {}
                loss_of = lambda new: self._run(before, now | new, own)  # noqa: E731
                if differentiates:
                    (_, (outputs, written)), grads = jax.value_and_grad(loss_of, has_aux=True)(new)
                else:
                    outputs, written = loss_of(new)[1]
                return outputs, [*written, *(now[number] for number in self.overwritten)], grads

            wrt = new if differentiates else {}
            return mean_of_parts(self.training, self.traced.batch, leaves, start, wrt, of_part, self.dtype, self.axes)

        def forward(values: Sequence[Any]) -> tuple[Any, Any]:
            mean = mean_at(values, differentiates=True)
            return mean.outputs[0], [mean.grads[number] for number in numbers]

        def backward(grads: Sequence[Any], cotangent: Any) -> Any:
            return ([(cotangent * grad).astype(grad.dtype) for grad in grads],)

        loss = jax.custom_vjp(lambda values: mean_at(values, differentiates=False).outputs[0])
        loss.defvjp(forward, backward)
        return loss


def _averaged(loss_of: Callable[[Any], Any], axes: tuple[str, ...]) -> Callable[[Any], Any]:
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
