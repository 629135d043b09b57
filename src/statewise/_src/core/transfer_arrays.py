"""Arrays on their way from one state into another: cast, placed, and put together as the other plan has them.

What goes where is decided in `transfer`; here it is carried, from device to device.  Casts that would lose numbers are
refused before the first array has moved.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common.narrowing import WIDE, Casts, refuse
from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.core.averages import averages_in
from statewise._src.core.cast import WIDER
from statewise._src.core.state_data import Part, StateData, check_not_donated
from statewise._src.core.templates import shardings
from statewise._src.plan.averages import Average
from statewise._src.plan.members import Axis
from statewise._src.plan.per_device import spread
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.device_put import moved
from statewise._src.sharding.resolve import array_shardings
from statewise.errors import StructureError

__all__ = [
    "Move",
    "arrays_in_order",
    "arrived",
    "averages_of",
    "begun_averages",
    "carried",
    "check_casts",
    "places_for",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """One array of the target, and where it comes from.

    Attributes:
      to: the target's kind.
      kind: the source's kind.
      position: which of that kind's arrays.
      spec: shape and dtype in the target's model.
      spreads: whether one value becomes one for each device.
    """

    to: str
    kind: str
    position: int
    spec: ArraySpec
    spreads: bool


def places_for(plan: PlanTables, into: StateData | None, names: Sequence[str], mesh: Any) -> dict[str, list[Any]]:
    """For each kind where each of its arrays goes to lie; nothing where they stay where they are."""
    if mesh is not None:
        shardings(plan, mesh)  # refuses packed kinds that would be split
        of_arrays = array_shardings(plan, mesh)
        return {kind: of_arrays[kind] for kind in names}
    if into is None:
        return {}
    places: dict[str, list[Any]] = {}
    for kind in names:
        found: list[Any] = [None] * len(plan.specs[kind])
        for slot, array in zip(into.tables.slots[into.tables.kind_index[kind]], into.part(kind).arrays, strict=True):
            sharding = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
            for position in (slot,) if isinstance(slot, int) else slot.positions:
                found[position] = sharding
        places[kind] = found
    return places


def check_casts(plan: PlanTables, moves: Sequence[Move], taken: Mapping[str, Sequence[Any]]) -> None:
    """Refuses casts that lose numbers, and 64-bit numbers of NumPy where JAX has none."""
    floats, others = Casts(), Casts()
    counts: Counter[str] = Counter()
    for move in moves:
        array = taken[move.kind][move.position]
        casts = floats if jnp.issubdtype(move.spec.dtype, jnp.floating) else others
        casts.add(plan.leaf_of_array[move.to][counts[move.to]], array, move.spec.dtype)
        counts[move.to] += 1
    lossy, rest = floats.lost(), others.lost()
    held = floats.holding(WIDER) if lossy else None
    hints = [f"sw.transfer(src, target, cast={held!r})"] if held else []
    if rest or (lossy and not held):
        hints += ["build the target's model with the dtype of the source", WIDE]
    refuse([*lossy, *rest], StructureError, "\n".join(hints))


def carried(array: Any, spec: ArraySpec, place: Any, devices: int, axis: Axis = None) -> Any:
    """An array in another dtype and place, in memory of its own; one value for each device where there are some."""
    if isinstance(array, jax.core.Tracer):
        array = _as(array, spec.dtype)
        array = spread(array, devices, axis=axis) if devices else array
        return array if place is None else jax.device_put(array, place)
    given = array = array if isinstance(array, jax.Array) else jnp.array(array)  # somebody mapped it to NumPy
    if spec.dtype.itemsize < array.dtype.itemsize:
        array = _as(array, spec.dtype)
    if devices:
        array = spread(array, devices, place, axis)
    elif place is not None:
        array = moved(array, place)
    array = _as(array, spec.dtype)
    return jnp.copy(array) if array is given else array


def _as(array: Any, dtype: Any) -> Any:
    return array if array.dtype == dtype else jax.lax.convert_element_type(array, dtype)


def arrays_in_order(plan: PlanTables, kind: str, part: tuple[Any, ...]) -> Sequence[Any]:
    """Returns a kind's arrays in the order of the plan, from what stands in its slots."""
    return _on_device(plan, kind, False)(part) if kind in plan.packing else part


@functools.lru_cache(maxsize=256)
def _on_device(plan: PlanTables, kind: str, pack: bool) -> Any:
    """Packs or unpacks a kind's arrays without a way through the host, which is the quickest for a few calls."""
    return jax.jit(lambda arrays: (plan.pack if pack else plan.unpack)(kind, tuple(arrays)))


def averages_of(plan: PlanTables, names: Sequence[str]) -> dict[str, list[tuple[Average, int]]]:
    """Returns the averages of these kinds that do not move themselves, each with where it begins, by their kind."""
    found: dict[str, list[tuple[Average, int]]] = {}
    for name in dict.fromkeys(one.into for one in plan.averages if one.into not in names):
        if any(one.kind in names for one, _ in averages_in(plan, name)):
            found[name] = averages_in(plan, name)
    return found


def begun_averages(
    plan: PlanTables, into: StateData | None, parts: Mapping[str, Sequence[Any]], mesh: Any
) -> dict[str, list[Any]]:
    """Returns the averages of what has moved, as copies of it; those of other kinds are the target's own."""
    made = {}
    for name, averages in averages_of(plan, tuple(parts)).items():
        if all(one.kind in parts for one, _ in averages) or into is None:
            kept: Sequence[Any] = [None] * len(plan.specs[name])
        else:
            check_not_donated(into, [name])
            kept = arrays_in_order(into.tables, name, into.part(name).arrays)
        places = places_for(plan, into, [name], mesh).get(name) or [None] * len(kept)
        arrays = list(kept)
        for one, start in averages:
            if one.kind in parts:
                fresh = one.init(parts[one.kind])
                arrays[start : start + len(fresh)] = [
                    array if place is None else jax.device_put(array, place)
                    for array, place in zip(fresh, places[start:], strict=False)
                ]
        made[name] = arrays
    return made


def arrived(
    plan: PlanTables, into: StateData | None, arrays: Mapping[str, Sequence[Any]], places: Mapping[str, Any]
) -> StateData:
    """The state of the arrays that have moved, and of what the target keeps."""
    parts = []
    for kind in plan.kinds:
        packing = plan.packing.get(kind)
        if kind in arrays:
            part = tuple(arrays[kind])
            if packing:
                part = _on_device(plan, kind, True)(part)
            parts.append(Part(part))
        elif into is None:
            parts.append(Part(()))
        elif packing == into.tables.packing.get(kind):
            parts.append(into.part(kind))
        else:  # a cast has changed which arrays go together
            kept = arrays_in_order(into.tables, kind, into.part(kind).arrays)
            parts.append(Part(_on_device(plan, kind, True)(kept) if packing else tuple(kept)))
    return StateData.make(plan, parts)
