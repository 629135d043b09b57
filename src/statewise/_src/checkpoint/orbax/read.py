"""Arrays in Orbax's tree: read each once, and many at the same time.

An array that this process holds all of is read by TensorStore, which stores Orbax's arrays: asked for a thousand of
them at once it takes a tenth of the time that a thousand requests through Orbax take.  What several processes hold
together is read by Orbax, which knows which of them wants which part of it.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import collections
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.checkpoint.orbax.paths import spec_of
from statewise._src.checkpoint.orbax.write import tree_handler

__all__ = ["Key", "Stored", "open_stored", "opened", "read_stored"]

# Bytes that are on their way at a time: enough for any disk, little for a machine that holds the arrays anyway.
_AT_ONCE = 1 << 26

Key = tuple[str, ...]


class Stored(NamedTuple):
    """An array in Orbax's tree, and where it is to go.

    Attributes:
      shape: as it is stored.
      dtype: the name of its dtype, as it is stored.
      sharding: the devices that it goes to; None for the host.
    """

    shape: tuple[int, ...]
    dtype: str
    sharding: Any = None

    @property
    def is_spread(self) -> bool:
        """Whether other processes hold parts of it."""
        return self.sharding is not None and not self.sharding.is_fully_addressable


def _size(stored: Stored) -> int:
    """The bytes of an array."""
    return math.prod(stored.shape) * np.dtype(dtype_of(stored.dtype)).itemsize


def read_stored(folder: Any, wanted: Mapping[Key, Stored]) -> Iterator[tuple[Key, Any]]:
    """Reads arrays by their keys in Orbax's tree.

    Args:
      folder: the checkpoint's directory.
      wanted: by key what is to be read.

    Yields:
      the key, and its array: JAX's for one that several processes hold, else NumPy's.  Those of several processes come
      first; the others in the order of `wanted`.
    """
    spread = {key: stored for key, stored in wanted.items() if stored.is_spread}
    if spread:
        yield from _read_by_orbax(folder, spread).items()
    context = ts.Context()
    coming: collections.deque[tuple[Key, Any]] = collections.deque()
    alone = [(key, stored) for key, stored in wanted.items() if not stored.is_spread]
    for group in grouped(alone, lambda one: _size(one[1]), _AT_ONCE):
        opening = [(key, stored, open_stored(folder, key, context)) for key, stored in group]
        ahead = [(key, opened(future, stored.shape).read()) for key, stored, future in opening]
        # One group is on its way while what came before it is looked at.
        yield from _arrived(coming)
        coming.extend(ahead)
    yield from _arrived(coming)


def _arrived(coming: collections.deque[tuple[Key, Any]]) -> Iterator[tuple[Key, Any]]:
    while coming:
        key, future = coming.popleft()
        yield key, future.result()


def opened(future: Any, shape: tuple[int, ...]) -> Any:
    """An array that was opened, before a byte of it is asked for: it could claim to be of any size.

    Raises:
      ValueError: it has another shape, or cannot be opened.
    """
    store = future.result()
    if tuple(store.shape) != shape:
        raise ValueError(f"an array of shape {tuple(store.shape)} in the place of {shape}")
    return store


def open_stored(folder: Any, key: Sequence[str], context: Any) -> Any:
    """An array as TensorStore's future: Orbax stores each as zarr, within one database for all of them (OCDBT)."""
    place = {"driver": "ocdbt", "base": spec_of(folder), "path": f"{'.'.join(key)}/"}
    return ts.open({"driver": "zarr", "kvstore": place}, open=True, read=True, context=context)


def _read_by_orbax(folder: Any, wanted: Mapping[Key, Stored]) -> dict[Key, Any]:
    item: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for key, stored in wanted.items():
        dtype = dtype_of(stored.dtype)
        how = ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=stored.sharding, dtype=dtype, global_shape=stored.shape
        )
        shape = jax.ShapeDtypeStruct(stored.shape, dtype, sharding=stored.sharding)
        for tree, value in ((item, shape), (args, how)):
            for node in key[:-1]:
                tree = tree.setdefault(node, {})
            tree[key[-1]] = value
    handler = tree_handler()
    with contextlib.closing(handler):
        read = handler.restore(
            folder if folder.is_absolute() else folder.absolute(),
            args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True),
        )
    return {key: _at(read, key) for key in wanted}


def _at(tree: Any, key: Sequence[str]) -> Any:
    for node in key:
        tree = tree[node]
    return tree
