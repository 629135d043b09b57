"""Reading arrays from Orbax's tree: each once, and many at the same time.

They are read by TensorStore, which stores Orbax's arrays: a thousand requests at the same time take a tenth of the time
that they take through Orbax.  Of an array of several processes each reads the parts that its own devices need.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import collections
import concurrent.futures
import functools
import itertools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from statewise._src.checkpoint.format.checksums import Pieces, Sums, added, sums_of
from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.checkpoint.orbax.database import Database, open_stored, opened, reading
from statewise._src.checkpoint.orbax.parts import holders, most_parts, processes_of
from statewise._src.checkpoint.orbax.values import Coming, DiskValues
from statewise._src.common import compat

__all__ = ["Key", "Stored", "read_stored"]

# The number of bytes that a process reads at a time: enough for any disk, and little for a machine that holds the
# arrays anyway.
_AT_ONCE = 1 << 26

Key = tuple[str, ...]


class Stored(NamedTuple):
    """An array in Orbax's tree, and where it goes.

    Attributes:
      shape: its shape, as stored.
      dtype: the name of its dtype, as stored.
      sharding: its sharding when it has been read; None for the host.
    """

    shape: tuple[int, ...]
    dtype: str
    sharding: Any = None

    @property
    def is_spread(self) -> bool:
        """Returns whether several processes hold parts of it: all of them read it together then."""
        return self.sharding is not None and len(processes_of(self.sharding)) > 1

    @property
    def nbytes(self) -> int:
        """Returns its size in bytes."""
        return math.prod(self.shape) * np.dtype(dtype_of(self.dtype)).itemsize

    @property
    def nbytes_of_process(self) -> int:
        """Returns the most bytes that one process reads: the same number in all processes."""
        size = math.prod(self.sharding.shard_shape(self.shape)) * np.dtype(dtype_of(self.dtype)).itemsize
        return size * most_parts(self.sharding, self.shape)


def read_stored(
    folder: Any, wanted: Mapping[Key, Stored], index: str = "", files: Mapping[str, int] = types.MappingProxyType({})
) -> Iterator[tuple[Key, Any, Sums | None]]:
    """Reads arrays by their keys in Orbax's tree.

    Args:
      folder: the checkpoint's directory.
      wanted: the arrays to read, by key.
      index: the directory in it that has the database's own file; empty if it is the folder itself.
      files: by name the sizes of files of which large arrays may be read without TensorStore.

    Yields:
      the key, its array, and its checksum if that is known: JAX's for an array of several processes, otherwise NumPy's.
      Those of several processes come first; the others in the order of `wanted`.
    """
    database = reading(folder, index)
    spread = [(key, stored) for key, stored in wanted.items() if stored.is_spread]
    alone = [(key, stored) for key, stored in wanted.items() if not stored.is_spread]
    # A queue, so that an array is not kept here when it has been yielded.
    coming: collections.deque[tuple[Key, Any]] = collections.deque()
    with DiskValues(folder, files, index) as values:
        # The parts of the next group are being read while those of one are checked, and the processes compare sums.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            begun: list[tuple[int, concurrent.futures.Future[Any]]] = []
            for group in grouped(spread, lambda pair: pair[1].nbytes_of_process, _AT_ONCE):
                begun.append((len(group), thread.submit(_start_parts, database, values, group)))
                if len(begun) > 1:
                    yield from _spread_arrived(*begun.pop(0))
            for each in begun:
                yield from _spread_arrived(*each)
        for group in grouped(alone, lambda pair: pair[1].nbytes, _AT_ONCE):
            opening = [(key, stored, open_stored(database, key)) for key, stored in group]
            ahead = [(key, _started(values, key, opened(future, stored.shape))) for key, stored, future in opening]
            # While this group is being read, the caller checks the arrays of the one before.
            yield from _arrived(coming)
            coming.extend(ahead)
        yield from _arrived(coming)


def _started(values: DiskValues, key: Key, store: Any) -> Any:
    """Returns an array that is being read: from its file if that is possible, otherwise by TensorStore."""
    return values.start(".".join(key), store) or store.read()


def _arrived(coming: collections.deque[tuple[Key, Any]]) -> Iterator[tuple[Key, Any, Sums | None]]:
    while coming:
        key, future = coming.popleft()
        found = future.result()
        yield (key, *found) if isinstance(future, Coming) else (key, found, None)


class _Part(NamedTuple):
    """A part of an array: its first index along each axis, its values, and what they add to the checksum, if known."""

    start: tuple[int, ...]
    values: np.ndarray
    sums: Sums | None


class _Parts(NamedTuple):
    """What this process reads of an array of several: each part once, and the devices that it goes to."""

    key: Key
    stored: Stored
    parts: Mapping[str, _Part]
    devices: Sequence[tuple[jax.Device, str]]


def _spread_arrived(count: int, started: concurrent.futures.Future[Any]) -> Iterator[tuple[Key, Any, Sums | None]]:
    """Yields arrays of several processes, with checksums of the parts that all of them have read.

    Each process sums the parts that it is the first to hold; all exchange their sums once, and learn whether another
    could not read.

    Args:
      count: how many arrays there are.
      started: what `_start_parts` returns.
    """
    sums = np.zeros((count + 1, 2), np.uint32)  # the last row says that this process could not read
    try:
        read = [
            _Parts(key, stored, {name: _result(*part) for name, part in parts.items()}, devices)
            for key, stored, parts, devices in started.result()
        ]
        sums[:-1] = [_sums_here(each) for each in read]
    except Exception:  # raised again, when the other processes know
        sums[-1] = 1
        compat.values_of_processes(sums)
        raise
    every = compat.values_of_processes(sums).astype(np.uint64)
    if (failed := np.flatnonzero(every[:, -1, 0])).size:
        raise compat.OtherProcessError(f"process {failed[0]} could not read its parts, and its own error says why")
    total = every.sum(axis=0) % (1 << 32)
    # In one call for all: a call for each of a thousand small arrays takes longer than to read them.
    placed_parts = jax.device_put(
        [each.parts[name].values for each in read for _, name in each.devices],
        [_place(device, each.stored.sharding.memory_kind) for each in read for device, _ in each.devices],
    )
    coming = iter(placed_parts)
    for (key, stored, _, devices), (plain, placed) in zip(read, total[:-1].tolist(), strict=True):
        arrays = list(itertools.islice(coming, len(devices)))
        dtype = dtype_of(stored.dtype)  # a process may hold no part of it
        array = jax.make_array_from_single_device_arrays(stored.shape, stored.sharding, arrays, dtype=dtype)
        yield key, array, (plain, placed)


@functools.cache
def _place(device: jax.Device, memory_kind: str | None) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind)


def _start_parts(
    database: Database, values: DiskValues, wanted: Sequence[tuple[Key, Stored]]
) -> list[tuple[Key, Stored, dict[str, Any], list[tuple[jax.Device, str]]]]:
    """Returns, for each array, the parts that are being read, each once, and the devices that they go to."""
    opening = [(key, stored, open_stored(database, key)) for key, stored in wanted]
    reading_parts = []
    for key, stored, future in opening:
        store = opened(future, stored.shape)
        parts: dict[str, tuple[tuple[int, ...], Any]] = {}
        devices: list[tuple[jax.Device, str]] = []
        for device, index in stored.sharding.addressable_devices_indices_map(stored.shape).items():
            name = str(index)  # slices cannot be keys of a dict on every Python
            if name not in parts:
                coming = values.start(".".join(key), store, index) or store[index].read()
                parts[name] = tuple(axis.start or 0 for axis in index), coming
            devices.append((device, name))
        reading_parts.append((key, stored, parts, devices))
    return reading_parts


def _result(start: tuple[int, ...], future: Any) -> _Part:
    """Returns a part when it has been read."""
    found = future.result()
    return _Part(start, *found) if isinstance(future, Coming) else _Part(start, found, None)


def _sums_here(read: _Parts) -> Sums:
    """Returns the checksum of the parts that this process is the first to hold."""
    first = holders(read.stored.sharding, read.stored.shape)
    own = [part for name, part in read.parts.items() if first[name][0].process_index == jax.process_index()]
    unknown = tuple((part.start, part.values) for part in own if part.sums is None)
    known = [part.sums for part in own if part.sums is not None]
    return functools.reduce(added, known, sums_of(Pieces(read.stored.shape, unknown)))
