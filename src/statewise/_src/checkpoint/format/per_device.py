"""Values that lie per device, in a checkpoint, and what a restore onto other devices makes of them.

An array that is `sw.PerDevice` stands in a checkpoint as a state holds it: with a leading axis, one value for each
device.  Its placement in the manifest says how many: `{"per_device": 8, "mesh": ..., "spec": ...}`.  Onto as many
devices it comes back as it was.  Onto more or fewer, the placement's `resize` decides; what was saved as one value goes
to each.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord
from statewise._src.common.paths import Path
from statewise._src.plan.ema import EMA
from statewise._src.plan.members import Axis, Members, place_of, shrunk
from statewise._src.plan.per_device import spread
from statewise._src.plan.placements import PLACEMENTS, PerDevice
from statewise._src.plan.tables import PlanTables

__all__ = [
    "EACH",
    "MEMBERS",
    "Resized",
    "devices_of",
    "members_of",
    "placement_of",
    "resize",
    "resized",
    "shape_of_member",
    "shape_of_one",
]

EACH = "per_device"
# Of an ensemble's array: {"number": 8, "axis": 0}, and per_device in there.
MEMBERS = "members"


class Resized(NamedTuple):
    """What becomes of an array on another number of devices.

    Attributes:
      how: `mean` or `first` of the values that were saved; `each` where one was.
      devices: how many devices there are.
      words: what the report says of it.
    """

    how: str
    devices: int
    words: str


def members_of(array: ArrayRecord) -> tuple[int, int] | None:
    """How many members of an ensemble an array holds, and along which axis; None where it holds one value for all."""
    found = array.placement.get(MEMBERS) if array.placement else None
    return None if found is None else (int(found["number"]), int(found["axis"]))


def devices_of(array: ArrayRecord) -> int:
    """How many devices have a value of their own; 0 where there is one value for all."""
    where = (array.placement or {}).get(MEMBERS, array.placement)
    return int(where[EACH]) if where and EACH in where else 0


def shape_of_member(array: ArrayRecord) -> tuple[int, ...]:
    """The shape of one member's array; of one model's that of the array itself."""
    found = members_of(array)
    return shrunk(array.shape, None if found is None else found[1])


def shape_of_one(array: ArrayRecord) -> tuple[int, ...]:
    """The shape of one device's value, in an ensemble of one member's."""
    shape = shape_of_member(array)
    return shape[1:] if devices_of(array) else shape


def placement_of(devices: int, members: Members | None, axis: Axis, rank: int) -> dict[str, Any] | None:
    """What a manifest says of an array's leading axes; None where it has none.

    Args:
      devices: how many devices have a value of their own, or 0.
      members: the members, where the plan is of an ensemble.
      axis: of the members in the array.
      rank: of how many dimensions the array is.
    """
    each = {EACH: devices} if devices else {}
    if members is None or axis is None:
        return each or None
    return {MEMBERS: {"number": members.number, "axis": place_of(axis, rank), **each}}


def resize(
    plan: PlanTables, record: LeafRecord, ours: ArrayRecord, theirs: ArrayRecord
) -> Resized | tuple[str, str] | None:
    """What becomes of an array; or what it is in the checkpoint, which cannot be restored so, and the hint.

    Returns:
      None where nothing has to become of it, or where the shapes differ, so that nothing can.
    """
    here, there = devices_of(ours), devices_of(theirs)
    if here == there or shape_of_one(ours) != shape_of_one(theirs):
        return None
    keys = ", folded in with their numbers" if ours.prng is not None else ""
    if not there:
        return Resized("each", here, f"one value, on each of {here} devices{keys}")
    what, (kind, _) = f"one value for each of {there} devices", _owner(plan, record)
    if not here:
        return (
            what,
            "with placement=sw.PerDevice(...): sw.restore(path, plan.abstract(mesh)), "
            f"then state.reduce_devices({kind!r})",
        )
    declared = _declared(plan, record, ours)
    if declared == "error":
        return what, f"declare what becomes of them: {kind}=sw.Kind(..., placement=sw.PerDevice('data', resize='mean'))"
    if declared == "mean" and (ours.prng is not None or not jnp.issubdtype(jnp.dtype(ours.dtype), jnp.inexact)):
        return f"one value without a mean for each of {there} devices", "sw.PerDevice('data', resize='first')"
    return Resized(declared, here, f"the {declared} of {there} devices' values, on each of {here}{keys}")


def _owner(plan: PlanTables, record: LeafRecord) -> tuple[str, Path]:
    """The kind and path that say how a leaf lies: of an average those of what it is of."""
    if plan.kinds[record.kind].of is EMA:
        _, kind, *path = record.path
        return str(kind), tuple(path)
    return record.kind, record.path


def _declared(plan: PlanTables, record: LeafRecord, ours: ArrayRecord) -> str:
    kind, path = _owner(plan, record)
    placement = plan.kinds[kind].placement
    if placement is not None and not isinstance(placement, PLACEMENTS):
        # As it was asked when the state was taken, with the keys within a value.
        placement = placement(plan.relative(path) + ours.within, shape_of_one(ours))
    return placement.resize if isinstance(placement, PerDevice) else "error"


def resized(array: Any, change: Resized, sharding: Any, axis: Axis = None) -> Any:
    """The array on its new devices; of an ensemble for each member, along this axis."""
    if axis is not None:
        made = jax.vmap(lambda one: resized(one, change, None), in_axes=axis, out_axes=axis)(jnp.asarray(array))
        return made if sharding is None else jax.device_put(made, sharding)
    if change.how == "mean":
        array = jnp.mean(jnp.asarray(array), axis=0)
    elif change.how == "first":
        array = array[0]
    return spread(array, change.devices, sharding)
