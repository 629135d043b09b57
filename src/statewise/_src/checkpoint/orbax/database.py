"""The database of a checkpoint's arrays: TensorStore's OCDBT, in which each array is a zarr array under its own key.

This is the database that Orbax writes and reads, with the same specification: either reads what the other wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from statewise._src.checkpoint.orbax.paths import is_url, spec_of
from statewise._src.checkpoint.orbax.stores import settings_of_stores

__all__ = [
    "DATABASE",
    "LARGEST_CHUNK",
    "LARGEST_IN_STORE",
    "Commit",
    "Database",
    "chunks_of",
    "has_data",
    "in_memory",
    "merge",
    "open_stored",
    "opened",
    "places_of_values",
    "reading",
    "writing",
    "writing_apart",
]

# The database's file with which everything in it begins.
DATABASE = "manifest.ocdbt"
# The number of bytes of one value in the database, at most; and in an object store, where one data file is one request.
LARGEST_CHUNK, LARGEST_IN_STORE = 1 << 31, 1 << 28
# The number of bytes of a data file in an object store, so that several of them are sent at the same time.
_FILE_IN_STORE = 1 << 26
# A piece is split only by factors up to this, so that no array is cut into very many chunks.
_LARGEST_FACTOR = 1 << 10
# A cache for the nodes of the database's index, by name and size; each read or save has one of its own.
_CACHE = "cache_pool#ocdbt"
_CACHED = {_CACHE: {"total_bytes_limit": 100_000_000}}
# What Orbax writes with: many files at the same time.  Files are flushed by whoever writes, because TensorStore would
# wait for each before it writes the next one.
_WRITING = {"file_io_concurrency": {"limit": 128}, "file_io_sync": False, **_CACHED}
# Small values, such as zarr's descriptions of arrays, are in the index itself.  For a thousand arrays it is one node,
# which is fast to read; not for more, because TensorStore takes longer to find a key in a larger node.  One process
# writes to a database, so its manifest can be a single file.
_CONFIG = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 500_000, "manifest_kind": "single"}
# TensorStore's text for the position of a value: folder, file, first byte, and length.
_VALUE = re.compile(r"value:([^:]*):([^:]*):([0-9]+):([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Database:
    """A database, as TensorStore's specification, and what its arrays share while they are read or written."""

    spec: dict[str, Any]
    context: Any

    @property
    def most(self) -> int:
        """Returns the number of bytes of one value in it, at most."""
        return LARGEST_CHUNK if self.spec["base"]["driver"] == "file" else LARGEST_IN_STORE


# --- reading ---------------------------------------------------------------------------------------------------


def reading(folder: Any, index: str = "") -> Database:
    """Returns a database to read from.

    Args:
      folder: the directory that the places of its data are relative to.
      index: the directory in it that has the database's own file; empty if it is the folder itself.
    """
    spec = {"driver": "ocdbt", "base": spec_of(folder), "cache_pool": _CACHE}
    if index:
        spec["manifest"] = spec_of(folder / index)
    return Database(spec, _context(folder, _CACHED))


def _context(folder: Any, settings: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
    """Returns what requests to a database share: these settings, and those of its store if it is in one."""
    return ts.Context({**(settings_of_stores() if is_url(folder) else {}), **settings})


def open_stored(database: Database, key: Sequence[str]) -> Any:
    """Opens an array, as a future: Orbax stores each as zarr, in one database for all of them (OCDBT)."""
    place = database.spec | {"path": f"{'.'.join(key)}/"}
    return ts.open({"driver": "zarr", "kvstore": place}, open=True, read=True, context=database.context)


def opened(future: Any, shape: tuple[int, ...]) -> Any:
    """Returns an opened array, and checks its shape before any byte of it is read: it could claim to have any size.

    Raises:
      ValueError: it has another shape, or cannot be opened.
    """
    store = future.result()
    if tuple(store.shape) != shape:
        raise ValueError(f"an array of shape {tuple(store.shape)} instead of {shape}")
    return store


def places_of_values(directory: Any, names: Collection[str], index: str = "") -> Iterator[tuple[str, str, int, int]]:
    """Yields where the values are in these files: the key, the file, the first byte, and the number of bytes.

    Args:
      directory: the directory of the database.
      names: the names of the files.
      index: the directory in it that has the database's own file.

    Raises:
      ValueError: TensorStore cannot read its own index.
    """
    own = directory / index if index else directory
    if not (own / DATABASE).exists():
        return
    context = _context(directory)
    store = ts.KvStore.open(spec_of(directory), context=context).result()
    versions = ts.ocdbt.dump(ts.KvStore.open(spec_of(own), context=context).result()).result()["versions"]
    # Only the last version: the older ones are what earlier commits left.
    nodes = [(versions[-1]["root"]["location"], b"")] if versions and "location" in versions[-1]["root"] else []
    while nodes:
        node, prefix = nodes.pop()
        for entry in ts.ocdbt.dump(store, node=node).result()["entries"]:
            value = _VALUE.fullmatch(entry.get("indirect_value", ""))
            if "location" in entry:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            elif value is not None and value[1] + value[2] in names:
                key = (prefix + entry["key"]).decode(errors="replace")
                yield key, value[1] + value[2], int(value[3]), int(value[4])


# --- writing ---------------------------------------------------------------------------------------------------


def writing(folder: Any) -> Database:
    """Returns the database of a directory to write to; this process writes it, and no other one."""
    base = spec_of(folder)
    spec = {
        "driver": "ocdbt",
        "base": base,
        "config": _CONFIG,
        "assume_config": True,  # otherwise an empty manifest is written first
        "target_data_file_size": _FILE_IN_STORE if is_url(folder) else LARGEST_CHUNK,
        "cache_pool": _CACHE,
    }
    if not is_url(folder):
        # Data files have new names, so they need no rename to be complete; the manifest, which refers to them, does.
        spec |= {"base": base | {"file_io_locking": {"mode": "non_atomic"}}, "manifest": base}
    return Database(spec, _context(folder, _WRITING))


def writing_apart(folder: Any, own: str) -> Database:
    """Returns a database whose data is in a directory of its own below the folder, and whose own file is in memory.

    The data's places are relative to the folder, so the file can be written there, for Orbax, and in the directory, by
    whom it is read with `reading(folder, own)`.  `in_memory` returns it.
    """
    database = writing(folder)
    prefixes = ("value_data_prefix", "btree_node_data_prefix", "version_tree_node_data_prefix")
    return dataclasses.replace(
        database, spec=database.spec | dict.fromkeys(prefixes, f"{own}/d/") | {"manifest": {"driver": "memory"}}
    )


def in_memory(database: Database) -> bytes:
    """Returns the file of a database that keeps it in memory."""
    store = ts.KvStore.open(database.spec["manifest"], context=database.context).result()
    return bytes(store.read(DATABASE).result().value)


def has_data(database: Database) -> bool:
    """Returns whether anything was written to a database."""
    base = ts.KvStore.open(database.spec.get("manifest", database.spec["base"]), context=database.context).result()
    return bool(base.read(DATABASE, byte_range=slice(0, 0)).result().state != "missing")


def merge(database: Database, parts: Sequence[Database]) -> None:
    """Makes a database of several others, whose data stays where it is: below the same directory."""
    transaction = ts.Transaction(atomic=True)
    opening = [ts.KvStore.open(each.spec, context=database.context) for each in (database, *parts)]
    whole, *others = [future.result() for future in opening]
    for copied in [other.experimental_copy_range_to(whole.with_transaction(transaction)) for other in others]:
        copied.result()
    transaction.commit_sync()


class Commit:
    """What is written together: afterwards either all of it is in the database, or nothing.

    Args:
      database: from `writing`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
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
            "kvstore": self._database.spec | {"path": name},
            "dtype": _name_of(np.dtype(dtype)),
            # Without compression: weights hardly shrink, and it takes most of the time.
            "metadata": {"shape": shape, "chunks": chunks, "compressor": None},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            # Zeros too, so that what is missing can be distinguished from what is zero.
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, create=True, open=True, context=self._database.context, transaction=self._transaction)

    def done(self) -> None:
        """Writes everything, and waits for it; on a disk, to the system's cache."""
        self._transaction.commit_sync()


@functools.cache
def _name_of(dtype: np.dtype) -> str:
    return dtype.name  # NumPy makes this text at each access


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
