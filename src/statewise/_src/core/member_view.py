"""A state of an ensemble, seen from inside of `jax.vmap`: the arrays of one member under the plan of all.

JAX rebuilds a state with the plan that it has outside.  So inside of the map the plan is of the ensemble, and the
arrays are of one member: there a verb does what it does for one, and gives back a state of the ensemble's plan, which
the map stacks again.  Outside of it a compiled verb maps its program over the members by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from statewise._src.common.nnx_graph import arrays_of, is_traced, raw_value, read_graph, spec_of
from statewise._src.core.check_objects import names_for
from statewise._src.core.state_data import StateData, StateT
from statewise._src.plan.derived import Derived
from statewise._src.plan.members import Members
from statewise._src.plan.tables import PlanTables

__all__ = [
    "as_ensemble",
    "as_one",
    "begun",
    "for_each_member",
    "holds_one_member",
    "is_of_one_member",
    "single_of",
]


def single_of(plan: PlanTables) -> PlanTables:
    """The plan of one member; of one model the plan itself."""
    return plan if plan.ensemble is None else plan.ensemble.single


def is_of_one_member(state: StateData) -> bool:
    """Whether a state of an ensemble's plan holds the arrays of one member, as inside of `jax.vmap`."""
    plan = state.tables
    return plan.ensemble is not None and any(
        getattr(array, "shape", None) == one.shape
        for kind, specs in plan.ensemble.single.stored_specs.items()
        for array, one, axis in zip(state.part(kind).arrays, specs, plan.slot_axes[kind], strict=True)
        if axis is not None
    )


def holds_one_member(plan: PlanTables, objects: Sequence[Any]) -> bool:
    """Whether these are the traced objects of one member of a plan's ensemble, as inside of `jax.vmap`."""
    found = read_graph(objects, names_for(plan, objects))
    live = {path: arrays_of(raw_value(leaf))[0] for path, leaf in zip(found.paths, found.leaves, strict=True)}
    rows = single_of(plan).rows
    fit = all(row.path in live and tuple(map(spec_of, live[row.path])) == row.specs for row in rows)
    return fit and any(is_traced(live[row.path]) for row in rows)


def as_one(state: StateT) -> StateT:
    """A state of one member, of the plan that one member has; the parts are shared."""
    return state.make(single_of(state.tables), list(state.parts))


def as_ensemble(members: Members | None, state: StateT) -> StateT:
    """The same state under the plan of an ensemble of its plan, which may be another than that of the members."""
    return state if members is None else state.make(state.tables.with_members(members), list(state.parts))


def for_each_member(
    plan: PlanTables,
    program: Callable[..., Any],
    ins: Sequence[str],
    outs: Sequence[str],
    other: PlanTables | None = None,
) -> Callable[..., Any]:
    """A program on parts of an ensemble, from that on the parts of one member; of one model the program itself.

    Args:
      plan: the plan of the ensemble.
      program: from the parts of some kinds, in a list, to those of others; written for `single_of(plan)`.
      ins: the kinds that it is given.
      outs: the kinds that it makes.
      other: the plan that these are of, where it is another.
    """
    members = plan.ensemble
    if members is None:
        return program
    after = (other or plan).slot_axes
    given, made = [plan.slot_axes[kind] for kind in ins], [after[kind] for kind in outs]
    return lambda parts: members.each(program, [tuple(part) for part in parts], given, made)


def begun(plan: PlanTables, number: int, arrays: Sequence[Any]) -> list[Any]:
    """What is derived (by its number in the plan), fresh, from the arrays that it is of; each member's from its own."""
    one: Derived = plan.derived[number]
    members = plan.ensemble
    if members is None:
        return one.init(arrays)
    placed = plan.derived_arrays[number]
    given, made = [array.axis for array in placed.sources], [array.axis for array in placed.arrays]
    return list(members.each(members.single.derived[number].init, list(arrays), given, made))
