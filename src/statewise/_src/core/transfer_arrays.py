"""The arrays of a transfer: cast, placed, and packed as the target has them.

`transfer` determines what goes where; here arrays are copied from device to device.  Casts that would lose numbers are
rejected before the first array is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common import compat
from statewise._src.common.narrowing import Casts, refuse_between_models
from statewise._src.core.averages import averages_in, followers
from statewise._src.core.cast import arrays_in_order, as_dtype
from statewise._src.core.state_data import StateData, check_not_donated
from statewise._src.core.templates import shardings
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.averages import Average
from statewise._src.plan.per_device import spread
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.device_put import moved
from statewise._src.sharding.resolve import array_shardings
from statewise.errors import StructureError

__all__ = ["Move", "averages_of", "check_casts", "place", "restarted_averages", "shardings_for"]


# One array of the target, and the array of the source that it comes from.
Move = tuple[ArrayInfo, ArrayInfo]


def shardings_for(plan: PlanTables, into: StateData | None, names: Sequence[str], mesh: Any) -> dict[str, list[Any]]:
    """Returns, for each kind, the sharding that each of its arrays gets; None for one that keeps its own.

    Args:
      plan: the plan of the target.
      into: the target, if it is a state: without a mesh its own shardings are kept.
      names: the kinds.
      mesh: the mesh, if there is one.
    """
    if mesh is not None:
        shardings(plan, mesh)  # checks that no packed kind would be split
        by_array = array_shardings(plan, mesh)
        return {kind: by_array[kind] for kind in names}
    own: dict[str, list[Any]] = {kind: [None] * len(plan.specs[kind]) for kind in names}
    if into is None:
        return own
    for kind in names:
        for slot, array in zip(into.tables.stored[kind], into.part(kind).arrays, strict=True):
            if not isinstance(array, compat.Tracer):
                for info in slot.arrays:
                    own[kind][info.position] = getattr(array, "sharding", None)
    return own


def check_casts(moves: Sequence[Move], arrays: Mapping[str, Sequence[Any]]) -> None:
    """Checks that no cast loses numbers, and that JAX narrows no 64-bit numbers of NumPy.

    Args:
      moves: the moves.
      arrays: for each kind of the source its arrays.
    """
    floats, others = Casts(), Casts()
    for to, source in moves:
        casts = floats if jnp.issubdtype(to.spec.dtype, jnp.floating) else others
        casts.add(to.leaf, arrays[source.kind][source.position], to.spec.dtype)
    refuse_between_models(
        floats,
        others,
        StructureError,
        lambda wider, _: f"sw.transfer(src, target, cast={wider!r})",
        "build the target's model with the dtype of the source",
    )


def place(array: Any, to: ArrayInfo, source: ArrayInfo, sharding: Any) -> Any:
    """Returns a copy of an array of the source with the dtype, sharding and per-device values of the target's."""
    dtype, axis = to.spec.dtype, to.axis
    # One value becomes one for each device; per-device values of as many devices are copied as they are.
    devices = to.devices if to.devices > source.devices else 0
    if isinstance(array, compat.Tracer):
        array = as_dtype(array, dtype)
        array = spread(array, devices, axis=axis) if devices else array
        return array if sharding is None else jax.device_put(array, sharding)
    given = array = array if isinstance(array, jax.Array) else jnp.array(array)  # a user mapped the state to NumPy
    # Less to copy between devices: cast before the copy if that makes the array smaller, after it otherwise.
    if dtype.itemsize < array.dtype.itemsize:
        array = as_dtype(array, dtype)
    if devices:
        array = spread(array, devices, sharding, axis)
    elif sharding is not None:
        array = moved(array, sharding)
    array = as_dtype(array, dtype)
    return jnp.copy(array) if array is given else array


def averages_of(plan: PlanTables, names: Sequence[str]) -> dict[str, list[tuple[Average, int]]]:
    """Returns averages that track some of these kinds but are not among them, each with its start, by their kind."""
    return {name: averages_in(plan, name) for name in followers(plan, names) if name not in names}


def restarted_averages(
    plan: PlanTables, into: StateData | None, parts: Mapping[str, Sequence[Any]], mesh: Any
) -> dict[str, list[Any]]:
    """Returns the averages of the kinds that were transferred, as copies of them; averages of others do not change."""
    restarted = {}
    for name, averages in averages_of(plan, tuple(parts)).items():
        arrays: list[Any] = [None] * len(plan.specs[name])
        if into is not None and not all(average.kind in parts for average, _ in averages):
            check_not_donated(into, [name])
            arrays = list(arrays_in_order(into.tables, name, into.part(name).arrays))
        own = shardings_for(plan, into, [name], mesh)[name]
        for average, start in averages:
            if average.kind in parts:
                for position, array in enumerate(average.init(parts[average.kind]), start):
                    sharding = own[position]
                    arrays[position] = array if sharding is None else jax.device_put(array, sharding)
        restarted[name] = arrays
    return restarted
