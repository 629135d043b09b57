"""Axes instead of arrays: what `jax.vmap` takes for a state.

`plan.axes(stats=0)` is a state of the plan with an axis, or None, in the place of each array.  To JAX it is a tree
like any other, so a state is mapped by plain `jax.vmap`: kinds that are not named are one for all, those with an axis
are many, one for each turn.  What cannot be known here, JAX says itself, by kind and path: a kind without an axis that
is written under the map is "at vmap out_axes['stats/norm/mean'], got axis spec None but output was batched".
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
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.members import Axis
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import DeclarationError, StructureError

__all__ = ["MappedAxis", "axes", "axes_of_members", "is_stream"]


MappedAxis = Axis | Callable[[Path, tuple[int, ...]], Axis]


def axes(plan: PlanTables, given: Mapping[str, Any]) -> StateData:
    """See `Plan.axes`."""
    if plan.ensemble is not None:
        if given:
            raise DeclarationError(
                f"The axes of an ensemble's plan are those it was made with: {', '.join(given)} cannot have others.",
                kind=next(iter(given)),
                hint="plan.axes()  # on the plan of the ensemble, without arguments",
            )
        return StateData.of(plan, plan.slot_axes.values())
    _check_given(plan, given, "plan.axes({})")
    _check_untold(plan, given)
    found, follows = _found(plan, given, None)
    slots = _in_slots(plan, found)
    if follows:
        # A count has no second axis: it is mapped along the first.
        specs = plan.stored_specs[OPTIMIZER]
        slots[OPTIMIZER] = [axis if _has(spec, axis) else 0 for axis, spec in zip(slots[OPTIMIZER], specs, strict=True)]
    _check_ranks(plan.stored_specs, plan.leaf_of_slot, slots)
    return StateData.of(plan, slots.values())


def axes_of_members(plan: PlanTables, given: Mapping[str, Any]) -> tuple[tuple[str, tuple[Axis, ...]], ...]:
    """For each kind the axis of each of its arrays in an ensemble: the first, where nothing else is said.

    Raises:
      DeclarationError: a kind that is not there; something that is not an axis; averages apart from what they are of.
      StructureError: leaves of too few dimensions for their axis, arrays of several axes in one buffer; all of them.
    """
    _check_given(plan, given, "plan.stacked(8, {})")
    found, follows = _found(plan, given, 0)
    _check_averages(plan, found, given)
    if follows:
        specs = plan.held_specs[OPTIMIZER]
        found[OPTIMIZER] = [axis if _has(spec, axis) else 0 for axis, spec in zip(found[OPTIMIZER], specs, strict=True)]
    _check_ranks(plan.held_specs, plan.leaf_of_array, found)
    _in_slots(plan, found)
    return tuple((kind, tuple(part)) for kind, part in found.items())


def _check_given(plan: PlanTables, given: Mapping[str, Any], call: str) -> None:
    for kind, axis in given.items():
        if kind not in plan.kinds:
            raise unknown_kind(kind, plan.kinds)
        if not (callable(axis) or _is_axis(axis)):
            raise DeclarationError(f"{kind}={axis!r} is not an axis.", kind=kind, hint=call.format(f"{kind}=0"))


def _found(plan: PlanTables, given: Mapping[str, Any], default: Axis) -> tuple[dict[str, list[Axis]], bool]:
    """The axis of each array of each kind, and whether those of optimizer state follow what it is of."""
    found = {kind: _each(plan, kind, given.get(kind, default)) for kind in plan.kinds}
    for one in plan.derived_arrays:
        into = found[one.derived.into]
        if one.derived.mirrors and one.derived.into not in given:
            # Each as what it is the average of; the count of a schedule is one for all, or each member's own.
            of = [found[source.kind][source.position] for source in one.sources]
            into[one.start : one.start + len(of)] = of
            if default is not None and len(one.arrays) > len(of):
                into[one.start + len(of)] = 0 if _first(of) is not None else None
    follows = OPTIMIZER in plan.kinds and OPTIMIZER not in given
    if follows:
        found[OPTIMIZER] = _followed(plan, found)
    return found, follows


def _check_averages(plan: PlanTables, found: Mapping[str, Sequence[Axis]], given: Mapping[str, Any]) -> None:
    """An average is read in the place of what it is of, so each member has the one where it has the other."""
    problems = Problems()
    for one in plan.derived_arrays:
        if not one.derived.mirrors:
            continue
        for array, source in zip(one.arrays, one.sources, strict=False):
            axis, wanted = found[array.kind][array.position], found[source.kind][source.position]
            if axis != wanted:
                problems.add(array.leaf, f"axis {axis}, an average of what has axis {wanted}")
    if problems:
        own = problems.leaves[0].kind
        rest = ", ".join(f"{kind}={axis!r}" for kind, axis in given.items() if kind != own and _is_axis(axis))
        hint = f"plan.stacked(8{', ' * bool(rest)}{rest})  # without {own}="
        problems.raise_as(DeclarationError, "Averages have the axes of what they are of.", hint)


def is_stream(leaf: Leaf, specs: Sequence[ArraySpec]) -> bool:
    """Whether a leaf is a random stream: one of NNX's, or whatever else holds a typed key."""
    keys = any(jnp.issubdtype(spec.dtype, jax.dtypes.prng_key) for spec in specs)
    return keys or (isinstance(leaf.type, type) and issubclass(leaf.type, nnx.RngState))


def _check_untold(plan: PlanTables, given: Mapping[str, Any]) -> None:
    """Raises where nothing says whether the members share their random streams.

    By the default, one for all, each would draw the same noise, and nothing would show it.
    """
    rows = zip(plan.rows, plan.leaves, strict=False)
    untold = Problems(leaf for row, leaf in rows if row.kind not in given and is_stream(leaf, row.specs))
    if untold:
        kinds = list(dict.fromkeys(str(leaf.kind) for leaf in untold.leaves))
        said = [f"{kind}={axis!r}" for kind, axis in given.items() if _is_axis(axis)]
        own, same = (", ".join([*said, *(f"{kind}={axis}" for kind in kinds)]) for axis in (0, None))
        untold.raise_as(
            DeclarationError,
            f"The model has random streams in {', '.join(kinds)}, and plan.axes is not given what becomes of them.",
            f"plan.axes({own})  # each member draws noise of its own\n"
            f"or plan.axes({same})  # the same noise in all of them",
        )


def _is_axis(axis: Any) -> bool:
    return axis is None or (isinstance(axis, int) and not isinstance(axis, bool))


def _each(plan: PlanTables, kind: str, given: Any) -> list[Axis]:
    """The axis of each array of a kind, in the order of the plan."""
    specs = plan.specs[kind]
    if not callable(given):
        return [given] * len(specs)
    found, problems = [], Problems()
    derived = frozenset(plan.leaves[len(plan.rows) :])
    for leaf, spec in zip(plan.leaf_of_array[kind], specs, strict=True):
        path = leaf.path if leaf in derived else plan.relative(leaf.path)
        axis = given(path, spec.shape)
        found.append(axis)
        if not _is_axis(axis):
            problems.add(leaf, f"given {axis!r}")
    problems.raise_as(
        DeclarationError,
        f"The function of kind {kind!r} gives something else than axes.",
        f"plan.axes({kind}=lambda path, shape: 0 if path[0] == 'head' else None)",
    )
    return found


def _followed(plan: PlanTables, found: Mapping[str, Sequence[Axis]]) -> list[Axis]:
    """The axes of optimizer state: of all that one optimizer keeps as soon as something that it updates is mapped.

    Even where only some of its leaves are mapped, its counts and norms come out different for each of them.
    """
    # Nothing tells what an `nnx.Optimizer` among the objects updates: as NNX's own default, every `nnx.Param`.
    params = [
        axis
        for kind in plan.kinds
        if kind != OPTIMIZER
        for leaf, axis in zip(plan.leaf_of_array[kind], found[kind], strict=True)
        if isinstance(leaf.type, type) and issubclass(leaf.type, nnx.Param)
    ]
    made = [_first(params)] * len(plan.specs[OPTIMIZER])
    for one in plan.derived_arrays:
        if one.derived.into == OPTIMIZER:
            axis = _first([found[source.kind][source.position] for source in one.sources])
            made[one.start : one.stop] = [axis] * len(one.arrays)
    return made


def _first(found: Sequence[Axis]) -> Axis:
    return next((axis for axis in found if axis is not None), None)


def _in_slots(plan: PlanTables, found: Mapping[str, Sequence[Axis]]) -> dict[str, list[Axis]]:
    """The axis of what stands in each slot: arrays that are packed together are mapped together."""
    slots: dict[str, list[Axis]] = {}
    problems = Problems()
    for kind, here in zip(plan.kinds, plan.slots, strict=True):
        slots[kind] = []
        for slot in here:
            positions = (slot,) if isinstance(slot, int) else slot.positions
            several = [found[kind][position] for position in positions]
            slots[kind].append(several[0])
            for position, axis in zip(positions, several, strict=True):
                if axis != several[0]:
                    note = f"axis {axis}, packed with others of axis {several[0]}"
                    problems.add(plan.leaf_of_array[kind][position], note)
    problems.raise_as(
        StructureError,
        "Arrays that are packed into one buffer have one axis.",
        "one axis for all of the kind, or take the state without pack=",
    )
    return slots


def _check_ranks(
    specs: Mapping[str, Sequence[ArraySpec]], leaves: Mapping[str, Sequence[Leaf]], found: Mapping[str, Sequence[Axis]]
) -> None:
    problems = Problems()
    for kind, part in found.items():
        for leaf, spec, axis in zip(leaves[kind], specs[kind], part, strict=True):
            if not _has(spec, axis):
                rank = len(spec.shape) + 1
                problems.add(leaf, f"with another axis it has {rank}; axis {axis} is not one of them")
    if problems:
        kinds = list(dict.fromkeys(leaf.kind or "" for leaf in problems.leaves))
        problems.raise_as(
            StructureError,
            "{n} leaves have no such axis.",
            f"the first axis, which every array can have: plan.axes({', '.join(f'{kind}=0' for kind in kinds)})\n"
            f"or one for each: plan.axes({kinds[0]}=lambda path, shape: 1 if len(shape) > 1 else 0)",
        )


def _has(spec: ArraySpec, axis: Axis) -> bool:
    rank = len(spec.shape) + 1  # the mapped axis comes on top of the leaf's own
    return axis is None or -rank <= axis < rank
