"""Where each array of a state goes in Orbax's tree.

What of that depends on the plan alone, and on where its arrays lie, is worked out once: a run saves the same plan again
and again.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import collections
import math
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from statewise._src.checkpoint.format.checksums import is_spread
from statewise._src.checkpoint.format.keys import OrbaxKeys, dtype_of
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, StoredBuffer
from statewise._src.checkpoint.format.records import check_savable, records_of, unpacked
from statewise._src.core.plan import State
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["LaidOut", "lay_out"]

# Arrays up to this many bytes share buffers in the packed layout: below it Orbax's cost is per array, not per byte.
_SMALL = 1024 * 1024

Key = tuple[str, ...]


class _Together(NamedTuple):
    """Arrays that stand in one buffer, one after the other.

    Attributes:
      key: the buffer's, in Orbax's tree.
      members: their numbers among all arrays, in order.
      runs: where each begins in it, and how many elements it has.
    """

    key: Key
    members: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]


class LaidOut(NamedTuple):
    """What a save writes.

    Attributes:
      records: the leaves, with where each array goes.
      buffers: what small arrays go into, in the packed layout.
      tree: Orbax's tree, nested dicts of arrays.
      sources: for each array of each record, in order, what its checksum is taken of.
      packed: the buffers' arrays, and which of the sources stand in them.
    """

    records: tuple[LeafRecord, ...]
    buffers: tuple[StoredBuffer, ...]
    tree: dict[str, Any]
    sources: tuple[Any, ...]
    packed: tuple[tuple[np.ndarray, _Together], ...]


class _Arrangement(NamedTuple):
    """What is the same for each state of a plan whose arrays lie alike.

    Attributes:
      records: the leaves.
      arrays: of every array its kind, its position in the kind's part, and its record.
      alone: the keys and numbers of arrays that have a key of their own.
      buffers: what small arrays go into.
      together: which of them, for each buffer.
      away: whether there are devices whose memory is not the host's.
    """

    records: tuple[LeafRecord, ...]
    arrays: tuple[tuple[str, int, ArrayRecord], ...]
    alone: tuple[tuple[Key, int], ...]
    buffers: tuple[StoredBuffer, ...]
    together: tuple[_Together, ...]
    away: bool


# Of each plan, by kinds and layout: how its arrays lay, and the arrangement.
_Known = dict[tuple[tuple[str, ...], str], tuple[list[Any], _Arrangement]]
_known: weakref.WeakKeyDictionary[PlanTables, _Known] = weakref.WeakKeyDictionary()


def lay_out(state: State, kinds: Collection[str], layout: str) -> LaidOut:
    """Decides where each array of these kinds goes.

    Raises:
      StructureError: a donated state, one whose arrays do not fit its plan, an abstract one, one that is being traced;
        two leaves at one path.
    """
    check_savable(state, kinds)
    parts = {kind: unpacked(state, kind) for kind in kinds}
    arranged = _arrangement(state.tables, parts, layout)
    sources = tuple(_as_stored(parts[kind][position], record) for kind, position, record in arranged.arrays)
    if arranged.away:
        _fetch(sources)
    tree: dict[str, Any] = {}
    for key, number in arranged.alone:
        _insert(tree, key, sources[number])
    packed = []
    for together in arranged.together:
        buffer = np.concatenate([np.asarray(sources[number]).reshape(-1) for number in together.members])
        buffer.flags.writeable = False  # nobody else has it: no copy need be taken
        _insert(tree, together.key, buffer)
        packed.append((buffer, together))
    return LaidOut(arranged.records, arranged.buffers, tree, sources, tuple(packed))


def _arrangement(plan: PlanTables, parts: Mapping[str, Sequence[Any]], layout: str) -> _Arrangement:
    known = _known.setdefault(plan, {})
    lies = [getattr(array, "sharding", None) for part in parts.values() for array in part]
    before = known.get((tuple(parts), layout))
    if before is not None and before[0] == lies:
        return before[1]
    made = _arrange(plan, parts, layout)
    known[tuple(parts), layout] = (lies, made)
    return made


def _arrange(plan: PlanTables, parts: Mapping[str, Sequence[Any]], layout: str) -> _Arrangement:
    keys, records = OrbaxKeys(), []
    arrays: list[tuple[str, int, ArrayRecord]] = []
    alone: list[tuple[Key, int]] = []
    members: dict[tuple[str, str], list[int]] = {}
    runs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for record, start in records_of(plan):
        if record.kind not in parts:
            continue
        stored = []
        for position, blank in enumerate(record.arrays, start):
            array = parts[record.kind][position]
            placement = _placement_of(array)
            shape, dtype = blank.on_disk
            size = math.prod(shape)
            small = size * np.dtype(dtype_of(dtype)).itemsize <= _SMALL
            key = buffer = None
            if size and layout == "packed" and placement is None and small:
                kin = (record.kind, dtype)
                begun = runs.setdefault(kin, [])
                begun.append((sum(begun[-1]) if begun else 0, size))
                members.setdefault(kin, []).append(len(arrays))
                buffer = (numbers.setdefault(kin, len(numbers)), begun[-1][0])
            elif size:
                key = keys.key(record.path + blank.within)
                alone.append((key, len(arrays)))
            if blank.placement:
                placement = blank.placement | (placement or {})
            stored.append(blank.stored_at(key, buffer, placement))
            arrays.append((record.kind, position, blank))
        records.append(record.holding(tuple(stored)))
    _check_twins(records)
    together = tuple(
        _Together(keys.apart("packed", *kin), tuple(members[kin]), tuple(found)) for kin, found in runs.items()
    )
    buffers = tuple(StoredBuffer(one.key, kin[1], sum(one.runs[-1])) for kin, one in zip(runs, together, strict=True))
    platforms = {device.platform for part in parts.values() for array in part for device in _devices(array)}
    return _Arrangement(tuple(records), tuple(arrays), tuple(alone), buffers, together, bool(platforms - {"cpu"}))


def _devices(array: Any) -> Collection[jax.Device]:
    return array.sharding.device_set if isinstance(array, jax.Array) else ()


def _fetch(sources: Sequence[Any]) -> None:
    """Starts to copy arrays to the host, all at once; one after the other they would each wait for the last."""
    for source in sources:
        if isinstance(source, jax.Array) and not is_spread(source):
            source.copy_to_host_async()


def _insert(tree: dict[str, Any], key: Key, array: Any) -> None:
    *nodes, last = key
    for node in nodes:
        tree = tree.setdefault(node, {})
    tree[last] = array


def _as_stored(array: Any, record: ArrayRecord) -> Any:
    if record.prng is not None:
        return jax.random.key_data(array)
    if record.stored is not None:
        return np.asarray(array).view(np.uint8)
    # Orbax knows NumPy's own scalars only, not those of bfloat16 and the like.
    return np.asarray(array) if isinstance(array, np.generic) else array


def _placement_of(array: Any) -> dict[str, Any] | None:
    """How an array lies on a mesh, as JSON; None for one that lies on one device, or on the host."""
    sharding = getattr(array, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return None
    if isinstance(sharding, jax.NamedSharding):
        spec = [list(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec]
        kind = {} if sharding.memory_kind in (None, "device") else {"memory": sharding.memory_kind}
        return {"mesh": dict(sharding.mesh.shape), "spec": [_axis(axes) for axes in spec], **kind}
    return {"sharding": type(sharding).__name__, "devices": len(sharding.device_set)}


def _axis(axes: Any) -> Any:
    return axes if axes is None or isinstance(axes, (str, list)) else str(axes)


def _check_twins(records: Sequence[LeafRecord]) -> None:
    """Raises where two leaves have one path: a model's own `optimizer/params/0/count`, and that of its optimizer."""
    if len({record.id for record in records}) < len(records):
        counts = collections.Counter(record.id for record in records)
        attribute = next(str(record.path[0]) for record in records if counts[record.id] > 1)
        raise StructureError(
            "Two leaves have one path, by which a restore could not tell them apart.",
            leaves=[record.leaf() for record in records if counts[record.id] > 1],
            hint=f"give the model's attribute {attribute!r} another name: the plan keeps what it derives there",
        )
