"""What a restore does not read: values that the target keeps, fresh ones, and averages that begin anew."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from statewise._src.checkpoint.format.records import Placed, unpacked
from statewise._src.checkpoint.match import Match, RestoreSource
from statewise._src.checkpoint.members import Regrouped
from statewise._src.common.narrowing import WIDE, Casts, as_jax, refuse
from statewise._src.common.nnx_graph import is_deleted
from statewise._src.common.paths import Leaf
from statewise._src.common.problems import Problems, add_change
from statewise._src.core.averages import averages_in
from statewise._src.core.plan import State
from statewise._src.plan.ema import EMA
from statewise._src.plan.fresh_values import fresh_value
from statewise._src.plan.tables import PlanTables
from statewise.errors import RestoreError

__all__ = ["begin_averages", "fresh_values", "own_arrays", "own_members"]


def own_arrays(target: State, kind: str) -> tuple[Any, ...]:
    """The target's arrays, in the order of the plan; shapes in the place of those that share a donated buffer."""
    if kind in target.tables.packing and any(map(is_deleted, target.part(kind).arrays)):
        return tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in target.tables.specs[kind])
    return unpacked(target, kind)


def own_members(found: Match, target: State) -> dict[tuple[str, int], Any]:
    """What members have that the checkpoint lacks, by kind and position: the target's values, or fresh ones."""
    lacking = [
        source.placed
        for source in found.sources
        if any(isinstance(change, Regrouped) and change.lacks for change in source.changes)
    ]
    restarted = [placed for placed in lacking if target.tables.kinds[placed.record.kind].missing == "restart"]
    values = fresh_values(restarted, target)
    for placed in lacking:
        kind = placed.record.kind
        own = own_arrays(target, kind)
        for at in range(placed.start, placed.start + len(placed.record.arrays)):
            if (kind, at) not in values:  # of averages that begin anew a place that is filled later
                abstract = isinstance(own[at], jax.ShapeDtypeStruct) or is_deleted(own[at])
                values[kind, at] = jnp.zeros(own[at].shape, own[at].dtype) if abstract else own[at]
    return values


def _restarted(plan: PlanTables, leaf: Leaf, position: int, value: Any, lost: list[Leaf]) -> Any:
    """A fresh value; of each device, and of each member of an ensemble, from its own."""
    kind = leaf.kind or ""
    restart: Any = plan.kinds[kind].restart
    path = plan.leaf_of_array[kind][position].path
    each = plan.per_device is not None and position in plan.per_device.of(kind)

    def fn(value: Any) -> Any:
        return fresh_value(restart, value, path, each, functools.partial(as_jax, leaf, lost=lost))

    axis = plan.by_kind[kind][position].axis
    if axis is not None:
        fn = jax.vmap(fn, in_axes=axis, out_axes=axis)
        lies = value.sharding
        if isinstance(lies, jax.NamedSharding) and AxisType.Explicit in lies.mesh.axis_types:
            fn = jax.jit(fn, out_shardings=lies)  # or JAX asks where the result lies
    return fn(value)


def fresh_values(restarted: Sequence[Placed], target: State) -> dict[tuple[str, int], Any]:
    """Fresh values, by kind and position, of the leaves that are restarted."""
    fresh = {}
    problems = Problems()
    lost: list[Leaf] = []
    own = {kind: own_arrays(target, kind) for kind in {placed.record.kind for placed in restarted}}
    for placed in restarted:
        record = placed.record
        if target.tables.kinds[record.kind].of is EMA:
            continue  # averages begin as what is restored
        current = own[record.kind]
        for position in range(placed.start, placed.start + len(record.arrays)):
            value = current[position]
            sharding = getattr(value, "sharding", None)
            if isinstance(value, jax.ShapeDtypeStruct) or is_deleted(value):
                value = jax.device_put(jnp.zeros(value.shape, value.dtype), sharding)
            made = _restarted(target.tables, record.leaf(), position, value, lost)
            if not add_change(problems, record.leaf(), value, made):
                # A copy: `restart` may give back the target's own array, or the same for several leaves.
                fresh[record.kind, position] = jax.device_put(jnp.array(made, dtype=value.dtype), sharding)
    kinds = ", ".join(dict.fromkeys(repr(leaf.kind) for leaf in problems.leaves))
    problems.raise_as(
        RestoreError,
        f"The restart of kind {kinds} changes shapes or dtypes.",
        "restart=jnp.zeros_like, or any function that keeps shape and dtype",
    )
    refuse(lost, RestoreError, WIDE)
    return fresh


def begin_averages(found: Match, target: State, new: dict[str, dict[int, Any]]) -> None:
    """Averages that are restarted begin as copies of what they are of, as it was restored."""
    plan = target.tables
    wanted = [placed for placed in found.restarted if plan.kinds[placed.record.kind].of is EMA]
    casts = Casts()
    own = {kind: own_arrays(target, kind) for kind in {placed.record.kind for placed in wanted}}
    for placed in wanted:
        kind, position = placed.record.kind, placed.start
        spec, of = plan.specs[kind][position], _averaged(plan, kind, position)
        value = jnp.zeros(spec.shape, spec.dtype)  # of nothing: a count
        for of_kind, at in of:
            there = new.get(of_kind, {})
            given = there[at] if at in there else own_arrays(target, of_kind)[at]
            casts.add(placed.record.leaf(), given, spec.dtype)
            value = jnp.array(given, dtype=spec.dtype)
        sharding = getattr(own[kind][position], "sharding", None)
        new.setdefault(kind, {})[position] = jax.device_put(value, sharding)
    for one in found.sources:
        _begin_members(one, target, new, casts)
    casts.check(RestoreError, "averages={'params': sw.EMA(0.999, dtype=jnp.float32)}")


def _begin_members(source: RestoreSource, target: State, new: dict[str, dict[int, Any]], casts: Casts) -> None:
    """The same for averages of members that the checkpoint lacks."""
    (kind, position), plan = (source.placed.record.kind, source.placed.start), target.tables
    change = source.changes[0] if source.changes else None
    declared = plan.kinds[kind]
    if declared.of is not EMA or declared.missing != "restart" or not isinstance(change, Regrouped) or not change.lacks:
        return
    value = new[kind][position]
    of = _averaged(plan, kind, position)
    fresh = jnp.zeros(value.shape, value.dtype)
    for of_kind, at in of:
        there = new.get(of_kind, {})
        given = there[at] if at in there else own_arrays(target, of_kind)[at]
        casts.add(source.placed.record.leaf(), given, value.dtype)
        fresh = jnp.array(given, dtype=value.dtype)
    axis = change.ours or 0
    begins = jnp.isin(jnp.arange(value.shape[axis]), jnp.array(change.lacks))
    begins = begins.reshape([-1 if at == axis else 1 for at in range(value.ndim)])
    new[kind][position] = jax.device_put(jnp.where(begins, fresh, value), value.sharding)


def _averaged(plan: PlanTables, kind: str, position: int) -> list[tuple[str, int]]:
    """Kind and position of what an average is of; nothing for a count."""
    average, start = next(
        (one, start) for one, start in averages_in(plan, kind) if position - start < len(one.layout.specs)
    )
    sources = plan.arrays_of(average).sources[position - start : position - start + 1]
    return [(source.kind, source.position) for source in sources]
