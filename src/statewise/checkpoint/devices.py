"""Values that lie per device, in a checkpoint, and what a restore onto other devices makes of them.

An array that is `sw.PerDevice` stands in a checkpoint as a state holds it: with a leading axis, one value for each
device.  Its placement in the manifest says how many: `{"per_device": 8, "mesh": ..., "spec": ...}`.  Onto as many
devices it comes back as it was.  Onto more or fewer, the placement's `resize` decides; what was saved as one value goes
to each.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from typing import Any, NamedTuple

import jax.numpy as jnp

from statewise.averages import EMA
from statewise.checkpoint.manifest import ArrayRecord, LeafRecord
from statewise.copies import spread
from statewise.paths import Path
from statewise.placements import PLACEMENTS, PerDevice
from statewise.plan import Plan

__all__ = ["EACH", "Resized", "devices_of", "resize", "resized", "shape_of_one"]

EACH = "per_device"


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


def devices_of(array: ArrayRecord) -> int:
    """How many devices have a value of their own; 0 where there is one value for all."""
    return int(array.placement[EACH]) if array.placement and EACH in array.placement else 0


def shape_of_one(array: ArrayRecord) -> tuple[int, ...]:
    """The shape of one device's value."""
    return array.shape[1:] if devices_of(array) else array.shape


def resize(plan: Plan, record: LeafRecord, ours: ArrayRecord, theirs: ArrayRecord) -> Resized | tuple[str, str] | None:
    """What becomes of an array; or what it is in the checkpoint, which cannot be restored so, and the mend.

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
            f"with placement=sw.PerDevice(...): sw.restore(path, plan.abstract(mesh)), then state.fold({kind!r})",
        )
    declared = _declared(plan, record, ours)
    if declared == "error":
        return what, f"declare what becomes of them: {kind}=sw.Kind(..., placement=sw.PerDevice('data', resize='mean'))"
    if declared == "mean" and (ours.prng is not None or not jnp.issubdtype(jnp.dtype(ours.dtype), jnp.inexact)):
        return f"one value without a mean for each of {there} devices", "sw.PerDevice('data', resize='first')"
    return Resized(declared, here, f"the {declared} of {there} devices' values, on each of {here}{keys}")


def _owner(plan: Plan, record: LeafRecord) -> tuple[str, Path]:
    """The kind and path that say how a leaf lies: of an average those of what it is of."""
    if plan.kinds[record.kind].of is EMA:
        _, kind, *path = record.path
        return str(kind), tuple(path)
    return record.kind, record.path


def _declared(plan: Plan, record: LeafRecord, ours: ArrayRecord) -> str:
    kind, path = _owner(plan, record)
    placement = plan.kinds[kind].placement
    if placement is not None and not isinstance(placement, PLACEMENTS):
        # As it was asked when the state was taken, with the keys within a value.
        placement = placement(plan._relative(path) + ours.within, shape_of_one(ours))
    return placement.resize if isinstance(placement, PerDevice) else "error"


def resized(array: Any, change: Resized, sharding: Any) -> Any:
    """The array on its new devices."""
    if change.how == "mean":
        array = jnp.mean(jnp.asarray(array), axis=0)
    elif change.how == "first":
        array = array[0]
    return spread(array, change.devices, sharding)
