"""Batches of states: what `jax.vmap` makes of a state under the plan of one model.

To JAX such a batch is a tree like any other, and a mapped step takes it.  But its plan says nothing of the additional
axis of its arrays, so it can be neither saved nor counted; `plan.stacked(...)` is a plan that does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from statewise.errors import StructureError
from statewise.layout import OPTIMIZER
from statewise.members import Axis, grown
from statewise.plan import Plan

__all__ = ["batch_of", "refuse_batch"]

# What the arrays of a state are called here: by kind, in the order of their slots.
Parts = Mapping[str, Sequence[Any]]


def refuse_batch(state: Any) -> None:
    """Raises for a batch of states under the plan of one model, and for one member under the plan of an ensemble.

    Raises:
      StructureError: it is one; the hint is the plan that fits it.
    """
    plan = state.plan
    found = batch_of(plan, {kind: state.part(kind).arrays for kind in plan.kinds})
    if found is not None:
        raise found


def batch_of(plan: Plan, parts: Parts) -> StructureError | None:
    """The error for a batch; None where the arrays are none, or not all of one."""
    if plan._members is not None:
        single = plan._members.single
        if _axes(single, parts, 0) is None or all(_fits(plan, kind, part) for kind, part in parts.items()):
            return None
        return StructureError(
            f"The plan is of an ensemble of {plan.members}, and these are the arrays of one member.",
            mend="one = state.member(0)  # of the ensemble: a state of the single plan",
        )
    shapes = [getattr(array, "shape", None) for part in parts.values() for array in part]
    specs = [spec for kind in parts for spec in plan._stored[kind]]
    larger = [
        (shape, spec.shape)
        for shape, spec in zip(shapes, specs, strict=True)
        if shape is not None and len(shape) == len(spec.shape) + 1
    ]
    for count in dict.fromkeys(size for shape, _ in larger for size in shape):
        axes = _axes(plan, parts, count)
        if axes is not None and any(axis is not None for part in axes.values() for axis in part):
            kinds = [kind for kind, part in axes.items() if any(axis is not None for axis in part)]
            return StructureError(
                f"This is a batch of {count} states, as jax.vmap makes it, under the plan of one: the arrays of "
                f"{', '.join(kinds)} have one axis more than the plan says.",
                kind=kinds[0] if len(kinds) == 1 else None,
                mend=f"ensemble = plan.stacked({', '.join([str(count), *_said(plan, axes)])})\n"
                "state = ensemble.stack(state)  # a state of the ensemble's plan\n"
                "or one of them: one = ensemble.stack(state).member(0)",
            )
    return None


def _fits(plan: Plan, kind: str, part: Sequence[Any]) -> bool:
    return all(
        getattr(array, "shape", None) == spec.shape for array, spec in zip(part, plan._stored[kind], strict=True)
    )


def _axes(plan: Plan, parts: Parts, count: int) -> dict[str, list[Axis]] | None:
    """The axis that each array has more than the plan says; None where one of them is not to be explained so."""
    found: dict[str, list[Axis]] = {}
    for kind, part in parts.items():
        found[kind] = []
        for array, spec in zip(part, plan._stored[kind], strict=True):
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


def _said(plan: Plan, axes: Mapping[str, Sequence[Axis]]) -> list[str]:
    """The arguments of `plan.stacked` that say these axes, as code."""
    averages = {one.into for one in plan._averages}
    said = []
    for kind, part in axes.items():
        if not part or kind in averages:
            continue
        if len(set(part)) == 1:
            if part[0] != 0 or (kind == OPTIMIZER and plan._groups):
                said.append(f"{kind}={part[0]}")
            continue
        leaves = plan._leaf_of_slot[kind]
        several = plan._several and kind != OPTIMIZER
        by_path = {leaf.path[several:]: axis for leaf, axis in zip(leaves, part, strict=True) if axis is not None}
        said.append(f"{kind}=lambda path, shape: {by_path!r}.get(path)")
    return said
