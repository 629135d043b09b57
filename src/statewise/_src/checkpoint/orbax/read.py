"""Reading arrays from Orbax's tree: each once, and many at the same time.

An array that this process holds completely is read by TensorStore, which stores Orbax's arrays: a thousand requests at
the same time take a tenth of the time that they take through Orbax.  An array of several processes is read by Orbax,
which knows which process needs which part of it.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import collections
import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.checkpoint.orbax.database import open_stored, opened, reading
from statewise._src.checkpoint.orbax.write import tree_handler

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


def read_stored(folder: Any, wanted: Mapping[Key, Stored]) -> Iterator[tuple[Key, Any]]:
    """Reads arrays by their keys in Orbax's tree.

    Args:
      folder: the checkpoint's directory.
      wanted: the arrays to read, by key.

    Yields:
      the key, and its array: JAX's for an array of several processes, otherwise NumPy's.  Those of several processes
      come first; the others in the order of `wanted`.
    """
    spread = {key: stored for key, stored in wanted.items() if stored.is_spread}
    if spread:
        yield from _read_by_orbax(folder, spread).items()
    context = reading()
    # A queue, so that an array is not kept here when it has been yielded.
    coming: collections.deque[tuple[Key, Any]] = collections.deque()
    alone = [(key, stored) for key, stored in wanted.items() if not stored.is_spread]
    for group in grouped(alone, lambda pair: pair[1].nbytes, _AT_ONCE):
        opening = [(key, stored, open_stored(folder, key, context)) for key, stored in group]
        ahead = [(key, opened(future, stored.shape).read()) for key, stored, future in opening]
        # While this group is being read, the caller checks the arrays of the one before.
        yield from _arrived(coming)
        coming.extend(ahead)
    yield from _arrived(coming)


def _arrived(coming: collections.deque[tuple[Key, Any]]) -> Iterator[tuple[Key, Any]]:
    while coming:
        key, future = coming.popleft()
        yield key, future.result()


def _read_by_orbax(folder: Any, wanted: Mapping[Key, Stored]) -> dict[Key, Any]:
    # Orbax takes shapes and restore arguments as two trees of the same structure.
    items: dict[Key, jax.ShapeDtypeStruct] = {}
    args: dict[Key, ocp.ArrayRestoreArgs] = {}
    for key, (shape, name, sharding) in wanted.items():
        dtype = dtype_of(name)
        items[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        args[key] = ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, dtype=dtype, global_shape=shape)
    trees = traverse_util.unflatten_dict(items), traverse_util.unflatten_dict(args)
    with contextlib.closing(tree_handler()) as handler:
        read = handler.restore(
            folder if folder.is_absolute() else folder.absolute(),
            args=ocp.args.PyTreeRestore(trees[0], restore_args=trees[1], partial_restore=True),
        )
    arrays = traverse_util.flatten_dict(read)
    return {key: arrays[key] for key in wanted}
