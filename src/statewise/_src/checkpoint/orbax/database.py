"""The database of a checkpoint's arrays: TensorStore's OCDBT, in which each array is a zarr array under its own key.

This is the database that Orbax writes and reads, with the same specification: either reads what the other wrote.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from statewise._src.checkpoint.orbax.paths import is_url, spec_of

__all__ = [
    "DATABASE",
    "LARGEST_CHUNK",
    "Commit",
    "chunks_of",
    "open_stored",
    "opened",
    "places_of_values",
    "reading",
    "writing",
]

# The database's file with which everything in it begins.
DATABASE = "manifest.ocdbt"
# The number of bytes of one value in the database, at most; on Google's object store, of one data file.
LARGEST_CHUNK, _LARGEST_IN_GCS = 1 << 31, 400 << 20
# A piece is split only by factors up to this, so that no array is cut into very many chunks.
_LARGEST_FACTOR = 1 << 10
# What Orbax writes with: many files at the same time, and a cache for the database's own index.
_WRITING = {"file_io_concurrency": {"limit": 128}, "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}
# Small values, such as zarr's descriptions of arrays, are in the index itself, and the index is one node, which is fast
# to read.  Only one process writes to a database, so its manifest can be a single file.
_CONFIG = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"}
# TensorStore's text for the position of a value: folder, file, first byte, and length.
_VALUE = re.compile(r"value:([^:]*):([^:]*):([0-9]+):([0-9]+)")


# --- reading ---------------------------------------------------------------------------------------------------


def reading() -> Any:
    """Returns what the arrays of one database share while they are read: its caches and its threads."""
    return ts.Context()


def open_stored(folder: Any, key: Sequence[str], context: Any) -> Any:
    """Opens an array, as a future: Orbax stores each as zarr, in one database for all of them (OCDBT)."""
    place = {"driver": "ocdbt", "base": spec_of(folder), "path": f"{'.'.join(key)}/"}
    return ts.open({"driver": "zarr", "kvstore": place}, open=True, read=True, context=context)


def opened(future: Any, shape: tuple[int, ...]) -> Any:
    """Returns an opened array, and checks its shape before any byte of it is read: it could claim to have any size.

    Raises:
      ValueError: it has another shape, or cannot be opened.
    """
    store = future.result()
    if tuple(store.shape) != shape:
        raise ValueError(f"an array of shape {tuple(store.shape)} instead of {shape}")
    return store


def places_of_values(directory: Any, names: Collection[str]) -> Iterator[tuple[str, int, int]]:
    """Yields where the arrays are in these files: the file, the first byte, and the number of bytes.

    Raises:
      ValueError: TensorStore cannot read its own index.
    """
    if not (directory / DATABASE).exists():
        return
    store = ts.KvStore.open(spec_of(directory)).result()
    versions = ts.ocdbt.dump(store).result()["versions"]
    # Only the last version: the older ones are what earlier commits left.
    nodes = [versions[-1]["root"]["location"]] if versions and "location" in versions[-1]["root"] else []
    while nodes:
        for entry in ts.ocdbt.dump(store, node=nodes.pop()).result()["entries"]:
            value = _VALUE.fullmatch(entry.get("indirect_value", ""))
            if "location" in entry:
                nodes.append(entry["location"])
            elif value is not None and value[1] + value[2] in names:
                yield value[1] + value[2], int(value[3]), int(value[4])


# --- writing ---------------------------------------------------------------------------------------------------


def writing() -> Any:
    """Returns what the arrays of one database share while they are written."""
    return ts.Context(_WRITING)


class Commit:
    """What is written together: afterwards either all of it is in the database, or nothing.

    Args:
      folder: the directory of the database.
      context: from `writing`.
    """

    def __init__(self, folder: Any, context: Any) -> None:
        self._database = _for_writing(folder)
        self._context = context
        self._transaction = ts.Transaction(atomic=True)

    def create(self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype) -> Any:
        """Creates an array, as a future.

        Args:
          name: its key in the database.
          shape: its shape.
          chunks: the shape of the pieces that it is stored in.
          dtype: its dtype.
        """
        spec = {
            "driver": "zarr",
            "kvstore": self._database | {"path": name},
            "dtype": np.dtype(dtype).name,
            # Without compression: weights hardly shrink, and it takes most of the time.
            "metadata": {"shape": shape, "chunks": chunks, "compressor": None},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            # Zeros too, so that what is missing can be distinguished from what is zero.
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, create=True, open=True, context=self._context, transaction=self._transaction)

    def done(self) -> None:
        """Writes everything to the disk, and waits for it."""
        self._transaction.commit_sync()


def _for_writing(folder: Any) -> dict[str, Any]:
    """Returns the specification of a database that this process writes, and no other one."""
    base = spec_of(folder)
    database = {
        "driver": "ocdbt",
        "base": base,
        "config": _CONFIG,
        "assume_config": True,  # otherwise an empty manifest is written first
        "target_data_file_size": LARGEST_CHUNK,
        "cache_pool": "cache_pool#ocdbt",
    }
    if is_url(folder):
        return database | {"target_data_file_size": _LARGEST_IN_GCS if base["driver"] == "gcs" else LARGEST_CHUNK}
    # Data files have new names, so they need no rename to be complete; the manifest, which refers to them, does.
    return database | {"base": base | {"file_io_locking": {"mode": "non_atomic"}}, "manifest": base}


def chunks_of(shape: tuple[int, ...], itemsize: int, most: int = LARGEST_CHUNK) -> tuple[int, ...]:
    """Returns the shape of the chunks of a piece of an array: the piece, or equal parts of it of at most `most` bytes.

    Parts are equal, so that the next piece begins with a new chunk: two writers never share one.
    """
    chunks = list(shape)
    while np.prod(chunks, dtype=object) * itemsize > most:
        # Along the first axis that can be split, because the parts are then contiguous.
        factors = ((axis, _smallest_factor(size)) for axis, size in enumerate(chunks))
        axis, factor = next(((axis, factor) for axis, factor in factors if factor), (0, 1))
        if factor == 1:
            break  # one large value is better than millions of small ones
        chunks[axis] //= factor
    return tuple(chunks)


def _smallest_factor(size: int) -> int | None:
    """Returns the smallest factor of a size; None if it is too large, or there is none."""
    return next((factor for factor in range(2, min(size, _LARGEST_FACTOR) + 1) if size % factor == 0), None)
