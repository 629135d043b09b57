"""Averages after a restart: those of what was restarted begin again with it, in the slots that were.

An average of the values before would hand the last tenant's adapter to the next one, by `state.with_averages`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common.nnx_graph import is_abstract
from statewise._src.core.averages import averages_in, check_starts
from statewise._src.core.restart_slots import only_where
from statewise._src.core.restart_targets import Chosen
from statewise._src.core.state_data import Part, StateT
from statewise._src.plan.averages import Average
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import PartShardings

__all__ = ["followed", "followers"]


def followers(plan: PlanTables, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the averages that are of some of these kinds."""
    return tuple(dict.fromkeys(one.into for one in plan.averages if one.kind in kinds))


def followed(state: StateT, chosen: Chosen, slots: Any) -> StateT:
    """A state whose kinds were restarted, with averages that begin with what they are now.

    A schedule's count begins again with its whole kind, and goes on where some slots were restarted: it is one for all.
    """
    plan, made = state.tables, list(state.parts)
    for name in followers(plan, chosen.kinds):
        check_starts(state, name)
        mine = _mine(plan, chosen, name)
        old = state.part(name)
        if is_abstract(old.arrays):
            continue
        given = [old.arrays, *(state.part(one.kind).arrays for one, _ in mine)]
        program = _program(plan, chosen, name, old.places())
        made[plan.kind_index[name]] = Part(tuple(program(given, slots)))
    return state.make(plan, made)


def _mine(plan: PlanTables, chosen: Chosen, name: str) -> list[tuple[Average, int]]:
    return [(one, start) for one, start in averages_in(plan, name) if one.kind in chosen.kinds]


@functools.lru_cache(maxsize=64)
def _program(whole: PlanTables, chosen: Chosen, name: str, places: PartShardings | None) -> Any:
    plan = chosen.plan
    mine = _mine(plan, chosen, name)
    each = plan.per_device.of(name) if plan.per_device else frozenset()

    def begin(parts: list[tuple[Any, ...]], slots: Any) -> tuple[Any, ...]:
        # Copies, those that stay too: the state that was restarted must not share what the next step donates.
        shadows = [jnp.array(array) for array in plan.unpack(name, tuple(parts[0]))]
        for (one, start), part in zip(mine, parts[1:], strict=True):
            values = plan.unpack(one.kind, tuple(part))
            fresh = one.init(values)
            if slots is None:
                shadows[start : start + len(fresh)] = fresh
                continue
            axis = chosen.axis(one.kind) or 0
            for at in range(len(values)):
                mine_now = shadows[start + at]
                shadows[start + at] = only_where(axis, slots, fresh[at], mine_now, start + at in each)
        return plan.pack(name, tuple(shadows))

    def begin_all(parts: list[tuple[Any, ...]], slots: Any) -> tuple[Any, ...]:
        members = whole.ensemble
        if members is None:
            return begin(parts, slots)
        axes = [whole.slot_axes[kind] for kind in (name, *(one.kind for one, _ in mine))]
        rows = 0 if slots is not None and slots.ndim == 2 else None  # a row for each member, or the same in all
        given = ([tuple(part) for part in parts], slots)
        done: tuple[Any, ...] = members.each(lambda one: begin(*one), given, (axes, rows), axes[0])
        return done

    options: dict[str, Any] = {} if places is None else {"out_shardings": places.shardings}
    return jax.jit(begin_all, **options)
