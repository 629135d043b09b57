"""Batches of states: what `jax.vmap` makes of a state under the plan of one model.

To JAX such a batch is a tree like any other, and a mapped step takes it.  But its plan says nothing of the additional
axis of its arrays, so it can be neither saved nor counted; `plan.stacked(...)` is a plan that does.
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

__all__ = ["check_not_batch", "hint_of_batch", "misfits", "unfitting"]

# What the arrays of a state are called here: by kind, in the order of their slots.
Parts = Mapping[str, Sequence[Any]]


_MESSAGE = "The state's arrays are not as its plan has them."
_OTHERS = (
    "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)\n"
    "for other dtypes: state.cast(params='bfloat16')"
)


def check_not_batch(state: Any) -> None:
    """Raises for a batch of states under the plan of one model, and for one member under the plan of an ensemble.

    Raises:
      StructureError: it is one; the hint is the plan that fits it.
    """
    plan = state.tables
    parts = {kind: state.part(kind).arrays for kind in plan.kinds}
    if hint_of_batch(plan, parts) is not None:
        raise unfitting(plan, parts, misfits(plan, parts))


def misfits(plan: PlanTables, parts: Parts) -> list[Leaf]:
    """The leaves whose arrays have not the shapes and dtypes of the plan."""
    problems = Problems()
    for kind, part in parts.items():
        for leaf, spec, array in zip(plan.leaf_of_slot[kind], plan.stored_specs[kind], part, strict=True):
            if getattr(array, "shape", None) != spec.shape or getattr(array, "dtype", None) != spec.dtype:
                found = spec_of(array)
                if found:  # of NumPy, which has more dtypes than JAX
                    found = ArraySpec(found.shape, getattr(array, "dtype", found.dtype))
                facts = LeafFacts(None, (found or type(array),))
                problems.add(leaf, note_of(compare_leaf(LeafFacts(None, (spec,)), facts), "state"))
    return problems.leaves


def unfitting(plan: PlanTables, parts: Parts, odd: Sequence[Leaf], hint: str | None = None) -> StructureError:
    """The error for arrays that are not as the plan has them.

    Args:
      plan: the plan.
      parts: all arrays of the state.
      odd: the leaves that do not fit.
      hint: a hint of the caller's own; by default what a batch of states can become, and how one gets one of them.
    """
    if hint is None:
        batch = hint_of_batch(plan, parts)
        hint = _OTHERS if batch is None else f"{batch}\n{_OTHERS}"
    return StructureError(_MESSAGE, leaves=odd, hint=hint)


def hint_of_batch(plan: PlanTables, parts: Parts) -> str | None:
    """What a batch of states can become, as code; None where the arrays are none, or not all of one."""
    if plan.ensemble is not None:
        single = plan.ensemble.single
        if _axes(single, parts, 0) is None or all(_fits(plan, kind, part) for kind, part in parts.items()):
            return None
        return "one member of an ensemble: one = ensemble.member(0)  # a state of the single plan"
    shapes = [getattr(array, "shape", None) for part in parts.values() for array in part]
    specs = [spec for kind in parts for spec in plan.stored_specs[kind]]
    pairs = zip(shapes, specs, strict=True)
    larger = [shape for shape, spec in pairs if shape is not None and len(shape) == len(spec.shape) + 1]
    for count in dict.fromkeys(size for shape in larger for size in shape):
        axes = _axes(plan, parts, count)
        if axes is not None:
            said = ", ".join([str(count), *_said(plan, axes)])
            return f"all of them as one ensemble: state = plan.stacked({said}).stack(states)"
    return None


def _fits(plan: PlanTables, kind: str, part: Sequence[Any]) -> bool:
    return all(
        getattr(array, "shape", None) == spec.shape for array, spec in zip(part, plan.stored_specs[kind], strict=True)
    )


def _axes(plan: PlanTables, parts: Parts, count: int) -> dict[str, list[Axis]] | None:
    """The axis that each array has more than the plan says; None where one of them is not to be explained so."""
    found: dict[str, list[Axis]] = {}
    for kind, part in parts.items():
        found[kind] = []
        for array, spec in zip(part, plan.stored_specs[kind], strict=True):
            shape = getattr(array, "shape", None)
            if getattr(array, "dtype", None) != spec.dtype or shape is None:
                return None
            if shape == spec.shape:
                found[kind].append(None)
                continue
            axes = [axis for axis in range(len(spec.shape) + 1) if grown(spec.shape, axis, count) == shape]
            if not axes or not count:
                return None
            found[kind].append(axes[0])
    return found


def _said(plan: PlanTables, axes: Mapping[str, Sequence[Axis]]) -> list[str]:
    """The arguments of `plan.stacked` that say these axes, as code."""
    averages = {one.into for one in plan.averages}
    said = []
    for kind, part in axes.items():
        if not part or kind in averages:
            continue
        if len(set(part)) == 1:
            if part[0] != 0 or (kind == OPTIMIZER and plan.optimizers):
                said.append(f"{kind}={part[0]}")
            continue
        leaves = plan.leaf_of_slot[kind]
        several = plan.several and kind != OPTIMIZER
        by_path = {leaf.path[several:]: axis for leaf, axis in zip(leaves, part, strict=True) if axis is not None}
        said.append(f"{kind}=lambda path, shape: {by_path!r}.get(path)")
    return said
