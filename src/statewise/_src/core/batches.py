"""Batches of states: what `jax.vmap` makes of states under the plan of one model.

To JAX such a batch is a pytree like any other, and a mapped step accepts it.  But its plan does not know the additional
axis of its arrays, so it can be neither saved nor counted; `plan.stacked(...)` is a plan that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from statewise._src.common.compare import LeafFacts, compare_leaf, note_of
from statewise._src.common.nnx_graph import ArraySpec, spec_of
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems
from statewise._src.plan.members import Axis, grown
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import StructureError

__all__ = ["check_not_batch", "hint_of_batch", "misfit_error", "misfits"]

# The arrays of a state: by kind, in the order of their slots.
Parts = Mapping[str, Sequence[Any]]


_OTHERS = (
    "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)\n"
    "for other dtypes: state.cast(params='bfloat16')"
)


def check_not_batch(state: Any) -> None:
    """Checks that a state is not a batch under the plan of one model, or one member under the plan of an ensemble.

    Raises:
      StructureError: it is; the hint is the plan that fits it.
    """
    plan = state.tables
    parts = {kind: state.part(kind).arrays for kind in plan.kinds}
    leaves = misfits(plan, parts)
    if leaves and hint_of_batch(plan, parts) is not None:
        raise misfit_error(plan, parts, leaves)


def misfits(plan: PlanTables, parts: Parts) -> list[Leaf]:
    """Returns the leaves whose arrays do not have the shapes and dtypes of the plan."""
    problems = Problems()
    for kind, part in parts.items():
        for slot, array in zip(plan.stored[kind], part, strict=True):
            spec = slot.spec
            if getattr(array, "shape", None) != spec.shape or getattr(array, "dtype", None) != spec.dtype:
                found = spec_of(array)
                if found:  # JAX would narrow some dtypes of NumPy; the note shows the array's own
                    found = ArraySpec(found.shape, getattr(array, "dtype", found.dtype))
                facts = LeafFacts(None, (found or type(array),))
                problems.add(slot.leaf, note_of(compare_leaf(LeafFacts(None, (spec,)), facts), "state"))
    return problems.leaves


def misfit_error(plan: PlanTables, parts: Parts, leaves: Sequence[Leaf], hint: str | None = None) -> StructureError:
    """Returns the error for arrays that do not have the shapes and dtypes of the plan.

    Args:
      plan: the plan.
      parts: all arrays of the state.
      leaves: the leaves that do not fit.
      hint: a hint; by default what a batch of states can become, and how to get one state out of it.
    """
    if hint is None:
        batch = hint_of_batch(plan, parts)
        hint = _OTHERS if batch is None else f"{batch}\n{_OTHERS}"
    return StructureError("The state's arrays do not have the shapes and dtypes of its plan.", leaves=leaves, hint=hint)


def hint_of_batch(plan: PlanTables, parts: Parts) -> str | None:
    """Returns what a batch of states can become, as code; None if the arrays are not a batch."""
    if plan.ensemble is not None:
        if misfits(plan.ensemble.single, parts):
            return None
        return "one member of an ensemble: one = ensemble.member(0)  # a state of the single plan"
    # The number of states is one of the sizes in an array that has one axis more than planned.
    shapes = [getattr(array, "shape", None) for part in parts.values() for array in part]
    specs = [slot.spec for kind in parts for slot in plan.stored[kind]]
    pairs = zip(shapes, specs, strict=True)
    larger = [shape for shape, spec in pairs if shape is not None and len(shape) == len(spec.shape) + 1]
    for count in dict.fromkeys(size for shape in larger for size in shape if size):
        axes = _added_axes(plan, parts, count)
        if axes is not None:
            arguments = ", ".join([str(count), *_arguments(plan, axes)])
            return f"all of them as one ensemble: state = plan.stacked({arguments}).stack(states)"
    return None


def _added_axes(plan: PlanTables, parts: Parts, count: int) -> dict[str, list[Axis]] | None:
    """Returns the axis of size `count` that each array has in addition to its planned shape.

    It is None for an array of the planned shape.  If an array differs otherwise, the result is None.
    """
    axes: dict[str, list[Axis]] = {kind: [] for kind in parts}
    for kind, part in parts.items():
        for array, slot in zip(part, plan.stored[kind], strict=True):
            spec, shape, rank = slot.spec, getattr(array, "shape", None), len(slot.spec.shape)
            added = [axis for axis in range(rank + 1) if grown(spec.shape, axis, count) == shape]
            if getattr(array, "dtype", None) != spec.dtype or not (added or shape == spec.shape):
                return None
            axes[kind].append(None if shape == spec.shape else added[0])
    return axes


def _arguments(plan: PlanTables, axes: Mapping[str, Sequence[Axis]]) -> list[str]:
    """Returns the arguments of `plan.stacked` that give arrays these axes, as code."""
    averages = {average.into for average in plan.averages}  # they follow what they track
    arguments = []
    for kind, part in axes.items():
        if not part or kind in averages:
            continue
        if len(set(part)) == 1:
            # The first axis is the default, but optimizer state would follow the parameters.
            if part[0] != 0 or (kind == OPTIMIZER and plan.optimizers):
                arguments.append(f"{kind}={part[0]}")
            continue
        several = plan.several and kind != OPTIMIZER  # paths are then relative to their object
        slots = zip(plan.stored[kind], part, strict=True)
        by_path = {slot.leaf.path[several:]: axis for slot, axis in slots if axis is not None}
        arguments.append(f"{kind}=lambda path, shape: {by_path!r}.get(path)")
    return arguments
