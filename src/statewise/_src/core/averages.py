"""Averages swapped in for the values that they track, and restarted with them.

`state.with_averages("ema")` is a state of the same plan whose averaged kinds hold the averages, so every step accepts
it.  It holds copies, in the dtypes and with the shardings of the values that they replace: no later step on one of the
two states donates arrays of the other.

When a kind restarts, its averages restart as copies of the new values, in the same slots.  Averages of the old values
would hand the last tenant's adapter to the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from statewise._src.common.narrowing import Casts, may_lose
from statewise._src.common.nnx_graph import is_abstract
from statewise._src.core.member_view import as_ensemble, as_one, compiled, for_each_member, is_of_one_member, single_of
from statewise._src.core.restart_slots import axis_of_rows, only_where
from statewise._src.core.restart_targets import Chosen
from statewise._src.core.state_data import (
    StateData,
    StateT,
    check_fits,
    check_not_donated,
    kind_arrays,
    kind_places,
    with_arrays,
)
from statewise._src.plan.averages import Average
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import PartShardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["averages_in", "followers", "with_averages", "with_restarted_averages"]


def averages_in(plan: PlanTables, name: str) -> list[tuple[Average, int]]:
    """Returns the averages of one name, each with the position of its first array in their kind."""
    placed = (placed for placed in plan.derived_arrays if placed.derived.mirrors and placed.derived.into == name)
    return [(each.derived, each.start) for each in placed]


def with_averages(state: StateT, name: str) -> StateT:
    """Implements `State.with_averages`."""
    if is_of_one_member(state):
        return as_ensemble(state.tables.ensemble, with_averages(as_one(state), name))
    plan = state.tables
    averages = averages_in(plan, name)
    if not averages:
        known = list(dict.fromkeys(average.into for average in plan.averages))
        raise DeclarationError(
            f"There are no averages {name!r}.",
            kind=str(name),
            hint=f"one of: {', '.join(known)}"
            if known
            else f"kinds.plan(model, ..., averages={{'params': sw.EMA(0.999, name={name!r})}})",
        )
    _check_casts(state, name, to_values=True)
    check_not_donated(state, [name])
    arrays = state.part(name).arrays
    if is_abstract(arrays):
        return state  # shapes and dtypes are those of the values
    if plan.packing:
        check_fits(state, [name])
    tracked = [average.kind for average, _ in averages]
    places = kind_places(state, tracked)
    values = _values_program(plan, name, places)([arrays])
    return with_arrays(state, dict(zip(tracked, values, strict=True)))


@functools.lru_cache(maxsize=64)
def _values_program(plan: PlanTables, name: str, places: tuple[PartShardings | None, ...]) -> Any:
    """Returns the compiled function from the averages to the kinds that they track."""
    single = single_of(plan)
    averages = averages_in(single, name)

    def values(parts: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        own = single.unpack(name, tuple(parts[0]))
        tracked = []
        for average, start in averages:
            specs = single.specs[average.kind]
            arrays = [jnp.array(array, spec.dtype) for array, spec in zip(own[start:], specs, strict=False)]
            tracked.append(single.pack(average.kind, tuple(arrays)))
        return tracked

    kinds = [average.kind for average, _ in averages]
    return compiled(for_each_member(plan, values, [name], kinds), plan, kinds, places)


def _check_casts(state: StateData, name: str, *, to_values: bool) -> None:
    narrowed = _narrowed(state.tables, name, to_values)
    check_not_donated(state, dict.fromkeys(kind for kind, _, _ in narrowed))
    casts = Casts()
    for kind, slot, dtype in narrowed:
        casts.add(state.tables.stored[kind][slot].leaf, state.part(kind).arrays[slot], dtype)
    casts.check(StructureError, "a wider dtype for the values and their averages: state.cast(params='float32')")


@functools.lru_cache(maxsize=64)
def _narrowed(plan: PlanTables, name: str, to_values: bool) -> tuple[tuple[str, int, Any], ...]:
    """Returns the kind and slot of each array whose numbers the other dtype may not represent, and that dtype."""
    slots: dict[tuple[str, int, Any], None] = {}
    for average, _ in averages_in(plan, name):
        placed = plan.arrays_of(average)
        # The count of a schedule comes after the averages, and does not have a source.
        for own, source in zip(placed.arrays, placed.sources, strict=False):
            old, new = (own, source) if to_values else (source, own)
            if may_lose(old.spec.dtype, new.spec.dtype):
                slots[old.kind, old.slot, new.spec.dtype] = None
    return tuple(slots)


# --- restarting --------------------------------------------------------------------------------------------------


def followers(plan: PlanTables, kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the averages that track some of these kinds."""
    return tuple(dict.fromkeys(average.into for average in plan.averages if average.kind in kinds))


def with_restarted_averages(state: StateT, chosen: Chosen, names: Sequence[str], slots: Any) -> StateT:
    """Returns a state with averages that restart from the values of the chosen kinds, as they are now.

    A schedule's count restarts with its complete kind, and continues if only some slots restart: all slots share it.

    Args:
      state: the state.
      chosen: the kinds.
      names: the names of the averages.
      slots: a boolean for each slot; None restarts all.

    Raises:
      StructureError: the dtype of an average cannot represent its value.
    """
    plan, restarted = state.tables, {}
    complete = []
    for name in names:
        _check_casts(state, name, to_values=False)
        averages = averages_in(plan, name)
        tracked = [average.kind for average, _ in averages if average.kind in chosen.kinds]
        # Averages that restart completely are not read: they may have been donated.
        is_complete = slots is None and len(tracked) == len(averages)
        complete += [name] * is_complete
        arrays = kind_arrays(state, tracked if is_complete else [name, *tracked])
        if not any(map(is_abstract, arrays)):
            program = _restart_program(plan, chosen, name, is_complete, state.part(name).places())
            (restarted[name],) = program(arrays, slots)
    return with_arrays(state, restarted, fresh=complete) if restarted else state


@functools.lru_cache(maxsize=64)
def _restart_program(
    plan: PlanTables, chosen: Chosen, name: str, is_complete: bool, places: PartShardings | None
) -> Any:
    """Returns the compiled function from the averages (unless complete), the tracked kinds and slots to averages."""
    single, members = chosen.plan, plan.ensemble
    averages = [(average, start) for average, start in averages_in(single, name) if average.kind in chosen.kinds]
    infos = single.by_kind[name]
    kinds = [*([] if is_complete else [name]), *(average.kind for average, _ in averages)]
    axes = [plan.slot_axes[kind] for kind in kinds]

    def of_one(parts: list[tuple[Any, ...]], slots: Any) -> list[tuple[Any, ...]]:
        parts = [single.unpack(kind, tuple(part)) for kind, part in zip(kinds, parts, strict=True)]
        # All are copied, also those that do not restart: the old state must not share what the next step donates.
        arrays: list[Any] = [None] * len(infos) if is_complete else [jnp.array(array) for array in parts.pop(0)]
        for (average, start), values in zip(averages, parts, strict=True):
            fresh = average.init(values)
            if slots is None:
                arrays[start : start + len(fresh)] = fresh
                continue
            axis = chosen.axis(average.kind) or 0
            for position, value in enumerate(fresh[: len(values)], start):  # without the count of a schedule
                arrays[position] = only_where(axis, slots, value, arrays[position], bool(infos[position].devices))
        return [single.pack(name, tuple(arrays))]

    def of_all(parts: list[tuple[Any, ...]], slots: Any) -> Any:
        if members is None:
            return of_one(parts, slots)
        return members.each(
            lambda given: of_one(*given), (parts, slots), (axes, axis_of_rows(slots)), [plan.slot_axes[name]]
        )

    return compiled(of_all, plan, [name], [places])
