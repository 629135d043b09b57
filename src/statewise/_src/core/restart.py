"""Fresh values for whole kinds or chosen slots, in place.

The compiled function takes the arrays donated and gives fresh ones into the same buffers; arrays that a
`restart` only looks at by shape (`jnp.zeros_like`) are kept as arguments all the same, so that their buffers
can be used.  It is compiled once for each plan, set of kinds, and way of choosing slots.

What is renewed, and why it cannot be, is in `chosen`; how a fresh value is made, in `fresh`; slots are in `slots`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from statewise._src.common.narrowing import WIDE, as_jax, refuse
from statewise._src.common.nnx_graph import ArraySpec, is_traced
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.problems import Problems, add_change
from statewise._src.core.averages import averages_in, begun_again
from statewise._src.core.member_view import as_ensemble, as_one, is_of_one_member, single_of
from statewise._src.core.restart_averages import followed, followers
from statewise._src.core.restart_slots import only_where, slots_of
from statewise._src.core.restart_targets import Chosen, choose
from statewise._src.core.state_data import (
    Part,
    StateT,
    check_fits,
    check_not_donated,
    check_unshared,
    deleted_kinds,
    donated_error,
)
from statewise._src.core.usable import check_concrete_kinds
from statewise._src.plan.arrays import DerivedArrays
from statewise._src.plan.derived import keys_within
from statewise._src.plan.fresh_values import drawn_value, fresh_value, keys_of, takes
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise._src.sharding.part_shardings import PartShardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["Slots", "restart"]

# Which slots: a boolean for each of them, or their numbers.
Slots = jax.typing.ArrayLike | Sequence[bool] | Sequence[int]


def restart(state: StateT, kinds: Sequence[str], where: Any, key: Any) -> StateT:
    """See `State.restart`."""
    if is_of_one_member(state):
        return as_ensemble(state.tables.ensemble, restart(as_one(state), kinds, where, key))
    plan = state.tables
    for name in kinds:
        state.part(name)
    averages = tuple(name for name in dict.fromkeys(kinds) if averages_in(plan, name))
    if averages:
        return _begun_again(state, averages, tuple(name for name in kinds if name not in averages), where, key)
    chosen = choose(single_of(plan), kinds, by_slot=where is not None, key=key)
    read = (*chosen.kinds, *chosen.needed)
    check_not_donated(state, (*read, *followers(plan, chosen.kinds)))
    check_concrete_kinds(
        state,
        read,
        "restart",
        "state = plan.take(model)  # or restore into it: state, report = sw.restore(path, state)",
    )
    if where is not None or chosen.by_init:
        check_fits(state, read)
    slots = None if where is None else _slots(plan, chosen, where)
    old, others = ([state.part(name).arrays for name in names] for names in (chosen.kinds, chosen.needed))
    places = tuple(state.part(name).places() for name in chosen.kinds)
    try:
        # Inside of a transform it is the transform that owns the arrays.
        donate = not any(map(is_traced, old))
        program = _program(plan, chosen, slots is not None, places, donate)
        fresh = program(old, others, slots, _beside(key, places))
    except (RuntimeError, ValueError) as error:
        deleted = [name for name in deleted_kinds(state) if name in read]
        if deleted:
            raise donated_error(state, deleted) from error
        check_unshared(state)
        raise
    made = list(state.parts)
    for name, arrays in zip(chosen.kinds, fresh, strict=True):
        part = state.part(name)
        if not is_traced(arrays):
            part.donated_by = f"restart({name!r})"
        made[plan.kind_index[name]] = Part(tuple(arrays))
    return followed(state.make(plan, made), chosen, slots)


def _begun_again(state: StateT, averages: Sequence[str], others: Sequence[str], where: Any, key: Any) -> StateT:
    """Averages begin as copies of what they are of, after whatever else is restarted."""
    if where is not None:
        of = {one.kind for name in averages for one, _ in averages_in(state.tables, name)}
        given = f"{', '.join(map(repr, others))}, where=where{'' if key is None else ', key=key'}"
        raise DeclarationError(
            f"The averages {averages[0]!r} have no slots: they begin again as a whole, or with what they are of.",
            kind=averages[0],
            hint=f"state.restart({given})  # averages follow what is restarted"
            if of.intersection(others)
            else f"state.restart({', '.join(map(repr, averages))})",
        )
    if key is not None and not others:
        raise DeclarationError(
            f"key= would do nothing: the averages {averages[0]!r} begin as copies.",
            kind=averages[0],
            hint=f"state.restart({', '.join(map(repr, averages))})",
        )
    check_not_donated(state, [one.kind for name in averages for one, _ in averages_in(state.tables, name)])
    if others:
        state = restart(state, others, None, key)
    for name in averages:
        state = begun_again(state, name)
    return state


def _beside(key: Any, places: Sequence[PartShardings | None]) -> Any:
    """The key where the state's arrays are: one that was put on a single device fits no mesh."""
    if not isinstance(key, jax.Array) or isinstance(key, jax.core.Tracer) or not key.committed:
        return key
    meshes = [place.mesh for lie in places if lie is not None for place in lie.shardings if place is not None]
    if not meshes or key.sharding.device_set == set(meshes[0].devices.flat):
        return key
    return jax.device_put(key, jax.NamedSharding(meshes[0], jax.P()))


def _slots(plan: PlanTables, chosen: Chosen, where: Any) -> Any:
    """The slots as booleans; of an ensemble they may have a row for each member."""
    given = where if isinstance(where, jax.Array) else np.asarray(where)
    members = plan.ensemble
    if members is None or given.ndim != 2 or given.dtype != bool or given.shape[0] != members.number:
        return slots_of(chosen, where)
    problems = Problems()
    for kind in chosen.kinds:
        for leaf, axis in zip(plan.leaf_of_slot[kind], plan.slot_axes[kind], strict=True):
            if axis is None:
                problems.add(leaf, "shared by all members")
    problems.raise_as(
        StructureError,
        "where has a row for each member, and the members share these leaves.",
        "where= in one dimension: the slots that restart for all of them",
    )
    slots_of(chosen, np.zeros(given.shape[1], bool))  # as many slots as there are
    return given


@functools.lru_cache(maxsize=256)
def _program(
    whole: PlanTables, chosen: Chosen, by_slot: bool, places: tuple[PartShardings | None, ...], donate: bool = True
) -> Any:
    plan = chosen.plan
    # A kind that all members of an ensemble share draws once; the members draw from keys of their own.
    apart = {name for name in chosen.kinds if any(axis is not None for axis in whole.slot_axes[name])}

    def fresh_values(parts: Any, others: Any, slots: Any, key: Any, own: Any) -> list[tuple[Any, ...]]:
        lost: list[Leaf] = []
        names = (*chosen.kinds, *chosen.needed)
        now = {name: plan.unpack(name, tuple(part)) for name, part in zip(names, (*parts, *others), strict=True)}
        for name in chosen.kinds:
            old = now[name]
            if name == OPTIMIZER and chosen.by_init:
                fresh = _begun(chosen, now)
            else:
                fresh = _called(chosen, name, old, own if name in apart else key, lost)
            if by_slot:
                axis, each = chosen.axis(name) or 0, _per_device(plan, name)
                for at in fresh:
                    fresh[at] = only_where(axis, slots, fresh[at], old[at], at in each)
            now[name] = tuple(fresh.get(at, array) for at, array in enumerate(old))
        refuse(lost, StructureError, WIDE)
        return [plan.pack(name, now[name]) for name in chosen.kinds]

    # Fresh values depend on nothing that lies anywhere: XLA would put them all on every device.
    there = [None if lie is None else lie.shardings for lie in places]
    options: dict[str, Any] = {"out_shardings": there} if any(places) else {}
    if donate:
        options["donate_argnums"] = 0
    return jax.jit(_on_members(whole, chosen, fresh_values), keep_unused=True, **options)


def _on_members(whole: PlanTables, chosen: Chosen, fresh_values: Any) -> Any:
    """The same for each member of an ensemble; the slots are chosen alike in all, or each has a row of its own."""
    members = whole.ensemble
    if members is None:
        return lambda parts, others, slots, key: fresh_values(parts, others, slots, key, key)
    axes, read = ([whole.slot_axes[kind] for kind in kinds] for kinds in (chosen.kinds, chosen.needed))

    def of_all(parts: list[Any], others: list[Any], slots: Any, key: Any) -> Any:
        by_member = slots is not None and slots.ndim == 2
        own = None if key is None else jax.random.split(key, members.number)
        given = (parts, others, slots if by_member else None, own)
        ins = (axes, read, 0 if by_member else None, None if key is None else 0)

        def of_one(one: Any) -> Any:
            mine = one[2] if by_member else slots
            return fresh_values(one[0], one[1], mine, key, one[3])

        return members.each(of_one, given, ins, axes)

    return of_all


def _per_device(plan: PlanTables, kind: str) -> frozenset[int]:
    """Which of a kind's arrays have a leading axis, one value for each device."""
    return plan.per_device.of(kind) if plan.per_device else frozenset()


def _called(chosen: Chosen, name: str, old: Sequence[Any], key: Any, lost: list[Leaf]) -> dict[int, Any]:
    """Fresh values by the kind's function, by position."""
    plan, each = chosen.plan, _per_device(chosen.plan, name)
    function, positions = plan.kinds[name].restart, sorted(chosen.positions(name))
    assert function is not None
    leaves = plan.leaf_of_array[name]
    as_array = [functools.partial(as_jax, leaf, lost=lost) for leaf in leaves]
    if not takes(function).key:
        fresh = {at: fresh_value(function, old[at], leaves[at].path, at in each, as_array[at]) for at in positions}
    else:
        axes = {at: _slot_axis(plan.specs[name][at], chosen.axis(name)) for at in positions}
        devices = {at: plan.per_device.devices if plan.per_device and at in each else 1 for at in positions}
        slots = {
            at: devices[at] * (1 if (axis := axes[at]) is None else plan.specs[name][at].shape[axis])
            for at in positions
        }
        paths = _array_paths(plan, name)
        keys = keys_of(key, [paths[at] for at in positions], max(slots.values()))
        fresh = {
            at: drawn_value(
                function, old[at], leaves[at].path, keys[row, : slots[at]], axes[at], at in each, as_array[at]
            )
            for row, at in enumerate(positions)
        }
    _check_fresh(plan, name, old, fresh)
    return fresh


def _slot_axis(spec: ArraySpec, axis: int | None) -> int | None:
    """The axis of the slots, where an array has it."""
    return axis if axis is not None and -len(spec.shape) <= axis < len(spec.shape) else None


def _array_paths(plan: PlanTables, kind: str) -> list[Path]:
    """The path of each of a kind's arrays: its leaf's, and, where a Variable holds several, the keys within."""
    mine = (row for row in plan.rows if row.kind == kind)
    paths = [row.path + keys for row in mine for keys in keys_within(row.structure, len(row.specs))]
    return paths + [path for one in plan.derived if one.into == kind for path in one.leaf_paths]


def _check_fresh(plan: PlanTables, name: str, old: Sequence[Any], fresh: Mapping[int, Any]) -> None:
    problems = Problems()
    for at, now in fresh.items():
        add_change(problems, plan.leaf_of_array[name][at], old[at], now)
    problems.raise_as(
        StructureError,
        f"The restart of kind {name!r} changes shapes or dtypes.",
        "restart=jnp.zeros_like, or any function that keeps shape and dtype",
    )


def _begun(chosen: Chosen, now: Mapping[str, Sequence[Any]]) -> dict[int, Any]:
    """Optimizer state as `init` makes it of the parameters as they are by now, by position."""
    plan = chosen.plan
    fresh: dict[int, Any] = {}
    for number in chosen.groups:
        placed = plan.arrays_of(plan.optimizers[number])
        params = [now[source.kind][source.position] for source in placed.sources]
        fresh.update(enumerate(_init(plan, placed, params), placed.start))
    return fresh


def _init(plan: PlanTables, group: DerivedArrays, params: Sequence[Any]) -> list[Any]:
    init = group.derived.init
    if plan.per_device is None or not (_per_device(plan, OPTIMIZER) or any(source.devices for source in group.sources)):
        return list(init(params))
    # On each device of its own parameters; what is not kept for each, is alike on all.
    axes = [0 if source.devices else None for source in group.sources]
    states = jax.vmap(init, (axes,), axis_size=plan.per_device.devices)(list(params))
    return [state if array.devices else state[0] for array, state in zip(group.arrays, states, strict=True)]
