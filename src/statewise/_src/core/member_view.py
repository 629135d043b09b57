"""A state of an ensemble, seen from inside of `jax.vmap`: the arrays of one member under the plan of all.

JAX rebuilds a state with the plan that it has outside.  So inside of the map the plan is of the ensemble, and the
arrays are of one member: there a verb does what it does for one, and gives back a state of the ensemble's plan, which
the map stacks again.  Outside of it a compiled verb maps its program over the members by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from statewise._src.common.nnx_graph import arrays_of, raw_value, scan, spec_of
from statewise._src.core.check_objects import names_for
from statewise._src.core.plan import Plan
from statewise._src.core.state import State, make_state
from statewise._src.plan.derived import Derived
from statewise._src.plan.members import Members

__all__ = [
    "as_ensemble",
    "as_one",
    "begun",
    "for_each_member",
    "holds_one_member",
    "is_of_one_member",
    "single_of",
]


def single_of(plan: Plan) -> Plan:
    """The plan of one member; of one model the plan itself."""
    return plan if plan._members is None else plan._members.single


def is_of_one_member(state: State) -> bool:
    """Whether a state of an ensemble's plan holds the arrays of one member, as inside of `jax.vmap`."""
    plan = state._plan
    return plan._members is not None and any(
        getattr(array, "shape", None) == one.shape
        for kind, specs in plan._members.single._stored.items()
        for array, one, axis in zip(state.part(kind).arrays, specs, plan._slot_axes[kind], strict=True)
        if axis is not None
    )


def holds_one_member(plan: Plan, objects: Sequence[Any]) -> bool:
    """Whether these are the traced objects of one member of a plan's ensemble, as inside of `jax.vmap`."""
    found = scan(objects, names_for(plan, objects))
    live = {path: arrays_of(raw_value(leaf))[0] for path, leaf in zip(found.paths, found.leaves, strict=True)}
    rows = single_of(plan)._rows
    fit = all(row.path in live and tuple(map(spec_of, live[row.path])) == row.specs for row in rows)
    return fit and any(isinstance(array, jax.core.Tracer) for row in rows for array in live[row.path])


def as_one(state: State) -> State:
    """A state of one member, of the plan that one member has; the parts are shared."""
    return make_state(single_of(state._plan), list(state._parts))


def as_ensemble(members: Members | None, state: State) -> State:
    """The same state under the plan of an ensemble of its plan, which may be another than that of the members."""
    return state if members is None else make_state(state._plan._with_members(members), list(state._parts))


def for_each_member(
    plan: Plan, program: Callable[..., Any], ins: Sequence[str], outs: Sequence[str], other: Plan | None = None
) -> Callable[..., Any]:
    """A program on parts of an ensemble, from that on the parts of one member; of one model the program itself.

    Args:
      plan: the plan of the ensemble.
      program: from the parts of some kinds, in a list, to those of others; written for `single_of(plan)`.
      ins: the kinds that it is given.
      outs: the kinds that it makes.
      other: the plan that these are of, where it is another.
    """
    members = plan._members
    if members is None:
        return program
    after = (other or plan)._slot_axes
    given, made = [plan._slot_axes[kind] for kind in ins], [after[kind] for kind in outs]
    return lambda parts: members.each(program, [tuple(part) for part in parts], given, made)


def begun(plan: Plan, number: int, arrays: Sequence[Any]) -> list[Any]:
    """What is derived (by its number in the plan), fresh, from the arrays that it is of; each member's from its own."""
    one: Derived = plan._derived[number]
    members = plan._members
    if members is None:
        return one.init(arrays)
    start, stop = plan._derived_spans[number]
    given = [members.of(kind)[at] for kind, at in plan._params_of(one)]
    made = list(members.of(one.into)[start:stop])
    return list(members.each(members.single._derived[number].init, list(arrays), given, made))
