"""Where each array of a state goes in Orbax's tree.

The part of that which depends only on the plan, and on the sharding of its arrays, is computed once: a run saves the
same plan again and again.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import collections
import dataclasses
import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from statewise._src.checkpoint.format.checksums import is_spread
from statewise._src.checkpoint.format.keys import OrbaxKeys, dtype_of
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, StoredBuffer
from statewise._src.checkpoint.format.records import check_savable, records_of, unpacked
from statewise._src.core.plan import State
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["LaidOut", "Layout", "lay_out"]

Layout = Literal["named", "packed"]

# Arrays up to this many bytes share buffers in the packed layout: below it Orbax's cost is per array, not per byte.
_SMALL = 1024 * 1024

Key = tuple[str, ...]


class _Buffer(NamedTuple):
    """Arrays that share one buffer, one after the other.

    Attributes:
      stored: the buffer as the manifest has it.
      numbers: their numbers among all arrays, in order.
      runs: for each, its first element in the buffer, and its number of elements.
    """

    stored: StoredBuffer
    numbers: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]


class LaidOut(NamedTuple):
    """What a save writes.

    Attributes:
      records: the leaves, with where each array goes.
      tree: Orbax's tree, nested dicts of arrays.
      sources: for each array of each record, in order, the array from which its checksum is computed.
      packed: in the packed layout, the buffers' arrays, each with which of the sources it holds.
    """

    records: tuple[LeafRecord, ...]
    tree: dict[str, Any]
    sources: tuple[Any, ...]
    packed: tuple[tuple[np.ndarray, _Buffer], ...]


class _Arrangement(NamedTuple):
    """What all states of a plan with the same shardings have in common.

    Attributes:
      records: the leaves.
      arrays: for every array its kind, its position in the kind's part, and its record.
      alone: the numbers of the arrays that have a key of their own, by key.
      buffers: the buffers that small arrays go into.
      away: whether some arrays are on devices whose memory is not the host's.
    """

    records: tuple[LeafRecord, ...]
    arrays: tuple[tuple[str, int, ArrayRecord], ...]
    alone: Mapping[Key, int]
    buffers: tuple[_Buffer, ...]
    away: bool


# For each plan, by kinds and layout: the shardings of its arrays, and the arrangement.
_Known = dict[tuple[tuple[str, ...], str], tuple[list[Any], _Arrangement]]
_known: weakref.WeakKeyDictionary[PlanTables, _Known] = weakref.WeakKeyDictionary()


def lay_out(state: State, kinds: Collection[str], layout: str) -> LaidOut:
    """Decides where each array of these kinds goes.

    Raises:
      StructureError: the state was donated, does not fit its plan, is abstract, or is being traced; two leaves have one
        path.
    """
    check_savable(state, kinds)
    parts = {kind: unpacked(state, kind) for kind in kinds}
    arranged = _arrangement(state.tables, parts, layout)
    sources = tuple(_as_stored(parts[kind][position], record) for kind, position, record in arranged.arrays)
    if arranged.away:
        _fetch(sources)
    flat: dict[Key, Any] = {key: sources[number] for key, number in arranged.alone.items()}
    packed = []
    for buffer in arranged.buffers:
        array = np.concatenate([np.asarray(sources[number]).reshape(-1) for number in buffer.numbers])
        array.flags.writeable = False  # nothing else refers to it: it need not be copied
        flat[buffer.stored.key] = array
        packed.append((array, buffer))
    return LaidOut(arranged.records, traverse_util.unflatten_dict(flat), sources, tuple(packed))


def _arrangement(plan: PlanTables, parts: Mapping[str, Sequence[Any]], layout: str) -> _Arrangement:
    known = _known.setdefault(plan, {})
    shardings = [getattr(array, "sharding", None) for part in parts.values() for array in part]
    before = known.get((tuple(parts), layout))
    if before is not None and before[0] == shardings:
        return before[1]
    arrangement = _arrange(plan, parts, layout)
    known[tuple(parts), layout] = (shardings, arrangement)
    return arrangement


def _arrange(plan: PlanTables, parts: Mapping[str, Sequence[Any]], layout: str) -> _Arrangement:
    keys, records = OrbaxKeys(), []
    arrays: list[tuple[str, int, ArrayRecord]] = []
    alone: dict[Key, int] = {}
    groups: dict[tuple[str, str], tuple[list[int], list[tuple[int, int]]]] = {}  # the numbers and runs of a buffer
    for record, start in records_of(plan):
        if record.kind not in parts:
            continue
        stored = []
        for position, record_of_array in enumerate(record.arrays, start):
            placement = _placement_of(parts[record.kind][position])
            shape, dtype = record_of_array.on_disk
            size = math.prod(shape)
            small = size * np.dtype(dtype_of(dtype)).itemsize <= _SMALL
            key = buffer = None
            if size and layout == "packed" and placement is None and small:
                group = (record.kind, dtype)
                numbers, runs = groups.setdefault(group, ([], []))
                runs.append((sum(runs[-1]) if runs else 0, size))  # a run starts where the one before it ends
                numbers.append(len(arrays))
                buffer = (list(groups).index(group), runs[-1][0])
            elif size:
                key = keys.key(record.path + record_of_array.within)
                alone[key] = len(arrays)
            if record_of_array.placement:
                placement = record_of_array.placement | (placement or {})
            stored.append(dataclasses.replace(record_of_array, key=key, buffer=buffer, placement=placement))
            arrays.append((record.kind, position, record_of_array))
        records.append(dataclasses.replace(record, arrays=tuple(stored)))
    _check_twins(records)
    buffers = tuple(
        _Buffer(StoredBuffer(keys.apart("packed", *group), group[1], sum(runs[-1])), tuple(numbers), tuple(runs))
        for group, (numbers, runs) in groups.items()
    )
    platforms = {device.platform for part in parts.values() for array in part for device in _devices(array)}
    return _Arrangement(tuple(records), tuple(arrays), alone, buffers, bool(platforms - {"cpu"}))


def _devices(array: Any) -> Collection[jax.Device]:
    return array.sharding.device_set if isinstance(array, jax.Array) else ()


def _fetch(sources: Sequence[Any]) -> None:
    """Starts to copy all arrays to the host; otherwise each copy would start only when the one before it has ended."""
    for source in sources:
        if isinstance(source, jax.Array) and not is_spread(source):
            source.copy_to_host_async()


def _as_stored(array: Any, record: ArrayRecord) -> Any:
    if record.prng is not None:
        return jax.random.key_data(array)
    if record.stored is not None:
        return np.asarray(array).view(np.uint8)
    # Orbax accepts NumPy's own scalars only, not those of bfloat16 and the like.
    return np.asarray(array) if isinstance(array, np.generic) else array


def _placement_of(array: Any) -> dict[str, Any] | None:
    """Returns how an array is sharded, as JSON; None if it is on one device, or on the host."""
    sharding = getattr(array, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return None
    if not isinstance(sharding, jax.NamedSharding):
        return {"sharding": type(sharding).__name__, "devices": len(sharding.device_set)}
    spec = [
        list(axes) if isinstance(axes, tuple) else axes if axes is None or isinstance(axes, str) else str(axes)
        for axes in sharding.spec
    ]
    memory = {} if sharding.memory_kind in (None, "device") else {"memory": sharding.memory_kind}
    return {"mesh": dict(sharding.mesh.shape), "spec": spec, **memory}


def _check_twins(records: Sequence[LeafRecord]) -> None:
    """Raises if two leaves have one path: a model's own `optimizer/params/0/count`, and that of its optimizer."""
    counts = collections.Counter(record.id for record in records)
    twins = [record for record in records if counts[record.id] > 1]
    if twins:
        raise StructureError(
            "Two leaves have one path, so that a restore could not distinguish them.",
            leaves=[record.leaf() for record in twins],
            hint=f"give the model's attribute {str(twins[0].path[0])!r} another name: the plan keeps what it derives "
            "there",
        )
