"""Writing a tree of arrays as Orbax writes one, so that Orbax reads it: its database, and the index beside it.

Orbax waits for each array on its own, in an event loop: for a thousand small ones, that is nine tenths of the time.
Here TensorStore, which stores Orbax's arrays, gets a thousand of them at the same time, and commits them as one.  What
is on disk afterwards is what Orbax reads: each array under its own path, with Orbax's specification.

If several processes write, each writes its parts into a database of its own, below the checkpoint, and one of them puts
these together: the database of all refers to the data of each, which stays where it is.  What several processes hold is
written by one of them, by turns.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import base64
import concurrent.futures
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from statewise._src.checkpoint.format.checksums import Pieces, Sums, added, held, sums_of
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.checkpoint.orbax.database import (
    DATABASE,
    Commit,
    Database,
    chunks_of,
    has_data,
    in_memory,
    merge,
    writing,
    writing_apart,
)
from statewise._src.checkpoint.orbax.flush import flush
from statewise._src.checkpoint.orbax.parts import holders
from statewise._src.checkpoint.orbax.stores import StorePath, is_url, write_all

__all__ = ["TreeWriter", "tree_handler"]

# The number of bytes committed together: a commit rewrites the database's index, and then its file is flushed.
_AT_ONCE = 1 << 27
# Orbax's index of the tree, and its file with the shardings of the arrays.
_INDEX, _SHARDINGS = "_METADATA", "_sharding"
# Orbax's name of the directory in which one of several processes writes, up to its number.
_PART = "ocdbt.process_"
# The file with the checksums of the parts that one of several processes has written, until they are added up.
_SUMS = "sums.json"
# The number of processes whose directories are looked into at the same time.
_PARTS_AT_ONCE = 16
# Orbax's number for a key of a dict, among the keys of a path.
_DICT_KEY = 2


class _Array(NamedTuple):
    """An array to be written: its name in the database, and its values on the host."""

    name: str
    host: np.ndarray | Pieces

    @property
    def nbytes(self) -> int:
        """Returns its size in bytes."""
        return sum(part.nbytes for _, part in self.parts())

    def parts(self) -> tuple[tuple[tuple[int, ...], np.ndarray], ...]:
        """Returns for each piece its first index along each axis, and the piece; all pieces have one shape."""
        return self.host.parts if isinstance(self.host, Pieces) else (((0,) * self.host.ndim, self.host),)


class TreeWriter:
    """Writes a tree of arrays, with the values that they have when the writer is made.

    Args:
      tree: nested dicts of JAX's and NumPy's arrays, not empty.
      own: in an object store, the directory below the checkpoint that this writer has, if others may write there too.
      wrote: is called with a number of bytes whenever this many more are written.

    Attributes:
      for_orbax: the files that Orbax looks for at the path itself, if the writer has its own directory; when it has
        written.
    """

    def __init__(
        self, tree: Mapping[str, Any], own: str = "", wrote: Callable[[int], None] = lambda size: None
    ) -> None:
        flat = dict(sorted(traverse_util.flatten_dict(tree).items()))
        self._own, self._wrote = own, wrote
        self.for_orbax: Mapping[str, bytes] = {}
        self._several = jax.process_count() > 1
        # Their values are taken here, because a later step may donate the arrays.
        parts = ((".".join(key), _held_here(array, number)) for number, (key, array) in enumerate(flat.items()))
        self._arrays = [_Array(name, host) for name, host in parts if host is not None]
        of_jax = {key: array for key, array in flat.items() if isinstance(array, jax.Array)}
        self._types = {key: "jax.Array" if key in of_jax else "np.ndarray" for key in flat}
        self._shardings = {".".join(key): array.sharding for key, array in of_jax.items()}

    def write(self, directory: Any) -> None:
        """Writes what this process writes, into a directory that exists; in any thread."""
        if not self._several:
            database = self._whole(directory)
            self._write_arrays(database, directory)
            self._write_index(directory, database)
            return
        place = self._part(directory, jax.process_index())
        if not is_url(place):
            place.mkdir(exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(1, "statewise-sums") as pool:
            sums = pool.submit(self._write_sums, place)  # while the arrays are written
            self._write_arrays(writing(place), place)
            sums.result()

    def finish(self, directory: Any) -> Mapping[str, Sums]:
        """Puts together what several processes have written; once, in one of them.

        Returns:
          by its name in the database the checksum of each array; empty if there is one process.
        """
        if not self._several:
            return {}
        whole = self._whole(directory)
        parts = [self._part(directory, number) for number in range(jax.process_count())]
        databases = [writing(part) for part in parts]
        totals: dict[str, Sums] = {}
        with concurrent.futures.ThreadPoolExecutor(_PARTS_AT_ONCE, "statewise-parts") as pool:
            taken = [pool.submit(_taken_sums, part) for part in parts]
            written = pool.map(has_data, databases)
            merge(whole, [database for database, is_written in zip(databases, written, strict=True) if is_written])
            self._write_index(directory, whole)
            for sums in taken:
                for name, more in sums.result().items():
                    totals[name] = added(totals.get(name, (0, 0)), more)
        return totals

    def _write_arrays(self, database: Database, place: Any) -> None:
        flushed = []
        with concurrent.futures.ThreadPoolExecutor(1, "statewise-flushes") as pool:
            for group in grouped(self._arrays, lambda array: array.nbytes, _AT_ONCE):
                _write_together(database, group)
                if not is_url(place):
                    flushed.append(pool.submit(flush, place))  # while the next group goes to the system's cache
                self._wrote(sum(array.nbytes for array in group))
            for each in flushed:
                each.result()

    def _write_sums(self, place: Any) -> None:
        """Writes by name the checksum of the parts of an array that this process writes; all together add up."""
        (place / _SUMS).write_text(json.dumps({array.name: sums_of(array.host) for array in self._arrays}))

    def _whole(self, directory: Any) -> Database:
        return writing_apart(directory, self._own) if self._own else writing(directory)

    def _part(self, directory: Any, number: int) -> Any:
        """Returns the directory in which one of several processes writes."""
        return directory / (f"{self._own}/{number}" if self._own else f"{_PART}{number}")

    def _write_index(self, directory: Any, database: Database) -> None:
        """Writes Orbax's index, and what else of the whole is not written yet."""
        files = {_INDEX: _index_text(self._types).encode()}
        if self._shardings:
            files[_SHARDINGS] = _shardings_text(self._shardings).encode()
        if self._own:
            files[DATABASE] = in_memory(database)
            self.for_orbax = files
        place = directory / self._own if self._own else directory
        if isinstance(place, StorePath):
            write_all(place, files)
            return
        for name, data in files.items():
            (place / name).write_bytes(data)


def _taken_sums(part: Any) -> dict[str, Sums]:
    """Returns what a process has left in its directory, and removes it there: its checksums by name."""
    sums = json.loads((part / _SUMS).read_text())
    (part / _SUMS).unlink()
    return {name: (plain, placed) for name, (plain, placed) in sums.items()}


def _held_here(array: Any, number: int) -> "np.ndarray | Pieces | None":
    """Returns what this process writes of an array; None if that is nothing.

    Args:
      array: the array, of this process or of several.
      number: its number, by which processes that hold the same take turns.
    """
    if jax.process_count() == 1:
        return held(array)
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return held(array) if jax.process_index() == 0 else None  # each process has one, and the first one's is saved
    writers = holders(array.sharding, array.shape)
    mine = [
        shard
        for shard in array.addressable_shards
        if writers[str(shard.index)][number % len(writers[str(shard.index)])] == shard.device
    ]
    if not mine:
        return None
    for shard in mine:
        shard.data.copy_to_host_async()  # otherwise each copy would start only when the one before it has ended
    if array.is_fully_replicated:
        return np.asarray(mine[0].data)
    parts = ((tuple(axis.start or 0 for axis in shard.index), np.asarray(shard.data)) for shard in mine)
    return Pieces(array.shape, tuple(parts))


def _write_together(database: Database, arrays: Sequence[_Array]) -> None:
    """Writes arrays and waits for them; afterwards either all of them are in the database, or none."""
    commit = Commit(database)
    opening = []
    for array in arrays:
        _, part = array.parts()[0]
        chunks = chunks_of(part.shape, part.dtype.itemsize, database.most)
        opening.append(commit.create(array.name, array.host.shape, chunks, part.dtype))
    pieces = []
    for array, future in zip(arrays, opening, strict=True):
        store = future.result()
        for start, part in array.parts():
            place = tuple(slice(first, first + size) for first, size in zip(start, part.shape, strict=True))
            pieces.append(store[place].write(part, can_reference_source_data_indefinitely=True))
    for written in pieces:
        written.result()
    commit.done()


def _index_text(types: Mapping[tuple[str, ...], str]) -> str:
    """Returns Orbax's index of a tree of nested dicts: how each path is made of keys, and the type of its array."""
    entries = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
            "value_metadata": {"value_type": name, "skip_deserialize": False},
        }
        for path, name in types.items()
    }
    facts = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    return json.dumps({"tree_metadata": entries, **facts, "custom_metadata": None})


def _shardings_text(shardings: Mapping[str, jax.sharding.Sharding]) -> str:
    """Returns Orbax's text of the shardings: JSON, by the URL-safe base64 of the array's name."""
    # Many arrays have few shardings: each is written as text once.
    texts = {sharding: _text(sharding) for sharding in dict.fromkeys(shardings.values())}
    names = {base64.urlsafe_b64encode(name.encode()).decode(): texts[shardings[name]] for name in shardings}
    return json.dumps({name: text for name, text in names.items() if text})


def _text(sharding: jax.sharding.Sharding) -> str | None:
    """Returns a sharding as Orbax writes it; None for one that Orbax has no text for."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return ocp.metadata.NamedShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return ocp.metadata.SingleDeviceShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    return None


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Makes Orbax's handler, without compression: weights hardly shrink, and it takes most of the time."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)
