"""Values per device, in a checkpoint, and what a restore onto other devices does with them.

A checkpoint has an array that is `sw.PerDevice` as a state holds it: with a leading axis, one value for each device.
Its placement in the manifest says how many: `{"per_device": 8, "mesh": ..., "spec": ...}`.  Onto the same number of
devices it is restored as it was.  Onto more or fewer, the placement's `resize` decides; what was saved as one value
goes to each device.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.common.paths import Path
from statewise._src.common.placing import placed
from statewise._src.plan.ema import EMA
from statewise._src.plan.members import Axis, Members, place_of, shrunk
from statewise._src.plan.per_device import spread
from statewise._src.plan.placements import PLACEMENTS, PerDevice
from statewise._src.plan.tables import PlanTables

__all__ = [
    "EACH",
    "MEMBERS",
    "Refused",
    "Resized",
    "count_members",
    "devices_of",
    "members_of",
    "placement_of",
    "resize",
    "resized",
    "shape_of_one",
]

EACH = "per_device"
# The key of an ensemble's array: {"number": 8, "axis": 0}, with `per_device` in it.
MEMBERS = "members"


class Refused(NamedTuple):
    """Why an array cannot be restored for the target's devices or members.

    Attributes:
      words: what it is in the checkpoint.
      hint: what to do.
    """

    words: str
    hint: str


class Resized(NamedTuple):
    """What happens to an array that goes onto another number of devices.

    Attributes:
      how: `mean` or `first` of the values that were saved; `each` if one was.
      devices: the number of devices.
      words: what the report says about it.
    """

    how: str
    devices: int
    words: str


def members_of(array: ArrayRecord) -> tuple[int, int] | None:
    """Returns the number of members in an ensemble's array, and their axis; None for an array without members."""
    members = array.placement.get(MEMBERS) if array.placement else None
    return None if members is None else (int(members["number"]), int(members["axis"]))


def count_members(manifests: Iterable[Manifest]) -> int | None:
    """Returns the number of members of the ensemble in a checkpoint; None for a checkpoint of one model."""
    records = (array for manifest in manifests for leaf in manifest.leaves for array in leaf.arrays)
    return next((members[0] for members in map(members_of, records) if members is not None), None)


def devices_of(array: ArrayRecord) -> int:
    """Returns the number of devices that have a value of their own; 0 if there is one value for all."""
    where = (array.placement or {}).get(MEMBERS, array.placement)
    return int(where[EACH]) if where and EACH in where else 0


def shape_of_one(array: ArrayRecord) -> tuple[int, ...]:
    """Returns the shape of one device's value; in an ensemble, of one member's."""
    members = members_of(array)
    shape = shrunk(array.shape, None if members is None else members[1])
    return shape[1:] if devices_of(array) else shape


def placement_of(devices: int, members: Members | None, axis: Axis, rank: int) -> dict[str, Any] | None:
    """Returns what a manifest says about an array's leading axes; None if it has none.

    Args:
      devices: the number of devices that have a value of their own, or 0.
      members: the members, if the plan is of an ensemble.
      axis: the axis of the members in the array.
      rank: the number of dimensions of the array.
    """
    each = {EACH: devices} if devices else {}
    if members is None or axis is None:
        return each or None
    return {MEMBERS: {"number": members.number, "axis": place_of(axis, rank), **each}}


def resize(plan: PlanTables, record: LeafRecord, ours: ArrayRecord, theirs: ArrayRecord) -> Resized | Refused | None:
    """Returns what happens to an array that has values for another number of devices in the checkpoint.

    Returns:
      None if nothing happens to it, or if the shapes differ, which is another problem.
    """
    devices, saved = devices_of(ours), devices_of(theirs)
    if devices == saved or shape_of_one(ours) != shape_of_one(theirs):
        return None
    keys = ", folded in with their numbers" if ours.prng is not None else ""
    if not saved:
        return Resized("each", devices, f"one value, on each of {devices} devices{keys}")
    what, (kind, _) = f"one value for each of {saved} devices", _owner(plan, record)
    if not devices:
        into = "with placement=sw.PerDevice(...): sw.restore(path, plan.abstract(mesh))"
        return Refused(what, f"{into}, then state.reduce_devices({kind!r})")
    how = _declared(plan, record, ours)
    if how == "error":
        placement = f"{kind}=sw.Kind(..., placement=sw.PerDevice('data', resize='mean'))"
        return Refused(what, f"declare what happens to them: {placement}")
    if how == "mean" and (ours.prng is not None or not jnp.issubdtype(jnp.dtype(ours.dtype), jnp.inexact)):
        return Refused(f"one value without a mean for each of {saved} devices", "sw.PerDevice('data', resize='first')")
    return Resized(how, devices, f"the {how} of {saved} devices' values, on each of {devices}{keys}")


def _owner(plan: PlanTables, record: LeafRecord) -> tuple[str, Path]:
    """Returns the kind and path that determine how a leaf is placed: for an average, those of the averaged leaf."""
    if plan.kinds[record.kind].of is EMA:
        _, kind, *path = record.path
        return str(kind), tuple(path)
    return record.kind, record.path


def _declared(plan: PlanTables, record: LeafRecord, ours: ArrayRecord) -> str:
    kind, path = _owner(plan, record)
    placement = plan.kinds[kind].placement
    if placement is not None and not isinstance(placement, PLACEMENTS):
        # A function of path and shape: called as when the state was taken, with the keys within a value.
        placement = placement(plan.relative(path) + ours.within, shape_of_one(ours))
    return placement.resize if isinstance(placement, PerDevice) else "error"


def resized(array: Any, change: Resized, sharding: Any, axis: Axis = None) -> Any:
    """Returns the array on its new devices; for an ensemble, of each member, along this axis."""
    if axis is not None:
        values = jax.vmap(lambda one: resized(one, change, None), in_axes=axis, out_axes=axis)(jnp.asarray(array))
        return values if sharding is None else placed(values, sharding)
    if change.how == "mean":
        array = jnp.mean(jnp.asarray(array), axis=0)
    elif change.how == "first":
        array = array[0]
    return spread(array, change.devices, sharding)
