"""Averages read: in the place of what they are of, and begun again.

`state.with_averages("ema")` is a state of the same plan whose averaged kinds hold the averages, so every step takes it
as it is.  What it holds in their place are copies, in the dtypes and where the leaves were: no later step on the one
state donates the other's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common.narrowing import Casts, may_lose
from statewise._src.common.nnx_graph import is_abstract
from statewise._src.core.member_view import as_ensemble, as_one, for_each_member, is_of_one_member, single_of
from statewise._src.core.state_data import Part, StateData, StateT, check_fits, check_not_donated
from statewise._src.plan.averages import Average
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import PartShardings
from statewise.errors import DeclarationError, StructureError

__all__ = ["averages_in", "begun_again", "check_starts", "with_averages"]


def averages_in(plan: PlanTables, name: str) -> list[tuple[Average, int]]:
    """The averages of a name, each with where it begins in their kind."""
    return [(one.derived, one.start) for one in plan.derived_arrays if one.derived.mirrors and one.derived.into == name]


def with_averages(state: StateT, name: str) -> StateT:
    """See `State.with_averages`."""
    if is_of_one_member(state):
        return as_ensemble(state.tables.ensemble, with_averages(as_one(state), name))
    plan = state.tables
    averages = averages_in(plan, name)
    if not averages:
        known = list(dict.fromkeys(one.into for one in plan.averages))
        raise DeclarationError(
            f"There are no averages {name!r}.",
            kind=str(name),
            hint=f"one of: {', '.join(known)}"
            if known
            else f"kinds.plan(model, ..., averages={{'params': sw.EMA(0.999, name={name!r})}})",
        )
    _check_casts(state, _narrowed_values(plan, name))
    return _replaced(state, [name], [one.kind for one, _ in averages], _values, name)


def begun_again(state: StateT, name: str) -> StateT:
    """This state with the averages of a name as they are at the start: copies of the values."""
    check_starts(state, name)
    return _replaced(state, [one.kind for one, _ in averages_in(state.tables, name)], [name], _starts, name)


def check_starts(state: StateData, name: str) -> None:
    """Refuses values that the dtype of their averages cannot hold.

    Raises:
      StructureError: their leaves.
    """
    _check_casts(state, _narrowed_starts(state.tables, name))


Narrowed = tuple[tuple[str, int, Any], ...]


@functools.lru_cache(maxsize=64)
def _narrowed_values(plan: PlanTables, name: str) -> Narrowed:
    """The slots of the averages, by kind and number, that take another dtype as values, and which."""
    wanted: dict[int, Any] = {}
    for one, start in averages_in(plan, name):
        wanted |= {start + at: spec.dtype for at, spec in enumerate(plan.specs[one.kind])}
    return _narrowed(plan, name, wanted)


@functools.lru_cache(maxsize=64)
def _narrowed_starts(plan: PlanTables, name: str) -> Narrowed:
    """The same of the slots of values that take another dtype as averages."""
    made: Narrowed = ()
    for one, _ in averages_in(plan, name):
        made += _narrowed(plan, one.kind, {at: spec.dtype for at, spec in enumerate(one.layout.specs)})
    return made


def _narrowed(plan: PlanTables, kind: str, wanted: dict[int, Any]) -> Narrowed:
    found: dict[tuple[str, int, Any], None] = {}
    for slot, content in enumerate(plan.slots[plan.kind_index[kind]]):
        for at in (content,) if isinstance(content, int) else content.positions:
            if at in wanted and may_lose(plan.specs[kind][at].dtype, wanted[at]):
                found[kind, slot, wanted[at]] = None
    return tuple(found)


def _check_casts(state: StateData, narrowed: Narrowed) -> None:
    """Refuses values or averages that the dtype of the other cannot hold; looks at those alone that could be."""
    check_not_donated(state, dict.fromkeys(kind for kind, _, _ in narrowed))
    casts = Casts()
    for kind, slot, dtype in narrowed:
        casts.add(state.tables.leaf_of_slot[kind][slot], state.part(kind).arrays[slot], dtype)
    casts.check(StructureError, "averages and what they are of in a wider dtype: state.cast(params='float32')")


def _replaced(state: StateT, from_: Sequence[str], into: Sequence[str], program: Any, name: str) -> StateT:
    """A state with some kinds made from others."""
    plan, made = state.tables, list(state.parts)
    check_not_donated(state, from_)
    given = [state.part(kind).arrays for kind in from_]
    if any(map(is_abstract, given)):
        return state.make(plan, made)  # of shapes there is nothing to copy
    if plan.packing:
        check_fits(state, from_)
    places = tuple(state.part(kind).places() for kind in into)
    for kind, arrays in zip(into, program(plan, name, places)(given), strict=True):
        made[plan.kind_index[kind]] = Part(tuple(arrays))
    return state.make(plan, made)


@functools.lru_cache(maxsize=64)
def _values(plan: PlanTables, name: str, places: tuple[PartShardings | None, ...]) -> Any:
    """From the averages to the kinds that they are of."""
    whole, plan = plan, single_of(plan)

    def values(parts: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        shadows = plan.unpack(name, tuple(parts[0]))
        made = []
        for average, start in averages_in(plan, name):
            specs = plan.specs[average.kind]
            arrays = [jnp.array(array, dtype=spec.dtype) for array, spec in zip(shadows[start:], specs, strict=False)]
            made.append(plan.pack(average.kind, tuple(arrays)))
        return made

    outs = [average.kind for average, _ in averages_in(plan, name)]
    return _compiled(for_each_member(whole, values, [name], outs), places)


@functools.lru_cache(maxsize=64)
def _starts(plan: PlanTables, name: str, places: tuple[PartShardings | None, ...]) -> Any:
    """From the kinds that are averaged to fresh averages."""
    whole, plan = plan, single_of(plan)

    def starts(parts: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        fresh: list[Any] = []
        for (average, _), part in zip(averages_in(plan, name), parts, strict=True):
            fresh += average.init(plan.unpack(average.kind, tuple(part)))
        return [plan.pack(name, tuple(fresh))]

    ins = [average.kind for average, _ in averages_in(plan, name)]
    return _compiled(for_each_member(whole, starts, ins, [name]), places)


def _compiled(fn: Any, places: tuple[PartShardings | None, ...]) -> Any:
    there = [None if lie is None else lie.shardings for lie in places]
    options: dict[str, Any] = {"out_shardings": there} if any(places) else {}
    return jax.jit(fn, **options)
