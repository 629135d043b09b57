"""One optimizer's update inside a compiled step: leaf by leaf, or on whole buffers if that is proven to be the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from statewise._src.common.nnx_graph import spec_of
from statewise._src.common.paths import format_shape
from statewise._src.common.problems import Problems
from statewise._src.plan.arrays import ArrayInfo, Spot, numbers_of
from statewise._src.plan.elementwise import GRAD, PARAM, Elementwise
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import PlanTables
from statewise._src.step.operands import Arrays, joined
from statewise._src.step.step_update import Gradients, Moved, StepUpdate, step_update
from statewise.errors import StructureError

__all__: list[str] = []


@dataclasses.dataclass(frozen=True, slots=True)
class _Whole:
    """A buffer of parameters that is updated as a whole.

    Attributes:
      spot: its kind and slot.
      leaves: which of the optimizer's leaves are in it, in order.
      moments: the kind and slot of each role's buffer.
    """

    spot: Spot
    leaves: tuple[int, ...]
    moments: dict[str, Spot]


@dataclasses.dataclass(frozen=True, slots=True)
class _Update:
    """One optimizer's update.

    Attributes:
      group: the optimizer and its leaves.
      params: the numbers of the arrays that it updates, in its order.
      arrays: the arrays of its own state.
      moments: their numbers.
      buffers: those that it updates as a whole; none if it goes leaf by leaf.
      proof: that it may; None if it goes leaf by leaf.
    """

    group: OptimizerGroup
    params: tuple[int, ...]
    arrays: tuple[ArrayInfo, ...]
    moments: tuple[int, ...]
    buffers: tuple[_Whole, ...]
    proof: Elementwise | None

    def run(self, arrays: Arrays, gradients: Gradients) -> None:
        """Updates the arrays."""
        grads = [gradients.of[number] for number in self.params]
        if self.group.overwrites:
            arrays.store(self.params, grads)
        elif self.proof is None:
            self._run_by_leaf(arrays, grads, gradients)
        else:
            self._run_on_buffers(self.proof, arrays, grads, gradients.loss)

    def _run_by_leaf(self, arrays: Arrays, grads: Sequence[Any], gradients: Gradients) -> None:
        """Runs Optax.  Extra arguments (`value`, `grad`, `value_fn`) go to the transformations that take them."""
        group, layout = self.group, self.group.layout
        params, grad = group.params([arrays.flat[number] for number in self.params]), group.params(grads)
        state = jax.tree.unflatten(layout.structure, [arrays.flat[number] for number in self.moments])

        def loss_of(params: Any) -> Any:
            return gradients.loss_with(self.params, group.arrays(params))

        updates, state = group.tx.update(grad, state, params, value=gradients.loss, grad=grad, value_fn=loss_of)
        moments = [jnp.asarray(leaf) for leaf in layout.structure.flatten_up_to(state)]
        self._check(moments)
        arrays.store(self.params, group.arrays(optax.apply_updates(params, updates)))
        arrays.store(self.moments, moments)

    def _run_on_buffers(self, proof: Elementwise, arrays: Arrays, grads: Sequence[Any], loss: Any) -> None:
        """Runs the proven primitives on buffers, and on the leaves outside of buffers."""
        params = [arrays.flat[number] for number in self.params]
        moments = [arrays.flat[number] for number in self.moments]
        run = proof.shared(params, grads, moments, jnp.asarray(loss, jnp.float32))
        for buffer in self.buffers:
            inputs = {PARAM: arrays.slots[buffer.spot], GRAD: joined([grads[leaf] for leaf in buffer.leaves])}
            inputs |= {role: arrays.slots[spot] for role, spot in buffer.moments.items()}
            # All leaves of a buffer have one signature: the first one's is the buffer's.
            for role, new in run.leaf(proof.signatures[buffer.leaves[0]], inputs).items():
                arrays.computed[buffer.spot if role == PARAM else buffer.moments[role]] = new
        in_buffers = {leaf for buffer in self.buffers for leaf in buffer.leaves}
        where = {owner: number for number, owner in zip(self.moments, proof.roles, strict=True) if owner is not None}
        for leaf, number in enumerate(self.params):
            if leaf in in_buffers:
                continue
            roles = [role for role, _ in proof.signatures[leaf] if role != PARAM]
            inputs = {PARAM: params[leaf], GRAD: grads[leaf]} | {role: arrays.flat[where[role, leaf]] for role in roles}
            for role, new in run.leaf(proof.signatures[leaf], inputs).items():
                arrays.flat[number if role == PARAM else where[role, leaf]] = new
        # Moments that all leaves share, such as the count of steps; None for a leaf's own.
        for number, new in zip(self.moments, run.shared_moments(), strict=True):
            if new is not None:
                arrays.flat[number] = new

    def _check(self, moments: Sequence[Any]) -> None:
        problems = Problems()
        for array, new in zip(self.arrays, moments, strict=True):
            if spec_of(new) != array.spec:
                problems.add(array.leaf, f"becomes {format_shape(new.shape)} {new.dtype}")
        problems.raise_as(
            StructureError,
            f"The optimizer of {self.group.label} changes the shape or dtype of its own state.",
            "an optimizer whose state keeps its dtypes; optax.adam(..., mu_dtype=...) fixes the moments'",
        )


def _whole_buffers(
    plan: PlanTables, proof: Elementwise, params: Sequence[int], moments: Sequence[int], written: Collection[int]
) -> tuple[_Whole, ...]:
    """Returns the buffers whose leaves have one signature and whose moments are in buffers of the same order."""
    leaf_of = {number: leaf for leaf, number in enumerate(params)}
    number_of = {owner: number for number, owner in zip(moments, proof.roles, strict=True) if owner is not None}
    # By the numbers of its arrays, in order: two buffers correspond if these do.
    spots = {slot.numbers: slot.spot for slot in plan.buffers}
    buffers = []
    for numbers, spot in spots.items():
        # The function must not have written them: the buffer that came in would be outdated.
        if not all(number in leaf_of and number not in written for number in numbers):
            continue
        leaves = tuple(leaf_of[number] for number in numbers)
        signature = proof.signatures[leaves[0]]
        if any(proof.signatures[leaf] != signature for leaf in leaves):
            continue
        rows = {role: tuple(number_of[role, leaf] for leaf in leaves) for role, _ in signature if role != PARAM}
        if all(row in spots for row in rows.values()):
            buffers.append(_Whole(spot, leaves, {role: spots[row] for role, row in rows.items()}))
    return tuple(buffers)


@step_update.register(OptimizerGroup)
def _(derived: OptimizerGroup, plan: PlanTables, moved: Moved) -> StepUpdate:
    placed = plan.arrays_of(derived)
    params, moments = numbers_of(placed.sources), numbers_of(placed.arrays)
    proof = derived.proof() if plan.packing else None
    buffers = _whole_buffers(plan, proof, params, moments, moved.numbers) if proof else ()
    update = _Update(derived, params, placed.arrays, moments, buffers, proof if buffers else None)
    reads = {*params, *moments}
    if update.proof is not None:
        # The moments of leaves in whole buffers are in buffers too, and are not read one by one.
        in_buffers = {leaf for buffer in buffers for leaf in buffer.leaves}
        owners = zip(moments, update.proof.roles, strict=True)
        reads -= {number for number, owner in owners if owner is not None and owner[1] in in_buffers}
    return StepUpdate(
        reads=reads,
        writes={*params, *moments},
        run=update.run,
        whole={spot for buffer in buffers for spot in (buffer.spot, *buffer.moments.values())},
        differentiates=params,
        overwrites=derived.overwrites,
    )
