"""Fresh values for complete kinds or chosen slots, in place.

The compiled function takes the arrays donated and writes fresh ones into the same buffers; arrays of which a `restart`
uses only the shape (`jnp.zeros_like`) are kept as arguments all the same, so that their buffers can be reused.  It is
compiled once for each plan, set of kinds, and way of choosing slots.

`restart_targets` determines what is renewed and why it cannot be, `fresh_values` how a fresh value is made, and
`restart_slots` handles slots.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from statewise._src.common import compat
from statewise._src.common.narrowing import WIDE, refuse
from statewise._src.common.nnx_graph import is_traced
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.placing import placed
from statewise._src.common.problems import Problems, add_change
from statewise._src.core.averages import averages_in, followers, with_restarted_averages
from statewise._src.core.member_view import as_ensemble, as_one, compiled, is_of_one_member, single_of
from statewise._src.core.restart_slots import axis_of_rows, only_where, slots_of
from statewise._src.core.restart_targets import Chosen, call_of, choose, slot_axis
from statewise._src.core.state_data import (
    StateT,
    check_fits,
    check_not_donated,
    check_unshared,
    deleted_kinds,
    donated_error,
    kind_arrays,
    kind_places,
    mesh_of,
    with_arrays,
)
from statewise._src.core.usable import check_usable
from statewise._src.core.versions import note_slots
from statewise._src.plan.arrays import ArrayInfo, DerivedArrays
from statewise._src.plan.derived import keys_within
from statewise._src.plan.fresh_values import check_kept, fresh_values, keys_of, takes
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise._src.sharding.part_shardings import PartShardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["initial_state", "restart"]

# The number of bytes that one loop renews, which are there twice while it runs, and of arrays.
_LARGEST_LOOP = 1 << 24
_LONGEST_LOOP = 256


def restart(state: StateT, kinds: Sequence[str], where: object, key: object, *, donate: bool = True) -> StateT:
    """Implements `State.restart`; without `donate` the state stays usable."""
    if is_of_one_member(state):
        return as_ensemble(state.tables.ensemble, restart(as_one(state), kinds, where, key, donate=donate))
    plan = state.tables
    averages = tuple(name for name in dict.fromkeys(kinds) if averages_in(plan, name))
    if averages:
        return _restart_averages(state, averages, tuple(name for name in kinds if name not in averages), where, key)
    chosen = choose(single_of(plan), kinds, by_slot=where is not None, key=key)
    read = (*chosen.kinds, *chosen.needed)
    following = followers(plan, chosen.kinds)
    hint = "state = plan.take(model)  # or restore into it: state, report = sw.restore(path, state)"
    check_usable(state, read, "restart", hint, written=following, fits=where is not None or chosen.by_init)
    slots = None if where is None else slots_of(plan, chosen, where)
    old, others = kind_arrays(state, chosen.kinds), kind_arrays(state, chosen.needed)
    places = kind_places(state, chosen.kinds)
    try:
        # Inside a transform the arrays are tracers, which cannot be donated.
        donate = donate and not any(map(is_traced, old))
        program = _program(plan, chosen, slots is not None, places, donate)
        fresh = program(old, others, slots, _on_mesh_of(places, key))
    except (RuntimeError, ValueError) as error:
        deleted = [name for name in deleted_kinds(state) if name in read]
        if deleted:
            raise donated_error(state, deleted) from error
        check_unshared(state)
        raise
    for name, arrays in zip(chosen.kinds, fresh, strict=True):
        if donate and not is_traced(arrays):
            state.part(name).donated_by = f"restart({name!r})"
    complete = [name for name in chosen.kinds if slots is None and (name != OPTIMIZER or chosen.whole)]
    restarted = with_arrays(state, dict(zip(chosen.kinds, fresh, strict=True)), fresh=complete)
    if plan.sources and slots is not None and not is_traced([slots]):
        for name in chosen.kinds:
            note_slots(plan, state.parts, restarted.parts, name, slots)
    return with_restarted_averages(restarted, chosen, following, slots)


def _restart_averages(
    state: StateT, averages: Sequence[str], others: Sequence[str], where: object, key: object
) -> StateT:
    """Restarts averages as copies of the values that they track, after other kinds were restarted."""
    tracked = {average.kind: None for name in averages for average, _ in averages_in(state.tables, name)}
    if where is not None:
        follow = call_of(others, "where=where", *([] if key is None else ["key=key"]))
        raise DeclarationError(
            f"The averages {averages[0]!r} have no slots of their own: they restart completely, or with the kinds "
            "that they track.",
            kind=averages[0],
            hint=f"{follow}  # averages follow what is restarted"
            if tracked.keys() & set(others)
            else call_of(averages),
        )
    if key is not None and not others:
        raise DeclarationError(
            f"key= would do nothing: the averages {averages[0]!r} restart as copies.",
            kind=averages[0],
            hint=call_of(averages),
        )
    check_not_donated(state, tracked)
    if others:
        state = restart(state, others, None, key)
    if state.tables.packing:
        check_fits(state, tracked)
    chosen = Chosen(single_of(state.tables), tuple(tracked), (), False)
    return with_restarted_averages(state, chosen, averages, None)


def _on_mesh_of(places: Sequence[PartShardings | None], key: Any) -> Any:
    """Returns the key on the mesh of the state's arrays: JAX rejects one that is committed to a single device."""
    if not isinstance(key, jax.Array) or isinstance(key, compat.Tracer) or not key.committed:
        return key
    mesh = mesh_of(places)
    if mesh is None or key.sharding.device_set == set(mesh.devices.flat):
        return key
    return placed(key, jax.NamedSharding(mesh, jax.P()))


@functools.lru_cache(maxsize=256)
def _program(
    plan: PlanTables, chosen: Chosen, by_slot: bool, places: tuple[PartShardings | None, ...], donate: bool
) -> Any:
    """Returns the compiled function from old parts, the parts that are only read, slots and key to fresh parts."""
    single, members = chosen.plan, plan.ensemble
    in_axes, read_axes = ([plan.slot_axes[kind] for kind in kinds] for kinds in (chosen.kinds, chosen.needed))
    # A kind that all members of an ensemble share draws once; the members draw from keys of their own.
    drawn_apart = {name for name in chosen.kinds if any(axis is not None for axis in plan.slot_axes[name])}

    def of_one(parts: Any, others: Any, slots: Any, key: Any, own_key: Any) -> list[tuple[Any, ...]]:
        lost: list[Leaf] = []
        names = (*chosen.kinds, *chosen.needed)
        now = {name: single.unpack(name, tuple(part)) for name, part in zip(names, (*parts, *others), strict=True)}
        for name in chosen.kinds:
            old = now[name]
            if name == OPTIMIZER and chosen.by_init:
                fresh = _by_init(chosen, now)
            else:
                fresh = _by_function(chosen, name, old, own_key if name in drawn_apart else key, lost)
            if by_slot:
                axis, infos = chosen.axis(name) or 0, single.by_kind[name]
                fresh = {
                    position: only_where(axis, slots, array, old[position], bool(infos[position].devices))
                    for position, array in fresh.items()
                }
            now[name] = tuple(fresh.get(position, array) for position, array in enumerate(old))
        refuse(lost, StructureError, WIDE)
        return [single.pack(name, now[name]) for name in chosen.kinds]

    def of_all(parts: Any, others: Any, slots: Any, key: Any) -> Any:
        if members is None:
            return of_one(parts, others, slots, key, key)
        own_keys = None if key is None else jax.random.split(key, members.number)
        given = (parts, others, slots, key, own_keys)
        axes = (in_axes, read_axes, axis_of_rows(slots), None, None if key is None else 0)
        return members.each(lambda given: of_one(*given), given, axes, in_axes)

    # Fresh values depend on no array that is sharded: XLA would replicate them all.
    return compiled(of_all, plan, chosen.kinds, places, donate=donate)


def _by_function(chosen: Chosen, name: str, old: Sequence[Any], key: Any, lost: list[Leaf]) -> dict[int, Any]:
    """Returns fresh values by the kind's function, by position."""
    plan, function = chosen.plan, chosen.plan.kinds[name].restart
    assert function is not None
    renewed, declared = chosen.renewed(name), chosen.axis(name)
    axes = [slot_axis(array, declared) for array in renewed]
    if takes(function).key:
        counts = [
            (1 if axis is None else array.spec.shape[axis]) * (array.devices or 1)
            for array, axis in zip(renewed, axes, strict=True)
        ]
        paths = _array_paths(plan, name)
        # One table of keys, with a row for each array and as many columns as the largest number of slots.
        keys = keys_of(key, [paths[array.position] for array in renewed], max(counts))
    else:
        keys, counts = None, [0] * len(renewed)
    fresh: dict[int, Any] = {}
    for rows in _alike(renewed, axes, old):
        arrays = [old[renewed[row].position] for row in rows]
        leaves = [renewed[row].leaf for row in rows]
        own_keys = None if keys is None else keys[np.array(rows), : counts[rows[0]]]
        each = bool(renewed[rows[0]].devices)
        values = fresh_values(function, arrays, leaves, own_keys, axes[rows[0]], each, lost)
        fresh.update(zip((renewed[row].position for row in rows), values, strict=True))
    problems = Problems()
    for array in renewed:
        add_change(problems, array.leaf, old[array.position], fresh[array.position])
    check_kept(problems, StructureError)
    return fresh


def _alike(renewed: Sequence[ArrayInfo], axes: Sequence[int | None], old: Sequence[Any]) -> Iterator[list[int]]:
    """Yields the rows of arrays that one loop renews: of one type, with as many slots, and not too large together."""
    groups: dict[Hashable, list[int]] = {}
    for row, (array, axis) in enumerate(zip(renewed, axes, strict=True)):
        groups.setdefault((jax.typeof(old[array.position]), axis, array.devices), []).append(row)
    for rows in groups.values():
        number = min(_LONGEST_LOOP, max(1, _LARGEST_LOOP // max(1, renewed[rows[0]].held.nbytes)))
        yield from (rows[start : start + number] for start in range(0, len(rows), number))


def _array_paths(plan: PlanTables, kind: str) -> list[Path]:
    """Returns the path of each of a kind's arrays: its leaf's, and, if a Variable holds several, the keys within."""
    rows = (row for row in plan.rows if row.kind == kind)
    paths = [row.path + keys for row in rows for keys in keys_within(row.structure, len(row.specs))]
    return paths + [path for derived in plan.derived if derived.into == kind for path in derived.leaf_paths]


def _by_init(chosen: Chosen, now: Mapping[str, Sequence[Any]]) -> dict[int, Any]:
    """Returns optimizer state as `init` makes it from the parameters, already renewed, by position."""
    fresh: dict[int, Any] = {}
    for index in chosen.groups:
        group = chosen.plan.arrays_of(chosen.plan.optimizers[index])
        params = [now[source.kind][source.position] for source in group.sources]
        fresh.update(enumerate(initial_state(chosen.plan, group, params), group.start))
    return fresh


def initial_state(plan: PlanTables, group: DerivedArrays, params: Sequence[Any]) -> list[Any]:
    """Returns an optimizer's state as its `init` makes it from the parameters of one model."""
    init = group.derived.init
    if plan.per_device is None or not any(array.devices for array in (*group.arrays, *group.sources)):
        return list(init(params))
    # Each device starts from its own parameters.  State that has one value for all is the same on each.
    axes = [0 if source.devices else None for source in group.sources]
    states = jax.vmap(init, (axes,), axis_size=plan.per_device.devices)(list(params))
    return [state if array.devices else state[0] for array, state in zip(group.arrays, states, strict=True)]
