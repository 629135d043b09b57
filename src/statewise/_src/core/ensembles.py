"""Ensembles: the plan of many members, a state of it from those of the members, and one member's state out of it.

The values are kept to the bit: `stack(states).member(i)` is `states[i]`.  Everything is compared before an array is
stacked; the values of a kind that all members share are compared too, bit by bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common import compat
from statewise._src.common.nnx_graph import is_abstract, is_traced
from statewise._src.common.numbers import whole_number
from statewise._src.common.problems import Problems, counted
from statewise._src.core.batches import check_not_batch, hint_of_batch
from statewise._src.core.many_arrays import ManyArrays
from statewise._src.core.member_view import compiled, single_of, with_complete_axis
from statewise._src.core.plan_difference import in_form_of, other_plan
from statewise._src.core.state_data import (
    StateData,
    StateT,
    check_fits,
    check_not_donated,
    kind_arrays,
    kind_places,
    mesh_of,
    with_arrays,
)
from statewise._src.core.templates import abstract, shardings
from statewise._src.core.versions import carry
from statewise._src.core.vmap_axes import axes_of_members
from statewise._src.plan.members import Axis, Members, place_of
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import spec_entries
from statewise._src.sharding.part_shardings import PartShardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["member", "stack", "stacked"]

_ALIKE = "plan the models alike: the same kinds, optimizers (the same object) and structure for all"
_MOVE = "states = [sw.transfer(state, single) for state in states]  # single: the plan of one model"


# --- the plan ----------------------------------------------------------------------------------------------------


def stacked(plan: PlanTables, count: Any, over: object, axes: Mapping[str, object]) -> PlanTables:
    """Implements `Plan.stacked`."""
    if plan.ensemble is not None:
        raise StructureError(
            f"This plan is of an ensemble of {plan.members} already.",
            hint="make the larger ensemble of the plan of one model: kinds.plan(model).stacked(...)",
        )
    number = whole_number(count, 1)
    if number is None:
        shown = count if isinstance(count, int | float | str) else type(count).__name__
        raise DeclarationError(f"{shown!r} is not a number of members.", hint="plan.stacked(8)")
    if over is not None and not isinstance(over, str):
        raise DeclarationError(f"over={over!r} is not the name of a mesh axis.", hint="plan.stacked(8, over='data')")
    by_kind = axes_of_members(plan, axes)
    if all(axis is None for _, part in by_kind for axis in part):
        raise DeclarationError(
            "Nothing in this ensemble has an axis: its members would be one model.",
            hint="plan.stacked(8)  # every kind has its own values in each member; a kind given as None is shared",
        )
    return plan.with_members(Members(plan, number, by_kind, over))


# --- stacking ----------------------------------------------------------------------------------------------------


def stack(plan: PlanTables, states: object) -> StateData:
    """Implements `Plan.stack`."""
    if isinstance(states, StateData):
        return _under_ensemble(plan, states)
    given = list(states) if isinstance(states, Iterable) and not isinstance(states, (str, Mapping)) else None
    others = [type(state).__name__ for state in given or () if not isinstance(state, StateData)]
    if not given or others:
        shown = others[0] if others else "nothing" if given == [] else type(states).__name__
        raise StructureError(
            f"plan.stack takes a state for each member, not {shown}.",
            hint="plan.stack([plan.take(model) for model in models])  # plan: of one model",
        )
    members = (plan if plan.ensemble is not None else stacked(plan, len(given), None, {})).ensemble
    assert members is not None, "stacked makes the plan of an ensemble"
    given = [in_form_of(members.single, state) for state in given]
    _check_states(members, given)
    # The given states may be packed, or on a mesh, where the plan is neither.
    target = given[0].tables.with_members(members)
    parts = {kind: [state.part(kind).arrays for state in given] for kind in target.kinds}
    for kind in target.kinds:
        _check_shared(target, kind, parts[kind])
    ensemble = StateData.of(target, [_stacked_part(target, kind, parts[kind]) for kind in target.kinds])
    mesh = mesh_of(kind_places(given[0], target.kinds))
    ensemble = ensemble if mesh is None else jax.device_put(ensemble, shardings(target, mesh))
    carry([(state.tables, state.parts) for state in given], target, ensemble.parts)
    return ensemble


def _under_ensemble(plan: PlanTables, batch: StateT) -> StateT:
    """Returns the state of a batch that `jax.vmap` has made, with the plan of an ensemble."""
    members, batch = plan.ensemble, in_form_of(plan, batch)
    if batch.tables is plan and members is not None:
        check_not_donated(batch, plan.kinds)
        check_fits(batch, plan.kinds)
        return batch
    single = single_of(plan)
    if members is None or batch.tables.plain is not single.plain:
        hint = hint_of_batch(batch.tables, {kind: batch.part(kind).arrays for kind in batch.tables.kinds})
        hint = hint or "plan.stack([state, ...])  # a state for each member"
        if members is not None:
            raise other_plan(single, batch, "This state", hint, hint)
        raise StructureError(
            "plan.stack takes a state for each member, or a batch of states if the plan is of an ensemble.", hint=hint
        )
    target = batch.tables.with_members(members)
    check_not_donated(batch, target.kinds)
    # Arrays are compared with the ensemble's shapes only now that the counts, which may be shared, have them too.
    averaged = {average.into for average in target.averages}
    counts = {kind: _own_counts(target, kind, batch.part(kind).arrays) for kind in averaged}
    state = with_arrays(batch, counts, target)
    check_fits(state, target.kinds, hint=f"a state for each of the {members.number}: ensemble.stack([state, ...])")
    return state


def _own_counts(plan: PlanTables, kind: str, part: Sequence[Any]) -> list[Any]:
    """Returns a part in which each member has counts of averages of its own; `plan.axes` shares one among all."""
    return [
        jnp.broadcast_to(array, slot.spec.shape)
        if slot.axis is not None and len(slot.spec.shape) == 1 and getattr(array, "shape", None) == ()
        else array
        for array, slot in zip(part, plan.stored[kind], strict=True)
    ]


def _check_states(members: Members, states: Sequence[StateData]) -> None:
    if len(states) != members.number:
        raise StructureError(
            f"The plan is of an ensemble of {members.number}, and "
            f"{counted(len(states), 'state is', 'states are')} given.",
            hint=f"plan.stacked({len(states)}).stack(states)  # plan: of one model, with the same axes",
        )
    for number, state in enumerate(states):
        if state.tables.plain is not members.single.plain:
            raise other_plan(members.single, state, f"State {number}", _MOVE, _ALIKE)
        if state.tables is not states[0].tables:
            raise StructureError(
                f"State {number} and state 0 differ in packing, or in their per-device values.",
                hint="take all of them alike: plan.take(model, mesh=mesh, pack=...)",
            )
        # A batch of states, or a state inside `jax.vmap`, does not fit its own plan.
        check_not_donated(state, state.tables.kinds)
        check_fits(state, state.tables.kinds)
    are_abstract = [is_abstract(jax.tree.leaves(state)) for state in states]
    if any(are_abstract) and not all(are_abstract):
        raise StructureError(
            f"State {are_abstract.index(True)} is abstract: it has shapes, and others have values.",
            hint="restore into it, or plan.take(model), before it is stacked; plan.stacked(8).abstract() has shapes",
        )


def _stacked_part(plan: PlanTables, kind: str, parts: Sequence[Sequence[Any]]) -> list[Any]:
    """Returns a kind's part in the ensemble, from the part of each member."""
    stacked: list[Any] = []
    for arrays, slot in zip(zip(*parts, strict=True), plan.stored[kind], strict=True):
        if isinstance(arrays[0], jax.ShapeDtypeStruct):
            stacked.append(jax.ShapeDtypeStruct(*slot.spec))
        elif slot.axis is None:
            stacked.append(jnp.array(arrays[0]))  # a copy: a step on the ensemble donates the arrays of its state
        else:
            stacked.append(jnp.stack(arrays, place_of(slot.axis, len(slot.spec.shape))))
    return stacked


def _check_shared(plan: PlanTables, kind: str, parts: Sequence[Sequence[Any]]) -> None:
    """Checks that the arrays that all members share are the same in each.

    Raises:
      StructureError: some differ, or are being traced; lists all of them.
    """
    problems = Problems()
    for slot, (first, *rest) in zip(plan.stored[kind], zip(*parts, strict=True), strict=True):
        others = {number: array for number, array in enumerate(rest, start=1) if array is not first}
        if slot.axis is not None or not others or is_abstract(others.values()):
            continue
        if is_traced((first, *others.values())):
            problems.add(slot.leaf, "traced: its values in the states cannot be compared")
            continue
        bits = _bits(first)
        different = next((number for number, array in others.items() if _bits(array) != bits), None)
        if different is not None:
            problems.add(slot.leaf, f"differs between state {different} and state 0")
    problems.raise_as(
        StructureError,
        f"All members share the kind {kind!r}, but it is not the same in each state.",
        f"give each member its own: plan.stacked({len(parts)}, {kind}=0)\n"
        f"or make them the same first: state.replace({kind}=states[0][{kind!r}])",
    )


def _bits(array: Any) -> tuple[Any, ...]:
    """Returns an array's bits on the host: unlike `==`, they compare NaN as equal, and 0.0 and -0.0 as different."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    host = np.asarray(array)
    return host.shape, str(host.dtype), host.tobytes()


# --- one member --------------------------------------------------------------------------------------------------


def member(state: StateT, index: object) -> StateT:
    """Implements `State.member`."""
    plan = state.tables
    members = plan.ensemble
    if members is None:
        check_not_batch(state)
        raise StructureError(
            "This state is of one model, not of an ensemble.",
            hint="state  # it is its only member; plan.stack([state, ...]) makes an ensemble",
        )
    chosen = _index(index, members.number)  # before the checks of arrays: it is what users get wrong
    check_not_donated(state, plan.kinds)
    check_fits(state, plan.kinds)
    if is_abstract(jax.tree.leaves(state)):
        return state.wrap(abstract(members.single))
    arrays = _member_program(plan, kind_places(state, plan.kinds))(kind_arrays(state, plan.kinds), chosen)
    own = state.of(members.single, arrays)
    carry([(plan, state.parts)], members.single, own.parts)
    return own


def _index(index: Any, count: int) -> int | jax.Array:
    """Returns the number of a member, counted from the start; one that is being traced is not checked."""
    # `dynamic_index_in_dim` clamps an index that is out of range, so a known one is checked here.
    if isinstance(index, compat.Tracer):
        if index.shape == () and jnp.issubdtype(index.dtype, jnp.integer):
            return jnp.where(index < 0, index + count, index)
    elif (number := whole_number(index)) is not None:
        if -count <= number < count:
            return number % count
        raise StructureError(
            f"There is no member {number}: the ensemble has {count}.", hint=f"state.member({count - 1})  # the last"
        )
    shown = repr(index) if isinstance(index, int | float | str) else type(index).__name__
    raise StructureError(
        f"{shown} is not the number of a member.",
        hint=f"state.member(0)  # 0 to {count - 1}; for several: [state.member(number) for number in (0, 2)]",
    )


@functools.lru_cache(maxsize=64)
def _member_program(plan: PlanTables, places: tuple[PartShardings | None, ...]) -> ManyArrays:
    """Returns the compiled function from the parts of all members and a number to the parts of one of them."""
    slots = plan.stored.values()

    def chosen(parts: Sequence[Sequence[Any]], index: Any) -> list[tuple[Any, ...]]:
        return [
            tuple([_at_index(array, slot.axis, index) for array, slot in zip(part, own, strict=True)])
            for part, own in zip(parts, slots, strict=True)
        ]

    return compiled(chosen, single_of(plan), list(plan.kinds), _member_places(plan, places))


def _member_places(plan: PlanTables, places: Sequence[PartShardings | None]) -> list[PartShardings | None]:
    """Returns the shardings of the arrays of one member, on the ensemble's devices."""
    return [
        place
        and PartShardings(
            tuple(
                sharding and _without_axis(sharding, len(slot.spec.shape), slot.axis)
                for sharding, slot in zip(place.shardings, slots, strict=True)
            )
        )
        for place, slots in zip(places, plan.stored.values(), strict=True)
    ]


def _at_index(array: Any, axis: Axis, index: Any) -> Any:
    if axis is None:
        return jnp.array(array)
    axis = place_of(axis, array.ndim)
    return jax.lax.dynamic_index_in_dim(with_complete_axis(array, axis), index, axis, keepdims=False)


def _without_axis(sharding: jax.NamedSharding, rank: int, axis: Axis) -> jax.NamedSharding:
    """Returns the sharding of an array from which an axis was taken."""
    if axis is None:
        return sharding
    spec = spec_entries(sharding, rank)
    del spec[place_of(axis, rank)]
    # JAX tells P('data') and P('data', None) apart, and a step would be compiled again for the other.
    while spec and spec[-1] is None:
        spec.pop()
    return jax.NamedSharding(sharding.mesh, jax.P(*spec), memory_kind=sharding.memory_kind)
