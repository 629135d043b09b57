"""Reading arrays from Orbax's tree: each once, and many at the same time.

They are read by TensorStore, which stores Orbax's arrays: a thousand requests at the same time take a tenth of the time
that they take through Orbax.  Of an array of several processes each reads the parts that its own devices need.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.checkpoint.orbax.database import Database, open_stored, opened, reading

__all__ = ["Key", "Stored", "read_stored"]

# The number of bytes being read at a time: enough for any disk, and little for a machine that holds the arrays anyway.
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
        """Returns whether other processes hold parts of it."""
        return self.sharding is not None and not self.sharding.is_fully_addressable

    @property
    def nbytes(self) -> int:
        """Returns its size in bytes."""
        return math.prod(self.shape) * np.dtype(dtype_of(self.dtype)).itemsize


def read_stored(folder: Any, wanted: Mapping[Key, Stored], index: str = "") -> Iterator[tuple[Key, Any]]:
    """Reads arrays by their keys in Orbax's tree.

    Args:
      folder: the checkpoint's directory.
      wanted: the arrays to read, by key.
      index: the directory in it that has the database's own file; empty if it is the folder itself.

    Yields:
      the key, and its array: JAX's for an array of several processes, otherwise NumPy's.  Those of several processes
      come first; the others in the order of `wanted`.
    """
    database = reading(folder, index)
    spread = [(key, stored) for key, stored in wanted.items() if stored.is_spread]
    for group in grouped(spread, lambda pair: pair[1].nbytes, _AT_ONCE):
        yield from _read_spread(database, group)
    # A queue, so that an array is not kept here when it has been yielded.
    coming: collections.deque[tuple[Key, Any]] = collections.deque()
    alone = [(key, stored) for key, stored in wanted.items() if not stored.is_spread]
    for group in grouped(alone, lambda pair: pair[1].nbytes, _AT_ONCE):
        opening = [(key, stored, open_stored(database, key)) for key, stored in group]
        ahead = [(key, opened(future, stored.shape).read()) for key, stored, future in opening]
        # While this group is being read, the caller checks the arrays of the one before.
        yield from _arrived(coming)
        coming.extend(ahead)
    yield from _arrived(coming)


def _arrived(coming: collections.deque[tuple[Key, Any]]) -> Iterator[tuple[Key, Any]]:
    while coming:
        key, future = coming.popleft()
        yield key, future.result()


def _read_spread(database: Database, wanted: Sequence[tuple[Key, Stored]]) -> Iterator[tuple[Key, Any]]:
    """Yields arrays of several processes: each part that devices of this one need is read once."""
    opening = [(key, stored, open_stored(database, key)) for key, stored in wanted]
    reading_parts = []
    for key, stored, future in opening:
        store = opened(future, stored.shape)
        parts: dict[str, Any] = {}
        devices: list[tuple[jax.Device, str]] = []
        for device, index in stored.sharding.addressable_devices_indices_map(stored.shape).items():
            if str(index) not in parts:  # slices cannot be keys of a dict on every Python
                parts[str(index)] = store[index].read()
            devices.append((device, str(index)))
        reading_parts.append((key, stored, parts, devices))
    for key, stored, parts, devices in reading_parts:
        memory = stored.sharding.memory_kind
        places = [jax.sharding.SingleDeviceSharding(device, memory_kind=memory) for device, _ in devices]
        arrays = jax.device_put([parts[part].result() for _, part in devices], places)
        yield key, jax.make_array_from_single_device_arrays(stored.shape, stored.sharding, arrays)
