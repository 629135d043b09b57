"""The values that a restore does not read: those that the target keeps, fresh ones, and averages that start again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from statewise._src.checkpoint.format.records import Placed, unpacked
from statewise._src.checkpoint.match import Match
from statewise._src.checkpoint.members import Regrouped
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.common.narrowing import WIDE, Casts, as_jax, refuse
from statewise._src.common.nnx_graph import ArraySpec, is_deleted
from statewise._src.common.paths import Leaf
from statewise._src.common.placing import placed
from statewise._src.common.problems import Problems, add_change
from statewise._src.core.many_arrays import ManyArrays
from statewise._src.core.member_view import fresh_derived
from statewise._src.core.plan import State
from statewise._src.core.restart import initial_state
from statewise._src.plan.arrays import ArrayInfo, DerivedArrays, Spot
from statewise._src.plan.ema import EMA
from statewise._src.plan.fresh_values import check_kept, fresh_value
from statewise._src.plan.tables import PlanTables
from statewise.errors import RestoreError

__all__ = ["fresh_values", "own_arrays", "own_members", "start_averages", "start_moments"]

# The number of bytes of fresh values that are there twice, while they are placed.
_AT_ONCE = 1 << 26


def own_arrays(target: State, kind: str) -> tuple[Any, ...]:
    """Returns the target's arrays in the order of the plan; shapes instead of arrays that share a donated buffer."""
    if kind in target.tables.packing and any(map(is_deleted, target.part(kind).arrays)):
        return tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in target.tables.specs[kind])
    return unpacked(target, kind)


def own_members(matched: Match, target: State) -> dict[Spot, Any]:
    """Returns, by kind and position, the values of members that the checkpoint lacks: the target's, or fresh ones."""
    lacking = [
        source.placed
        for source in matched.sources
        if any(isinstance(change, Regrouped) and change.lacks for change in source.changes)
    ]
    restarted = [placed for placed in lacking if target.tables.kinds[placed.record.kind].missing == "restart"]
    values = fresh_values(restarted, target)
    own = functools.cache(functools.partial(own_arrays, target))
    for record, start in lacking:
        for position in range(start, start + len(record.arrays)):
            if (record.kind, position) not in values:
                # An average that starts again gets zeros, which `start_averages` replaces.
                array = own(record.kind)[position]
                has_none = isinstance(array, jax.ShapeDtypeStruct) or is_deleted(array)
                values[record.kind, position] = jnp.zeros(array.shape, array.dtype) if has_none else array
    return values


def _restarted(plan: PlanTables, leaf: Leaf, position: int, value: Any, lost: list[Leaf]) -> Any:
    """Returns a fresh value; for each device, and each member of an ensemble, made from its own."""
    info = plan.by_kind[leaf.kind or ""][position]
    restart: Any = plan.kinds[info.kind].restart

    def fn(value: Any) -> Any:
        convert = functools.partial(as_jax, leaf, lost=lost)
        return fresh_value(restart, value, info.leaf.path, bool(info.devices), convert)

    if info.axis is not None:
        fn = jax.vmap(fn, in_axes=info.axis, out_axes=info.axis)
        sharding = value.sharding
        if isinstance(sharding, jax.NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
            fn = jax.jit(fn, out_shardings=sharding)  # otherwise JAX raises: it does not infer the result's sharding
    return fn(value)


def fresh_values(restarted: Sequence[Placed], target: State) -> dict[Spot, Any]:
    """Returns fresh values, by kind and position, for the leaves that are restarted."""
    fresh: dict[Spot, Any] = {}
    problems = Problems()
    lost: list[Leaf] = []
    own = functools.cache(functools.partial(own_arrays, target))
    wanted = [
        (record.leaf(), position, own(record.kind)[position])
        for record, start in restarted
        if target.tables.kinds[record.kind].of is not EMA  # an average starts as a copy of the restored value
        for position in range(start, start + len(record.arrays))
    ]
    for group in grouped(wanted, lambda each: ArraySpec(each[2].shape, each[2].dtype).nbytes, _AT_ONCE):
        shardings = _shardings([value for _, _, value in group])
        zeros = _placed_zeros([value for _, _, value in group], shardings)
        made: dict[int, Any] = {}
        for index, (leaf, position, value) in enumerate(group):
            value = zeros.get(index, value)
            restarted_value = _restarted(target.tables, leaf, position, value, lost)
            if not add_change(problems, leaf, value, restarted_value):
                made[index] = restarted_value
        for index, array in _placed_copies(made, shardings).items():
            leaf, position, _ = group[index]
            fresh[leaf.kind or "", position] = array
    check_kept(problems, RestoreError)
    refuse(lost, RestoreError, WIDE)
    return fresh


def _placed_copies(arrays: Mapping[int, Any], shardings: Sequence[Any]) -> dict[int, Any]:
    """Returns copies, by index: `restart` may return the target's own array, or the same one for several leaves."""
    # JAX copies arrays of its usual dtypes in one call, in a third of the time of as many calls.
    unusual = {i: jnp.array(each, dtype=each.dtype) for i, each in arrays.items() if _is_key(each) or each.weak_type}
    usual = {i: each for i, each in arrays.items() if i not in unusual}
    return _put(usual, shardings, copy=True) | _put(unusual, shardings)


def _placed_zeros(arrays: Sequence[Any], shardings: Sequence[Any]) -> dict[int, Any]:
    """Returns zeros, by index, for the arrays that have no values."""
    empty = (i for i, array in enumerate(arrays) if isinstance(array, jax.ShapeDtypeStruct) or is_deleted(array))
    zeros = {i: (jnp if _is_key(arrays[i]) else np).zeros(arrays[i].shape, arrays[i].dtype) for i in empty}
    return _put(zeros, shardings)


def _put(arrays: Mapping[int, Any], shardings: Sequence[Any], copy: bool = False) -> dict[int, Any]:
    """Places arrays, by index: in one call, unless several processes place them.  `copy` shares no memory with them."""
    places = [shardings[index] for index in arrays]
    if all(sharding.is_fully_addressable for sharding in places):
        return dict(
            zip(arrays, jax.device_put([*arrays.values()], places, may_alias=False if copy else None), strict=True)
        )
    each = zip(arrays.items(), places, strict=True)
    return {index: placed(jnp.copy(array) if copy else array, sharding) for (index, array), sharding in each}


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.extended)


def start_averages(matched: Match, target: State, new: dict[Spot, Any]) -> None:
    """Adds the averages that start again, as copies of the restored values that they follow.

    Args:
      matched: what is restored and restarted.
      target: the target, whose values are used where nothing is restored.
      new: the arrays of the new state so far, by kind and position.
    """
    plan, casts = target.tables, Casts()
    own = functools.cache(functools.partial(own_arrays, target))
    for record, position in matched.restarted:
        if plan.kinds[record.kind].of is EMA:
            (sharding,) = _shardings([own(record.kind)[position]])
            first = _start(plan, plan.by_kind[record.kind][position], new, own, casts)
            new[record.kind, position] = jax.device_put(first, sharding)
    for source in matched.sources:
        (record, position), kind = source.placed, plan.kinds[source.placed.record.kind]
        change = source.changes[0] if source.changes else None
        if kind.of is EMA and kind.missing == "restart" and isinstance(change, Regrouped) and change.lacks:
            # Only the members that the checkpoint lacks start again: a mask along their axis selects them.
            value, axis = new[record.kind, position], change.ours or 0
            starts = jnp.isin(jnp.arange(value.shape[axis]), jnp.array(change.lacks))
            starts = starts.reshape([-1 if dimension == axis else 1 for dimension in range(value.ndim)])
            started = jnp.where(starts, _start(plan, plan.by_kind[record.kind][position], new, own, casts), value)
            new[record.kind, position] = jax.device_put(started, value.sharding)
    casts.check(RestoreError, "averages={'params': sw.EMA(0.999, dtype=jnp.float32)}")


def start_moments(matched: Match, target: State, new: dict[Spot, Any]) -> None:
    """Adds the arrays of optimizers that start as `init` makes them from the restored parameters.

    Args:
      matched: what is restored, restarted and initialized.
      target: the target, whose values are used where nothing is restored.
      new: the arrays of the new state so far, by kind and position.
    """
    plan = target.tables
    own = functools.cache(functools.partial(own_arrays, target))
    initialized = {placed.start for placed in matched.initialized}
    for group in plan.derived_arrays:
        wanted = [position for position in range(group.start, group.stop) if position in initialized]
        if not wanted or not group.derived.trains:
            continue
        spots = [(source.kind, source.position) for source in group.sources]
        sources = [new[spot] if spot in new else own(spot[0])[spot[1]] for spot in spots]
        # Compiled, so that the arrays that are not wanted are never made.
        program = ManyArrays(functools.partial(_init, plan, group, wanted), len(wanted))
        arrays = dict(enumerate(program(sources)))
        shardings = _shardings([own(group.derived.into)[position] for position in wanted])
        placed = _put(arrays, shardings).values()
        new |= zip(((group.derived.into, position) for position in wanted), placed, strict=True)


def _shardings(values: Sequence[Any]) -> list[Any]:
    """Returns where each value of the target is; the default device if the target does not say."""
    shardings = [getattr(value, "sharding", None) for value in values]
    if None not in shardings:
        return shardings
    # Named, not left to JAX: arrays that are read are committed to their device.  If others were not, they would be
    # after the first step, which would then be compiled again.
    default = jnp.zeros(()).sharding
    return [default if sharding is None else sharding for sharding in shardings]


def _init(plan: PlanTables, group: DerivedArrays, wanted: Sequence[int], sources: Sequence[Any]) -> list[Any]:
    if plan.ensemble is not None:
        fresh = fresh_derived(group, plan.ensemble, sources)
    else:
        fresh = initial_state(plan, group, sources)
    return [fresh[position - group.start] for position in wanted]


def _start(
    plan: PlanTables, info: ArrayInfo, new: Mapping[Spot, Any], own: Callable[[str], tuple[Any, ...]], casts: Casts
) -> jax.Array:
    """Returns the first value of an average: that of the array that it follows, as it was restored; 0 for a count."""
    assert info.derived is not None, "an average is derived"
    average = plan.arrays_of(info.derived)
    index = info.position - average.start
    if index >= len(average.sources):  # counts come after the averages
        return jnp.zeros(info.spec.shape, info.spec.dtype)
    source = average.sources[index]
    spot = source.kind, source.position
    value = new[spot] if spot in new else own(source.kind)[source.position]
    casts.add(info.leaf, value, info.spec.dtype)
    return jnp.array(value, dtype=info.spec.dtype)
