"""Ensembles: the plan of many members, a state of it from those of the members, and one member out of it.

What goes in comes out to the bit: `stack(states).member(i)` is `states[i]`.  Everything is compared before an array is
touched; of a kind that all members share the values are compared too, bit by bit.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from statewise._src.common.nnx_graph import is_abstract, is_traced
from statewise._src.common.problems import Problems
from statewise._src.core.batches import check_not_batch, hint_of_batch
from statewise._src.core.member_view import single_of
from statewise._src.core.state_data import Part, StateData, StateT, check_fits, check_not_donated
from statewise._src.core.templates import abstract, shardings
from statewise._src.core.vmap_axes import axes_of_members
from statewise._src.plan.members import Axis, Members, place_of
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import PartShardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["member", "stack", "stacked"]


# --- the plan ----------------------------------------------------------------------------------------------------


def stacked(plan: PlanTables, count: Any, over: Any, axes: Mapping[str, Any]) -> PlanTables:
    """See `Plan.stacked`."""
    if plan.ensemble is not None:
        raise StructureError(
            f"This plan is of an ensemble of {plan.members} already.",
            hint="make the larger ensemble of the plan of one model: kinds.plan(model).stacked(...)",
        )
    if isinstance(count, bool) or not hasattr(count, "__index__") or operator.index(count) < 1:
        shown = count if isinstance(count, int | float | str) else type(count).__name__
        raise DeclarationError(f"{shown!r} is not a number of members.", hint="plan.stacked(8)")
    if over is not None and not isinstance(over, str):
        raise DeclarationError(f"over={over!r} is not the name of a mesh axis.", hint="plan.stacked(8, over='data')")
    found = axes_of_members(plan, axes)
    if all(axis is None for _, part in found for axis in part):
        raise DeclarationError(
            "Nothing in this ensemble has an axis: its members would be one model.",
            hint="plan.stacked(8)  # every kind has its own values in each member; a kind given as None is shared",
        )
    return plan.with_members(Members(plan, operator.index(count), found, over))


# --- a state of it -----------------------------------------------------------------------------------------------


def stack(plan: PlanTables, states: Any) -> StateData:
    """See `Plan.stack`."""
    if isinstance(states, StateData):
        return _relabelled(plan, states)
    given = list(states) if isinstance(states, Iterable) and not isinstance(states, (str, Mapping)) else None
    odd = [type(one).__name__ for one in given or () if not isinstance(one, StateData)]
    if not given or odd:
        shown = odd[0] if odd else "nothing" if given == [] else type(states).__name__
        raise StructureError(
            f"plan.stack wants a state of each member, not {shown}.",
            hint="plan.stack([plan.take(model) for model in models])  # plan: of one model",
        )
    if plan.ensemble is None:
        plan = stacked(plan, len(given), None, {})
    members = plan.ensemble
    assert members is not None, "it was made so"
    _check_states(plan, members, given)
    target = given[0].tables.with_members(members)
    parts = [
        _stacked_part(target, kind, [state.part(kind).arrays for state in given], shared=_shared(target, kind, given))
        for kind in target.kinds
    ]
    made = StateData.of(target, parts)
    mesh = _mesh_of(given[0])
    return made if mesh is None else jax.device_put(made, shardings(target, mesh))


def _relabelled(plan: PlanTables, batch: StateT) -> StateT:
    """The state of a batch that `jax.vmap` has made, under the plan of an ensemble."""
    members = plan.ensemble
    single = single_of(plan)
    if batch.tables is plan and members is not None:
        check_not_donated(batch, plan.kinds)
        check_fits(batch, plan.kinds)
        return batch
    if members is None or batch.tables.plain is not single.plain:
        hint = hint_of_batch(batch.tables, {kind: batch.part(kind).arrays for kind in batch.tables.kinds})
        raise StructureError(
            "plan.stack wants a state of each member, and of a batch of states the plan of an ensemble."
            if members is None
            else f"This state is of another plan: {batch.tables!r}, not {single!r}.",
            hint=hint or "plan.stack([state, ...])  # a state for each member",
        )
    target = batch.tables.with_members(members)
    made = batch.make(target, [_with_own_counts(target, kind, batch.part(kind)) for kind in target.kinds])
    check_not_donated(made, target.kinds)
    if target is not batch.tables:
        check_fits(made, target.kinds, hint=f"a state for each of the {members.number}: ensemble.stack([state, ...])")
    return made


def _with_own_counts(plan: PlanTables, kind: str, part: Part) -> Part:
    """A part in which each member has the counts of averages that `plan.axes` has once for all."""
    if not any(one.into == kind for one in plan.averages):
        return part
    arrays = list(part.arrays)
    for slot, (spec, axis) in enumerate(zip(plan.stored_specs[kind], plan.slot_axes[kind], strict=True)):
        if axis is not None and len(spec.shape) == 1 and getattr(arrays[slot], "shape", None) == ():
            arrays[slot] = jnp.broadcast_to(arrays[slot], spec.shape)
    made = Part(tuple(arrays))
    made.donated_by = part.donated_by
    return made


def _check_states(plan: PlanTables, members: Members, states: Sequence[StateData]) -> None:
    if len(states) != members.number:
        raise StructureError(
            f"The plan is of an ensemble of {members.number}, and {len(states)} "
            f"{'state is' if len(states) == 1 else 'states are'} given.",
            hint=f"plan.stacked({len(states)}).stack(states)  # plan: of one model, with the same axes",
        )
    for number, state in enumerate(states):
        if state.tables.plain is not members.single.plain:
            raise StructureError(
                f"State {number} is of another plan: {state.tables!r}, not {members.single!r}.",
                hint="plan the models alike: the same kinds, optimizers (the same object) and structure for all",
            )
        if state.tables is not states[0].tables:
            raise StructureError(
                f"State {number} is packed, or lies per device, otherwise than state 0.",
                hint="take all of them alike: plan.take(model, mesh=mesh, pack=...)",
            )
        check_not_donated(state, plan.kinds)
        check_not_batch(state)
        check_fits(state, plan.kinds)
    abstract = [_is_abstract(state) for state in states]
    if any(abstract) and not all(abstract):
        raise StructureError(
            f"State {abstract.index(True)} is abstract: it has shapes, and others have values.",
            hint="restore into it, or plan.take(model), before it is stacked; plan.stacked(8).abstract() has shapes",
        )


def _is_abstract(state: StateData) -> bool:
    return any(is_abstract(part.arrays) for part in state.parts)


def _mesh_of(state: StateData) -> Any:
    """The mesh that a state's arrays lie on; None where they lie on none, or are being traced."""
    for part in state.parts:
        lie = part.places()
        if lie is not None:
            return next(sharding.mesh for sharding in lie.shardings if sharding is not None)
    return None


def _stacked_part(plan: PlanTables, kind: str, parts: Sequence[Sequence[Any]], *, shared: Sequence[int]) -> list[Any]:
    """A kind's slots, from those of each member."""
    made: list[Any] = []
    for slot, axis in enumerate(plan.slot_axes[kind]):
        arrays = [part[slot] for part in parts]
        if isinstance(arrays[0], jax.ShapeDtypeStruct):
            spec = plan.stored_specs[kind][slot]
            made.append(jax.ShapeDtypeStruct(spec.shape, spec.dtype))
        elif slot in shared:
            made.append(jnp.array(arrays[0]))  # a copy: a step on the ensemble donates what it holds
        else:
            made.append(jnp.stack(arrays, place_of(axis or 0, arrays[0].ndim + 1)))
    return made


def _shared(plan: PlanTables, kind: str, states: Sequence[StateData]) -> list[int]:
    """The slots of a kind that all members share.

    Raises:
      StructureError: they are not the same in each, or nobody can tell.
    """
    shared = [slot for slot, axis in enumerate(plan.slot_axes[kind]) if axis is None]
    first = states[0].part(kind).arrays
    problems = Problems()
    for slot in shared:
        others = {number: state.part(kind).arrays[slot] for number, state in enumerate(states)}
        others = {number: array for number, array in others.items() if array is not first[slot]}
        if is_abstract(others.values()):
            continue
        leaf = plan.leaf_of_slot[kind][slot]
        if others and is_traced((first[slot], *others.values())):
            problems.add(leaf, "traced: nobody can tell whether it is the same in each")
            continue
        differing = [number for number, array in others.items() if not _same_bits(first[slot], array)]
        if differing:
            problems.add(leaf, f"another in state {differing[0]} than in state 0")
    problems.raise_as(
        StructureError,
        f"All members share the kind {kind!r}, which is not the same in each state.",
        f"give each member its own: plan.stacked({len(states)}, {kind}=0)\n"
        f"or make them alike first: state.replace({kind}=states[0][{kind!r}])",
    )
    return shared


def _same_bits(one: Any, other: Any) -> bool:
    return _bits(one) == _bits(other)


def _bits(array: Any) -> tuple[Any, ...]:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    host = np.asarray(array)
    return host.shape, str(host.dtype), host.tobytes()


# --- one member --------------------------------------------------------------------------------------------------


def member(state: StateT, index: Any) -> StateT:
    """See `State.member`."""
    plan = state.tables
    members = plan.ensemble
    if members is None:
        check_not_batch(state)
        raise StructureError(
            "This state is of one model, not of an ensemble.",
            hint="state  # it is its only member; plan.stack([state, ...]) makes an ensemble",
        )
    chosen = _index(index, members.number)
    check_not_donated(state, plan.kinds)
    check_fits(state, plan.kinds)
    given = [part.arrays for part in state.parts]
    if _is_abstract(state):
        return state.wrap(abstract(members.single))
    places = tuple(part.places() for part in state.parts)
    made = _program(plan, places)(given, chosen)
    return state.make(members.single, [Part(tuple(arrays)) for arrays in made])


def _index(index: Any, count: int) -> Any:
    """The number of a member; one that is being traced cannot be checked."""
    if isinstance(index, jax.core.Tracer):
        if index.shape == () and jnp.issubdtype(index.dtype, jnp.integer):
            return jnp.where(index < 0, index + count, index)
    elif not isinstance(index, bool | np.bool_) and hasattr(index, "__index__"):
        try:
            number = operator.index(index)
        except TypeError:  # an array of several numbers, or of floating-point ones
            number = None
        if number is not None:
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
def _program(plan: PlanTables, places: tuple[PartShardings | None, ...]) -> Any:
    """The arrays of one member, by its number; each a copy, and where the ensemble's lie."""
    axes = list(plan.slot_axes.values())

    def one(parts: Sequence[Sequence[Any]], index: Any) -> list[tuple[Any, ...]]:
        return [
            tuple(_one(array, axis, index) for array, axis in zip(part, own, strict=True))
            for part, own in zip(parts, axes, strict=True)
        ]

    if not any(places):
        return jax.jit(one)
    there = [
        None
        if lie is None
        else tuple(
            sharding if sharding is None or axis is None else _without(sharding, spec.shape, axis)
            for sharding, spec, axis in zip(lie.shardings, specs, own, strict=True)
        )
        for lie, specs, own in zip(places, plan.stored_specs.values(), axes, strict=True)
    ]
    return jax.jit(one, out_shardings=there)


def _one(array: Any, axis: Axis, index: Any) -> Any:
    if axis is None:
        return jnp.array(array)
    at = place_of(axis, array.ndim)
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:  # such an axis cannot be indexed while it is split
        spec = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
        spec[at] = None
        array = jax.reshard(array, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
    return jax.lax.dynamic_index_in_dim(array, index, at, keepdims=False)


def _without(sharding: jax.NamedSharding, shape: tuple[int, ...], axis: int) -> jax.NamedSharding:
    """The sharding of what is left without the axis."""
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    del spec[place_of(axis, len(shape))]
    while spec and spec[-1] is None:
        spec.pop()
    return jax.NamedSharding(sharding.mesh, jax.P(*spec), memory_kind=sharding.memory_kind)
