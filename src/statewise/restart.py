"""Fresh values for whole kinds or chosen slots, in place.

The compiled function takes the arrays donated and gives fresh ones into the same buffers; arrays that a
`restart` only looks at by shape (`jnp.zeros_like`) are kept as arguments all the same, so that their buffers
can be used.  It is compiled once for each plan, set of kinds, and way of choosing slots.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise.errors import KindError, StructureError
from statewise.inside import as_ensemble, as_one, is_of_one_member, single_of
from statewise.kinds import Kind
from statewise.paths import Leaf, format_shape
from statewise.places import Places
from statewise.plan import Plan
from statewise.state import (
    Part,
    State,
    check_fits,
    check_unspent,
    deleted_kinds,
    make_state,
    refuse_shared,
    spent_error,
)
from statewise.using import averages_in, begun_again

__all__ = ["restart"]


def restart(state: State, kinds: Sequence[str], where: Any) -> State:
    """See `State.restart`."""
    if is_of_one_member(state):
        return as_ensemble(state._plan._members, restart(as_one(state), kinds, where))
    plan = state._plan
    chosen = tuple(dict.fromkeys(kinds)) or _restartable(plan)
    averages = tuple(name for name in chosen if averages_in(plan, name))
    if averages:
        return _begun_again(state, averages, tuple(name for name in chosen if name not in averages), where)
    for name in chosen:
        state.part(name)
        _check_kind(plan, name, plan.kinds[name], where is not None)
    check_unspent(state, chosen)
    _refuse_abstract(state, chosen)
    slots = None
    if where is not None:
        check_fits(state, chosen)
        slots = _slots(plan, chosen, where)
    old = [state.part(name).arrays for name in chosen]
    places = tuple(state.part(name).places() for name in chosen)
    try:
        # Inside of a transform it is the transform that owns the arrays.
        donate = not any(isinstance(array, jax.core.Tracer) for part in old for array in part)
        fresh = _program(plan, chosen, slots is not None, places, donate)(old, slots)
    except (RuntimeError, ValueError) as error:
        deleted = [name for name in deleted_kinds(state) if name in chosen]
        if deleted:
            raise spent_error(state, deleted) from error
        refuse_shared(state)
        raise
    made = list(state._parts)
    for name, arrays in zip(chosen, fresh, strict=True):
        part = state.part(name)
        if not any(isinstance(array, jax.core.Tracer) for array in arrays):
            part.spent = f"restart({name!r})"
        made[plan._index[name]] = Part(tuple(arrays))
    return make_state(plan, made)


def _begun_again(state: State, averages: Sequence[str], others: Sequence[str], where: Any) -> State:
    """Averages begin as copies of what they are of, after whatever else is restarted."""
    if where is not None:
        raise KindError(
            f"The averages {averages[0]!r} have no slots: they begin again as a whole.",
            kind=averages[0],
            mend=f"state.restart({', '.join(map(repr, averages))})",
        )
    check_unspent(state, [one.kind for name in averages for one, _ in averages_in(state._plan, name)])
    if others:
        state = restart(state, others, None)
    for name in averages:
        state = begun_again(state, name)
    return state


def _refuse_abstract(state: State, kinds: Sequence[str]) -> None:
    if any(isinstance(array, jax.ShapeDtypeStruct) for kind in kinds for array in state.part(kind).arrays):
        raise StructureError(
            "This state is abstract: it has shapes, but no arrays to restart.",
            kind=kinds[0],
            mend="state = plan.take(model)  # or restore into it: state, report = sw.restore(path, state)",
        )


def _restartable(plan: Plan) -> tuple[str, ...]:
    names = tuple(
        name for name, kind in plan.kinds.items() if kind.restart is not None and not kind.frozen and plan._specs[name]
    )
    if not names:
        raise KindError(
            "There is nothing to restart: no kind that has leaves declares how a fresh value is made.",
            mend="cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like)",
        )
    return names


def _check_kind(plan: Plan, name: str, kind: Kind, by_slot: bool) -> None:
    if kind.frozen:
        raise KindError(f"Kind {name!r} is frozen and cannot be restarted.", kind=name, mend="frozen=False")
    if kind.restart is None:
        raise KindError(
            f"Kind {name!r} does not declare how a fresh value is made.",
            kind=name,
            mend=f"{name}=sw.Kind(..., restart=jnp.zeros_like)",
        )
    if not plan._specs[name]:
        raise KindError(
            f"Kind {name!r} has no leaves in this model, so there is nothing to restart.",
            kind=name,
            mend="make the leaves before the plan is made: model.init_cache(...), say",
        )
    if by_slot and kind.batch_axis is None:
        raise KindError(
            f"Kind {name!r} declares no batch_axis, so its slots cannot be told apart.",
            kind=name,
            mend=f"{name}=sw.Kind(..., restart=jnp.zeros_like, batch_axis=0)",
        )


def _slots(plan: Plan, kinds: Sequence[str], where: Any) -> Any:
    """The slots as booleans, one for each; every leaf that has no such axis, or another length, is listed.

    Of an ensemble they may have a row for each member.
    """
    given = where if isinstance(where, jax.Array) else np.asarray(where)
    if plan._members is not None:
        if given.ndim == 2 and given.dtype == bool and given.shape[0] == plan._members.number:
            _refuse_shared_kinds(plan, kinds)
            _slots(plan._members.single, kinds, np.zeros(given.shape[1], bool))  # as many slots as there are
            return given
        plan = plan._members.single
    if given.ndim != 1 or not (given.dtype == bool or jnp.issubdtype(given.dtype, jnp.integer) or given.size == 0):
        raise StructureError(
            f"where must be booleans or slot numbers in one dimension, not {given.dtype}{list(given.shape)}.",
            mend="where=jnp.array([True, False]) or where=[0]",
        )
    sizes = _slot_counts(plan, tuple(kinds))
    is_mask = given.dtype == bool
    count = given.shape[0] if is_mask else max(size for _, size in sizes)
    odd = [
        dataclasses.replace(leaf, note=f"{size} slots" if size >= 0 else "has no such axis")
        for leaf, size in sizes
        if size < 0 or size != count
    ]
    found = {size for _, size in sizes}
    if is_mask and len(found) == 1 and found != {count} and min(found) >= 0:
        raise StructureError(
            f"where has {count} entries, but {', '.join(kinds)} has {min(found)} slots.",
            kind=kinds[0],
            mend=f"a boolean for each of the {min(found)} slots, or slot numbers",
        )
    if odd:
        slots = f"{count} slots along its batch axis" if count >= 0 else "its batch axis"
        raise StructureError(
            f"Not every leaf of {', '.join(kinds)} has {slots}.",
            leaves=odd,
            kind=kinds[0],
            mend="claim these leaves by a kind of their own, or restart the whole kind: state.restart(...)",
        )
    if is_mask:
        return given
    if not isinstance(given, jax.core.Tracer) and given.size:
        outside = [slot for slot in np.asarray(given).tolist() if not -count <= slot < count]
        if outside:
            raise StructureError(
                f"There is no slot {outside[0]}: there are {count}.", kind=kinds[0], mend=f"slots 0 to {count - 1}"
            )
    return jnp.zeros(count, bool).at[given.astype(int)].set(True)


def _refuse_shared_kinds(plan: Plan, kinds: Sequence[str]) -> None:
    shared = [
        dataclasses.replace(leaf, note="shared by all members")
        for kind in kinds
        for leaf, axis in zip(plan._leaf_of_slot[kind], plan._slot_axes[kind], strict=True)
        if axis is None
    ]
    if shared:
        raise StructureError(
            "where has a row for each member, and the members share these leaves.",
            leaves=shared,
            kind=shared[0].kind,
            mend="where= in one dimension: the slots that restart for all of them",
        )


@functools.lru_cache(maxsize=256)
def _slot_counts(plan: Plan, kinds: tuple[str, ...]) -> list[tuple[Leaf, int]]:
    """How many slots each array has along its batch axis, on all devices, with its leaf; -1 where it has none."""
    counts = []
    for name in kinds:
        axis = plan.kinds[name].batch_axis or 0
        for at, (leaf, spec) in enumerate(zip(plan._row_of_array[name], plan._specs[name], strict=True)):
            here = spec.shape[axis] if -len(spec.shape) <= axis < len(spec.shape) else -1
            copies = plan._copies
            each = copies.devices if copies and at in copies.of(name) else 1
            counts.append((leaf, here * each if here >= 0 else here))
    return counts


@functools.lru_cache(maxsize=256)
def _program(
    plan: Plan, kinds: tuple[str, ...], by_slot: bool, places: tuple[Places | None, ...], donate: bool = True
) -> Any:
    whole, plan = plan, single_of(plan)

    def fresh_values(parts: list[tuple[Any, ...]], slots: Any) -> list[tuple[Any, ...]]:
        parts = [plan._unpacked(name, tuple(part)) for name, part in zip(kinds, parts, strict=True)]
        each = [plan._copies.of(name) if plan._copies else frozenset() for name in kinds]
        fresh = [
            [_call(plan.kinds[name], array, at in mine) for at, array in enumerate(part)]
            for name, part, mine in zip(kinds, parts, each, strict=True)
        ]
        _check_fresh(plan, kinds, parts, fresh)
        if slots is None:
            return [plan._packed(name, tuple(part)) for name, part in zip(kinds, fresh, strict=True)]
        return [
            plan._packed(
                name,
                tuple(
                    _where(plan.kinds[name], slots, *both, at in mine)
                    for at, both in enumerate(zip(new, old, strict=True))
                ),
            )
            for name, new, old, mine in zip(kinds, fresh, parts, each, strict=True)
        ]

    # Fresh values depend on nothing that lies anywhere: XLA would put them all on every device.
    there = [None if lie is None else lie.shardings for lie in places]
    options: dict[str, Any] = {"out_shardings": there} if any(places) else {}
    if donate:
        options["donate_argnums"] = 0
    return jax.jit(_on_members(whole, kinds, fresh_values), keep_unused=True, **options)


def _on_members(plan: Plan, kinds: tuple[str, ...], fresh_values: Any) -> Any:
    """The same for each member of an ensemble; the slots are chosen alike in all, or each has a row of its own."""
    members = plan._members
    if members is None:
        return fresh_values
    axes = [plan._slot_axes[kind] for kind in kinds]

    def of_all(parts: list[tuple[Any, ...]], slots: Any) -> Any:
        by_member = slots is not None and slots.ndim == 2
        given = (parts, slots if by_member else None)
        ins = (axes, 0 if by_member else None)
        return members.each(lambda both: fresh_values(both[0], both[1] if by_member else slots), given, ins, axes)

    return of_all


def _call(kind: Kind, array: Any, each: bool) -> Any:
    """A fresh value; `each` where the array has a leading axis, one value for each device."""
    assert kind.restart is not None
    return jnp.asarray((jax.vmap(kind.restart) if each else kind.restart)(array))


def _check_fresh(plan: Plan, kinds: Sequence[str], old: Sequence[Any], fresh: Sequence[Any]) -> None:
    for name, part, new in zip(kinds, old, fresh, strict=True):
        odd = [
            dataclasses.replace(leaf, note=f"would become {format_shape(now.shape)} {now.dtype}")
            for leaf, was, now in zip(plan._row_of_array[name], part, new, strict=True)
            if (was.shape, was.dtype) != (now.shape, now.dtype)
        ]
        if odd:
            raise StructureError(
                f"The restart of kind {name!r} changes shapes or dtypes.",
                leaves=odd,
                kind=name,
                mend="restart=jnp.zeros_like, or any function that keeps shape and dtype",
            )


def _where(kind: Kind, slots: Any, fresh: Any, old: Any, each: bool) -> Any:
    if each:  # the slots of the first device come first
        by_device = slots.reshape(old.shape[0], -1)
        return jax.vmap(lambda slots, fresh, old: _where(kind, slots, fresh, old, False))(by_device, fresh, old)
    axis = (kind.batch_axis or 0) % old.ndim
    return jnp.where(slots.reshape([-1 if at == axis else 1 for at in range(old.ndim)]), fresh, old)
