"""Axes instead of arrays: what `jax.vmap` takes for a state.

`plan.axes(stats=0)` is a state of the plan with an axis, or None, instead of each array.  To JAX it is a pytree like
any other, so a state is mapped by plain `jax.vmap`: kinds that are not named are shared, and kinds with an axis have a
value for each call.  JAX itself reports, by kind and path, what cannot be known here: a kind without an axis that is
written under the map is "at vmap out_axes['stats/norm/mean'], got axis spec None but output was batched".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.problems import Problems
from statewise._src.core.state_data import StateData
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.members import Axis
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import DeclarationError, StructureError

__all__ = ["MappedAxis", "axes", "axes_of_members", "is_stream"]


MappedAxis = Axis | Callable[[Path, tuple[int, ...]], Axis]


def axes(plan: PlanTables, given: Mapping[str, object]) -> StateData:
    """Implements `Plan.axes`."""
    if plan.ensemble is not None:
        if given:
            raise DeclarationError(
                f"The axes of an ensemble's plan are those it was made with: {', '.join(given)} cannot have others.",
                kind=next(iter(given)),
                hint="plan.axes()  # on the plan of the ensemble, without arguments",
            )
        return StateData.of(plan, plan.slot_axes.values())
    _check_given(plan, given, "plan.axes({})")
    _check_streams(plan, given)
    # JAX maps what a state stores, so the axes are those of slots: a buffer has one for all of its arrays.
    slots = _in_slots(plan, _array_axes(plan, given, None))
    if _optimizer_follows(plan, given):
        slots[OPTIMIZER] = _mapped_counts([slot.spec for slot in plan.stored[OPTIMIZER]], slots[OPTIMIZER])
    _check_ranks({kind: [(slot.leaf, slot.spec) for slot in own] for kind, own in plan.stored.items()}, slots)
    return StateData.of(plan, slots.values())


def axes_of_members(plan: PlanTables, given: Mapping[str, object]) -> tuple[tuple[str, tuple[Axis, ...]], ...]:
    """Returns, for each kind, the axis of each of its arrays in an ensemble; by default the first.

    Raises:
      DeclarationError: a kind that does not exist; a value that is not an axis; averages with other axes than the
        values that they track.
      StructureError: leaves with too few dimensions for the axis, or arrays with several axes in one buffer; lists
        all of them.
    """
    _check_given(plan, given, "plan.stacked(8, {})")
    by_kind = _array_axes(plan, given, 0)
    _check_averages(plan, by_kind, given)
    if _optimizer_follows(plan, given):
        by_kind[OPTIMIZER] = _mapped_counts(plan.held_specs[OPTIMIZER], by_kind[OPTIMIZER])
    # The shapes that a state holds have the leading axis of per-device values: the members' axis counts in these.
    _check_ranks({kind: [(array.leaf, array.held) for array in own] for kind, own in plan.by_kind.items()}, by_kind)
    _in_slots(plan, by_kind)
    return tuple((kind, tuple(part)) for kind, part in by_kind.items())


def _check_given(plan: PlanTables, given: Mapping[str, object], call: str) -> None:
    for kind, axis in given.items():
        plan.kinds[kind]  # raises for a kind that does not exist
        if not (callable(axis) or _is_axis(axis)):
            raise DeclarationError(f"{kind}={axis!r} is not an axis.", kind=kind, hint=call.format(f"{kind}=0"))


def _optimizer_follows(plan: PlanTables, given: Mapping[str, object]) -> bool:
    return OPTIMIZER in plan.kinds and OPTIMIZER not in given


def _mapped_counts(specs: Sequence[ArraySpec], axes: Sequence[Axis]) -> list[Axis]:
    """Returns the axes of optimizer state: the first for an array that lacks its parameters' axis, such as a count."""
    return [axis if _has_axis(spec, axis) else 0 for spec, axis in zip(specs, axes, strict=True)]


def _array_axes(plan: PlanTables, given: Mapping[str, object], default: Axis) -> dict[str, list[Axis]]:
    """Returns the axis of each array of each kind; optimizer state and averages follow what they belong to."""
    by_kind = {kind: _kind_axes(plan, kind, given.get(kind, default)) for kind in plan.kinds}

    def of(arrays: Sequence[ArrayInfo]) -> list[Axis]:
        return [by_kind[array.kind][array.position] for array in arrays]

    for placed in plan.derived_arrays:
        if placed.derived.mirrors and placed.derived.into not in given:
            # Each average as its source.  The count of a schedule comes last: shared, or each member's own.
            tracked = of(placed.sources)
            first = None if default is None or _first(tracked) is None else 0
            by_kind[placed.derived.into][placed.start : placed.stop] = [*tracked, first][: len(placed.arrays)]
    if _optimizer_follows(plan, given):
        # Nothing records what an `nnx.Optimizer` among the objects updates: as NNX's own default, every `nnx.Param`.
        params = [
            array
            for array in plan.arrays
            if array.kind != OPTIMIZER and isinstance(array.leaf.type, type) and issubclass(array.leaf.type, nnx.Param)
        ]
        by_kind[OPTIMIZER] = [_first(of(params))] * len(plan.specs[OPTIMIZER])
        for placed in plan.derived_arrays:
            # Counts and norms differ between calls even if only some of the leaves that they belong to are mapped.
            if placed.derived.into == OPTIMIZER:
                by_kind[OPTIMIZER][placed.start : placed.stop] = [_first(of(placed.sources))] * len(placed.arrays)
    return by_kind


def _check_averages(plan: PlanTables, by_kind: Mapping[str, Sequence[Axis]], given: Mapping[str, object]) -> None:
    """Checks that averages have the axes of the values that they track: `with_averages` swaps one for the other."""
    problems = Problems()
    for placed in plan.derived_arrays:
        if not placed.derived.mirrors:
            continue
        for array, source in zip(placed.arrays, placed.sources, strict=False):
            axis, wanted = by_kind[array.kind][array.position], by_kind[source.kind][source.position]
            if axis != wanted:
                problems.add(array.leaf, f"axis {axis}, an average of a leaf with axis {wanted}")
    if problems:
        own = problems.leaves[0].kind
        rest = ", ".join(f"{kind}={axis!r}" for kind, axis in given.items() if kind != own and _is_axis(axis))
        hint = f"plan.stacked(8{', ' * bool(rest)}{rest})  # without {own}="
        problems.raise_as(DeclarationError, "Averages must have the axes of the values that they track.", hint)


def is_stream(leaf: Leaf, specs: Sequence[ArraySpec]) -> bool:
    """Returns whether a leaf is a random stream: one of NNX's, or anything else that holds a typed key."""
    keys = any(jnp.issubdtype(spec.dtype, jax.dtypes.prng_key) for spec in specs)
    return keys or (isinstance(leaf.type, type) and issubclass(leaf.type, nnx.RngState))


def _check_streams(plan: PlanTables, given: Mapping[str, object]) -> None:
    """Checks that it is declared whether random streams are shared.

    By default they would be: each member would draw the same noise, and nothing would show it.
    """
    rows = zip(plan.rows, plan.leaves, strict=False)
    problems = Problems(leaf for row, leaf in rows if row.kind not in given and is_stream(leaf, row.specs))
    kinds = list(dict.fromkeys(str(leaf.kind) for leaf in problems.leaves))
    said = [f"{kind}={axis!r}" for kind, axis in given.items() if _is_axis(axis)]
    own, same = (", ".join([*said, *(f"{kind}={axis}" for kind in kinds)]) for axis in (0, None))
    problems.raise_as(
        DeclarationError,
        f"The model has random streams in {', '.join(kinds)}, and plan.axes does not say whether they are shared.",
        f"plan.axes({own})  # each member draws noise of its own\n"
        f"or plan.axes({same})  # the same noise in all of them",
    )


def _is_axis(axis: object) -> bool:
    return axis is None or (isinstance(axis, int) and not isinstance(axis, bool))


def _kind_axes(plan: PlanTables, kind: str, given: Any) -> list[Axis]:
    """Returns the axis of each array of a kind, in the order of the plan."""
    if not callable(given):
        return [given] * len(plan.specs[kind])
    axes, problems = [], Problems()
    for array in plan.by_kind[kind]:
        # As for filters, a path within its object; derived leaves have paths of their own.
        path = plan.relative(array.leaf.path) if array.derived is None else array.leaf.path
        axes.append(given(path, array.spec.shape))
        if not _is_axis(axes[-1]):
            problems.add(array.leaf, f"given {axes[-1]!r}")
    problems.raise_as(
        DeclarationError,
        f"The function of kind {kind!r} returns something other than axes.",
        f"plan.axes({kind}=lambda path, shape: 0 if path[0] == 'head' else None)",
    )
    return axes


def _first(axes: Sequence[Axis]) -> Axis:
    return next((axis for axis in axes if axis is not None), None)


def _in_slots(plan: PlanTables, by_kind: Mapping[str, Sequence[Axis]]) -> dict[str, list[Axis]]:
    """Returns the axis of each slot, checked: arrays that share a buffer are mapped together."""
    slots: dict[str, list[Axis]] = {kind: [] for kind in plan.kinds}
    problems = Problems()
    for kind, stored in plan.stored.items():
        for slot in stored:
            own = [by_kind[kind][array.position] for array in slot.arrays]
            slots[kind].append(own[0])
            for array, axis in zip(slot.arrays, own, strict=True):
                if axis != own[0]:
                    problems.add(array.leaf, f"axis {axis}, packed with others of axis {own[0]}")
    problems.raise_as(
        StructureError,
        "Arrays that are packed into one buffer must have one axis.",
        "one axis for all of the kind, or take the state without pack=",
    )
    return slots


def _check_ranks(specs: Mapping[str, Sequence[tuple[Leaf, ArraySpec]]], axes: Mapping[str, Sequence[Axis]]) -> None:
    problems = Problems()
    for kind, part in axes.items():
        for (leaf, spec), axis in zip(specs[kind], part, strict=True):
            if not _has_axis(spec, axis):
                problems.add(leaf, f"has rank {len(spec.shape) + 1} with the new axis, which cannot be {axis}")
    if problems:
        kinds = list(dict.fromkeys(leaf.kind or "" for leaf in problems.leaves))
        problems.raise_as(
            StructureError,
            "{n} leaves have too few dimensions for the axis.",
            f"the first axis, which every array can have: plan.axes({', '.join(f'{kind}=0' for kind in kinds)})\n"
            f"or one for each: plan.axes({kinds[0]}=lambda path, shape: 1 if len(shape) > 1 else 0)",
        )


def _has_axis(spec: ArraySpec, axis: Axis) -> bool:
    rank = len(spec.shape) + 1  # the mapped axis comes on top of the leaf's own
    return axis is None or -rank <= axis < rank
