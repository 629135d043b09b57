"""Per-device values reduced to one: `state.reduce_devices("stats", how="mean")`.

The result is a state of another plan, in which the reduced kinds are replicated: one value, on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from statewise._src.common.narrowing import WIDE, as_jax, refuse
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems, add_change
from statewise._src.core.member_view import (
    as_ensemble,
    as_one,
    compiled,
    for_each_member,
    is_of_one_member,
    single_of,
    with_complete_axis,
)
from statewise._src.core.state_data import StateT, kind_arrays, kind_places, mesh_of, with_arrays
from statewise._src.core.usable import check_usable
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.kind import with_kinds
from statewise._src.plan.placements import reduced
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import PartShardings
from statewise._src.sharding.resolve import on_mesh, slot_shardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["How", "check_not_per_device", "reduce_devices"]

How = Literal["mean", "first"] | Callable[[jax.Array], jax.Array]


def reduce_devices(state: StateT, kinds: Sequence[str], how: object) -> StateT:
    """Implements `State.reduce_devices`."""
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
    chosen = _chosen(plan, kinds)
    arrays = _reduced(plan, chosen)
    # Averages and optimizer state of the chosen kinds have per-device values as well.
    touched = tuple(dict.fromkeys(array.kind for array in arrays))
    check_usable(state, touched, "reduce", "state, report = sw.restore(path, state)  # then reduce the restored state")
    # Only the chosen kinds: what is derived from them, moments and averages, consists of floats.
    if how == "mean":
        _check_means(array for array in arrays if array.kind in chosen)
    target = _target(plan, chosen)
    program = _program(plan, target, chosen, how, kind_places(state, touched))
    return with_arrays(state, dict(zip(touched, program(kind_arrays(state, touched)), strict=True)), target)


def _chosen(plan: PlanTables, kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns the kinds to reduce; instead of averages, the kinds that they track, as both are placed alike."""
    per_device = _per_device_kinds(plan)
    chosen: dict[str, None] = {}
    for kind in kinds or per_device:
        tracked = [average.kind for average in plan.averages if average.into == kind and average.kind in per_device]
        chosen |= dict.fromkeys(tracked or [kind])
    missing = next((kind for kind in chosen if kind not in per_device), None)
    if missing is not None or not chosen:
        subject = "This state has" if missing is None else f"Kind {missing!r} has"
        raise DeclarationError(
            f"{subject} one value of each leaf: there is nothing to reduce.",
            kind=missing,
            hint=f"state.reduce_devices({', '.join(map(repr, per_device))})" if per_device else "use it as it is",
        )
    return tuple(chosen)


def _per_device_kinds(plan: PlanTables) -> list[str]:
    return [kind for kind in plan.kinds if plan.per_device and plan.per_device.of(kind)]


def _reduced(plan: PlanTables, kinds: Sequence[str]) -> list[ArrayInfo]:
    """Returns the arrays to reduce: those of the kinds, and those that are derived from them."""
    return [
        array
        for array in plan.arrays
        if array.devices and (array.kind in kinds or (array.derived and set(array.derived.kinds) & set(kinds)))
    ]


def check_not_per_device(plan: PlanTables, why: str) -> None:
    """Raises the error for a state with per-device values where one value of each leaf is needed."""
    kinds = _per_device_kinds(plan)
    raise StructureError(
        f"This state has per-device values in {', '.join(kinds)}, but {why}",
        leaves=list(dict.fromkeys(array.leaf for array in plan.arrays if array.devices)),
        kind=kinds[0],
        hint=f"one = state.reduce_devices({', '.join(map(repr, kinds))}, how='mean')  # or how='first'\n"
        "one.plan.build(one)",
    )


def _target(plan: PlanTables, kinds: Sequence[str]) -> PlanTables:
    """Returns the plan of the reduced state: with the same leaves and packing, on the same mesh."""
    assert plan.per_device is not None
    placed = {
        kind: dataclasses.replace(plan.kinds[kind], placement=reduced(plan.kinds[kind].placement)) for kind in kinds
    }
    return on_mesh(plan.changed(kinds=with_kinds(plan.kinds, placed), per_device=None), plan.per_device.mesh)


def _check_means(arrays: Iterable[ArrayInfo]) -> None:
    problems = Problems()
    for array in arrays:
        if not jnp.issubdtype(array.spec.dtype, jnp.inexact):
            problems.add(array.leaf, "does not have a mean")
    kinds = ", ".join(map(repr, dict.fromkeys(leaf.kind for leaf in problems.leaves)))
    problems.raise_as(
        StructureError,
        "Integers, booleans and keys do not have a mean.",
        f"state.reduce_devices({kinds}, how='first')",
    )


@functools.lru_cache(maxsize=64)
def _program(
    plan: PlanTables, target: PlanTables, chosen: tuple[str, ...], how: How, places: tuple[PartShardings | None, ...]
) -> Any:
    """Returns the compiled function from the parts of the touched kinds to their parts in the reduced state."""
    single = single_of(plan)
    reduced = frozenset((array.kind, array.position) for array in _reduced(single, chosen))
    kinds = [kind for kind in plan.kinds if any(kind == name for name, _ in reduced)]

    def reduced_parts(parts: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        lost: list[Leaf] = []
        problems = Problems()
        results = []
        for kind, part in zip(kinds, parts, strict=True):
            new = []
            # A kind with per-device values is never packed, so its part stores its arrays in order.
            for info, array in zip(single.by_kind[kind], part, strict=True):
                new.append(_reduce(info.leaf, array, how, lost) if (kind, info.position) in reduced else array)
                add_change(problems, info.leaf, info.spec, new[-1])
            results.append(tuple(new))
        problems.raise_as(
            StructureError,
            "The function in how= changes the shape or dtype of a leaf.",
            "a function that removes the leading axis: how=lambda array: array.max(axis=0)",
        )
        # After the shapes: a result that was lost is replaced by zeros of its shape.
        refuse(lost, StructureError, WIDE)
        return results

    # Left to itself, XLA would choose the shardings of the results.
    shardings: list[PartShardings | None] = [None] * len(kinds)
    mesh = mesh_of(places)
    if all(places) and mesh is not None:
        by_kind = dict(zip(target.kinds, slot_shardings(target, mesh), strict=True))
        shardings = [PartShardings(tuple(by_kind[kind])) for kind in kinds]
    return compiled(for_each_member(plan, reduced_parts, kinds, kinds, target), target, kinds, shardings)


def _reduce(leaf: Leaf, array: Any, how: How, lost: list[Leaf]) -> Any:
    array = with_complete_axis(array, 0)
    if how == "first":
        return array[0]
    return array.mean(axis=0) if isinstance(how, str) else as_jax(leaf, how(array), lost)
