"""Per-device values into one: `state.reduce_devices("stats", how="mean")`.

What comes out is a state of another plan, in which the folded kinds are replicated: one value, on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from statewise._src.common.narrowing import WIDE, as_jax, refuse
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems, add_change
from statewise._src.core.member_view import as_ensemble, as_one, for_each_member, is_of_one_member, single_of
from statewise._src.core.state_data import Part, StateT, check_fits, check_not_donated
from statewise._src.core.usable import check_concrete_kinds
from statewise._src.plan.kind import Kind, with_kinds
from statewise._src.plan.per_device import PerDeviceArrays
from statewise._src.plan.placements import reduced
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.array_placement import ArrayPlacement
from statewise._src.sharding.part_shardings import PartShardings
from statewise._src.sharding.resolve import on_mesh, slot_shardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["How", "check_not_per_device", "reduce_devices"]

How = Literal["mean", "first"] | Callable[[jax.Array], jax.Array]


def reduce_devices(state: StateT, kinds: Sequence[str], how: object) -> StateT:
    """See `State.reduce_devices`."""
    if is_of_one_member(state):
        return as_ensemble(state.tables.ensemble, reduce_devices(as_one(state), kinds, how))
    plan = state.tables
    for kind in kinds:
        state.part(kind)
    if how not in ("mean", "first") and (isinstance(how, type) or not callable(how)):
        shown = repr(how) if isinstance(how, str) else type(how).__name__
        raise DeclarationError(
            f"how={shown} does not say how several values become one.",
            hint="how='mean', how='first', or a function of the stacked values: how=lambda array: array.max(axis=0)",
        )
    copies = plan.per_device
    have = [kind for kind in plan.kinds if copies and copies.of(kind)]
    # Averages lie as what they are of, so that is what is folded, and they with it.
    of = {one.into: [other.kind for other in plan.averages if other.into == one.into] for one in plan.averages}
    chosen = tuple(dict.fromkeys(one for kind in tuple(kinds) or have for one in _folded_for(kind, of, have)))
    missing = [kind for kind in chosen if kind not in have]
    if missing or copies is None:
        what = f"Kind {missing[0]!r} holds" if missing else "This state holds"
        raise DeclarationError(
            f"{what} one value of each leaf: there is nothing to fold.",
            kind=missing[0] if missing else None,
            hint=f"state.reduce_devices({', '.join(map(repr, have))})" if have else "it can be used as it is",
        )
    folds = _with_averages(plan, copies, chosen)
    touched = tuple(kind for kind, _ in folds.positions)
    check_not_donated(state, touched)
    check_fits(state, touched)
    check_concrete_kinds(
        state,
        touched,
        "reduce",
        "state, report = sw.restore(path, state)  # then reduce what comes out of it",
    )
    if how == "mean":
        _check_means(plan, copies, chosen)
    kinds_after = with_kinds(plan.kinds, {kind: _folded_kind(plan.kinds, kind) for kind in chosen})
    target = _target(plan, kinds_after)
    parts = [state.part(kind).arrays for kind in touched]
    places = tuple(state.part(kind).places() for kind in touched)
    made = list(state.parts)
    for kind, arrays in zip(touched, _program(plan, target, folds, how, places)(parts), strict=True):
        made[plan.kind_index[kind]] = Part(tuple(arrays))
    return state.make(target, made)


def _folded_for(kind: str, of: Mapping[str, Sequence[str]], have: Sequence[str]) -> list[str]:
    return [one for one in of[kind] if one in have] if kind in of and kind in have else [kind]


def _with_averages(plan: PlanTables, copies: PerDeviceArrays, kinds: Sequence[str]) -> PerDeviceArrays:
    """What is folded with these kinds: their averages lie as they do."""
    found = {kind: set(copies.of(kind)) for kind in kinds}
    for one in plan.derived_arrays:
        own = copies.of(one.derived.into).intersection(array.position for array in one.arrays)
        if own and set(one.derived.kinds) & set(kinds):
            found.setdefault(one.derived.into, set()).update(own)
    return copies._replace(positions=tuple((kind, frozenset(at)) for kind, at in found.items()))


def check_not_per_device(plan: PlanTables, why: str) -> None:
    """Raises for a state with per-device values, where one value is wanted."""
    assert plan.per_device is not None
    kinds = [kind for kind, _ in plan.per_device.positions]
    raise StructureError(
        f"This state has a value of each device in {', '.join(kinds)}, but {why}",
        leaves=_leaves(plan, plan.per_device, kinds),
        kind=kinds[0],
        hint=f"one = state.reduce_devices({', '.join(map(repr, kinds))}, how='mean')  # or how='first'\n"
        "one.plan.build(one)",
    )


def _leaves(plan: PlanTables, copies: PerDeviceArrays, kinds: Sequence[str]) -> list[Leaf]:
    found = [plan.leaf_of_array[kind][at] for kind in kinds for at in sorted(copies.of(kind))]
    return list(dict.fromkeys(found))


def _folded_kind(kinds: Mapping[str, Kind], kind: str) -> Any:
    return dataclasses.replace(kinds[kind], placement=reduced(kinds[kind].placement))


def _target(plan: PlanTables, kinds: Mapping[str, Kind]) -> PlanTables:
    """The plan of the folded state: of the same leaves and packing, on the same mesh."""
    assert plan.per_device is not None
    return on_mesh(plan.changed(kinds=kinds, per_device=None), plan.per_device.mesh)


def _check_means(plan: PlanTables, copies: PerDeviceArrays, kinds: Sequence[str]) -> None:
    odd = [
        dataclasses.replace(plan.leaf_of_array[kind][at], note="has no mean")
        for kind in kinds
        for at in sorted(copies.of(kind))
        if not jnp.issubdtype(plan.specs[kind][at].dtype, jnp.inexact)
    ]
    if odd:
        listed = ", ".join(map(repr, dict.fromkeys(leaf.kind for leaf in odd)))
        raise StructureError(
            "Whole numbers, booleans and keys have no mean.",
            leaves=odd,
            kind=odd[0].kind,
            hint=f"state.reduce_devices({listed}, how='first')",
        )


@functools.lru_cache(maxsize=64)
def _program(
    plan: PlanTables, target: PlanTables, copies: PerDeviceArrays, how: How, places: tuple[PartShardings | None, ...]
) -> Any:
    kinds = [kind for kind, _ in copies.positions]
    whole, plan = plan, single_of(plan)

    def folded_parts(parts: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        lost: list[Leaf] = []
        made = [
            tuple(
                _one(leaf, array, how, lost) if at in copies.of(kind) else array
                for at, (leaf, array) in enumerate(zip(plan.leaf_of_array[kind], part, strict=True))
            )
            for kind, part in zip(kinds, parts, strict=True)
        ]
        _check_shapes(plan, kinds, made)
        refuse(lost, StructureError, WIDE)
        return made

    if not all(places):
        return jax.jit(for_each_member(whole, folded_parts, kinds, kinds, target))
    if whole.ensemble is not None:
        slots = dict(zip(target.kinds, slot_shardings(target, copies.mesh), strict=True))
        return jax.jit(
            for_each_member(whole, folded_parts, kinds, kinds, target),
            out_shardings=[tuple(slots[kind]) for kind in kinds],
        )
    there = [
        tuple(
            ArrayPlacement((), sharding.memory_kind).sharding(sharding.mesh) if at in copies.of(kind) else sharding
            for at, sharding in enumerate(lie.shardings if lie else ())
        )
        for kind, lie in zip(kinds, places, strict=True)
    ]
    return jax.jit(folded_parts, out_shardings=there)


def _one(leaf: Leaf, array: Any, how: How, lost: list[Leaf]) -> Any:
    array = _with_whole_axis(array)
    if how == "first":
        return array[0]
    return array.mean(axis=0) if isinstance(how, str) else as_jax(leaf, how(array), lost)


def _with_whole_axis(array: Any) -> Any:
    """The array with its leading axis whole on each device, where a mesh of explicit axes would not have it indexed."""
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    return jax.reshard(array, jax.NamedSharding(sharding.mesh, jax.P(None, *sharding.spec[1:])))


def _check_shapes(plan: PlanTables, kinds: Sequence[str], parts: Sequence[Sequence[Any]]) -> None:
    problems = Problems()
    for kind, part in zip(kinds, parts, strict=True):
        for leaf, spec, array in zip(plan.leaf_of_array[kind], plan.specs[kind], part, strict=True):
            add_change(problems, leaf, spec, array)
    problems.raise_as(
        StructureError,
        "What folds these values changes the shape or dtype of the leaf.",
        "a function that takes the leading axis away: how=lambda array: array.max(axis=0)",
    )
