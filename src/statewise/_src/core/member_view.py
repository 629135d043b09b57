"""States of an ensemble inside `jax.vmap`: the arrays of one member under the plan of the ensemble.

JAX rebuilds a state with the plan that it has outside.  So inside the map the plan is the ensemble's, and the arrays
are one member's: there a verb does what it does for one model, and returns a state of the ensemble's plan, which the
map stacks again.  Outside of it a compiled verb maps its program over the members itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from statewise._src.common.nnx_graph import arrays_of, is_traced, raw_value, read_graph, spec_of
from statewise._src.core.check_objects import names_for
from statewise._src.core.many_arrays import ManyArrays
from statewise._src.core.state_data import StateData, StateT
from statewise._src.plan.arrays import DerivedArrays
from statewise._src.plan.members import Members
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import explicit_sharding, spec_entries
from statewise._src.sharding.part_shardings import PartShardings

__all__ = [
    "as_ensemble",
    "as_one",
    "compiled",
    "for_each_member",
    "fresh_derived",
    "holds_one_member",
    "is_of_one_member",
    "is_part_of_one_member",
    "single_of",
    "with_complete_axis",
]


def single_of(plan: PlanTables) -> PlanTables:
    """Returns the plan of one member; for a plan of one model, the plan itself."""
    return plan if plan.ensemble is None else plan.ensemble.single


def is_of_one_member(state: StateData) -> bool:
    """Returns whether a state of an ensemble's plan holds the arrays of one member, as inside `jax.vmap`."""
    plan = state.tables
    return plan.ensemble is not None and any(
        is_part_of_one_member(plan, kind, part.arrays) for kind, part in zip(plan.kinds, state.parts, strict=True)
    )


def is_part_of_one_member(plan: PlanTables, kind: str, part: Sequence[Any]) -> bool:
    """Returns whether a kind's part under an ensemble's plan holds the arrays of one member."""
    # Arrays that all members share have the same shape in both, so they do not tell.
    return plan.ensemble is not None and any(
        slot.axis is not None and getattr(array, "shape", None) == of_one.spec.shape
        for array, slot, of_one in zip(part, plan.stored[kind], plan.ensemble.single.stored[kind], strict=True)
    )


def holds_one_member(plan: PlanTables, objects: Sequence[object]) -> bool:
    """Returns whether objects hold the traced arrays of one member of a plan's ensemble, as inside `jax.vmap`."""
    graph = read_graph(objects, names_for(plan, objects))
    live = {path: arrays_of(raw_value(leaf))[0] for path, leaf in zip(graph.paths, graph.leaves, strict=True)}
    rows = single_of(plan).rows
    # Concrete objects of one member are a mistake, which `take` reports; inside `jax.vmap` some arrays are tracers.
    fit = all(row.path in live and tuple(map(spec_of, live[row.path])) == row.specs for row in rows)
    return fit and any(is_traced(live[row.path]) for row in rows)


def as_one(state: StateT) -> StateT:
    """Returns a state with the plan of one member; the parts are shared."""
    return state.make(single_of(state.tables), list(state.parts))


def as_ensemble(members: Members | None, state: StateT) -> StateT:
    """Returns a state of one member with the plan of an ensemble of the state's own plan; None changes nothing."""
    return state if members is None else state.make(state.tables.with_members(members), list(state.parts))


def for_each_member(
    plan: PlanTables,
    program: Callable[..., Any],
    ins: Sequence[str],
    outs: Sequence[str],
    target: PlanTables | None = None,
) -> Callable[..., Any]:
    """Maps a program over the members of an ensemble; for a plan of one model, returns the program itself.

    Args:
      plan: the plan of the ensemble.
      program: a function from a list of parts to a list of parts, written for `single_of(plan)`.
      ins: the kinds of the parts that it takes.
      outs: the kinds of the parts that it returns.
      target: the plan of the returned parts, if it is another one.
    """
    members = plan.ensemble
    if members is None:
        return program
    # The axes of slots, not of arrays: programs take and return parts, which may be packed.
    in_axes = [plan.slot_axes[kind] for kind in ins]
    out_axes = [(target or plan).slot_axes[kind] for kind in outs]
    return lambda parts: members.each(program, [tuple(part) for part in parts], in_axes, out_axes)


def compiled(
    program: Callable[..., Any],
    plan: PlanTables,
    kinds: Sequence[str],
    places: Sequence[PartShardings | None],
    *,
    donate: bool = False,
) -> ManyArrays:
    """Compiles a program that returns a list of parts.

    Args:
      program: the program.
      plan: the plan of the returned parts.
      kinds: their kinds.
      places: for each of them its shardings, as XLA would choose others; None where it is not on a mesh.
      donate: donates the first argument, parts of the same structure.
    """
    shardings = [place and place.shardings for place in places] if any(places) else None
    count = sum(len(plan.stored[kind]) for kind in kinds)
    return ManyArrays(program, count, shardings=shardings, donate=donate)


def fresh_derived(derived: DerivedArrays, members: Members | None, sources: Sequence[Any]) -> list[Any]:
    """Returns fresh derived arrays, such as optimizer state; for an ensemble, each member's from its own sources.

    Args:
      derived: the derived arrays, of the plan that the sources are of.
      members: the members of the ensemble, if it is one.
      sources: the arrays that they are derived from.
    """
    if members is None:
        return list(derived.derived.init(sources))
    ins, outs = ([array.axis for array in arrays] for arrays in (derived.sources, derived.arrays))
    # The shapes in the ensemble's own plan have the axis of the members, so it is the member's that starts.
    return list(members.each(members.single.derived[derived.order].init, list(sources), ins, outs))


def with_complete_axis(array: Any, axis: int) -> Any:
    """Returns an array whose axis is not sharded over Explicit mesh axes: JAX cannot index one that is."""
    sharding = explicit_sharding(array)
    if sharding is None:
        return array
    spec = spec_entries(sharding, array.ndim)
    spec[axis] = None
    return jax.reshard(array, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
