"""Writing a tree of arrays as Orbax writes one, so that Orbax reads it: its database, and the index beside it.

Orbax waits for each array on its own, in an event loop: for a thousand small ones, that is nine tenths of the time.
Here TensorStore, which stores Orbax's arrays, gets a thousand of them at the same time, and commits them as one.  What
is on disk afterwards is what Orbax reads: each array under its own path, with Orbax's specification.  If several
processes write, Orbax itself writes all arrays: it knows which process has which part, and puts the parts together.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from statewise._src.checkpoint.format.checksums import Pieces, held
from statewise._src.checkpoint.orbax.batching import grouped
from statewise._src.checkpoint.orbax.database import DATABASE, Commit, chunks_of, writing
from statewise._src.checkpoint.orbax.epath import epath
from statewise.errors import SaveError

__all__ = ["TreeWriter", "tree_handler", "tree_writer"]

# The number of bytes committed together: a commit holds them all, and rewrites the database's index.
_AT_ONCE = 1 << 28
# Orbax's index of the tree, and its file with the shardings of the arrays.
_INDEX, _SHARDINGS = "_METADATA", "_sharding"
# Orbax's number for a key of a dict, among the keys of a path.
_DICT_KEY = 2


@runtime_checkable
class TreeWriter(Protocol):
    """Writes a tree of arrays, with the values that they have when the writer is made."""

    async def begin(self, directory: Any) -> Sequence[Any]:
        """Starts what the main thread has to start; returns futures to wait for."""

    def write(self, directory: Any) -> None:
        """Writes the rest, into a directory that exists; in any thread."""

    def finish(self, directory: Any) -> None:
        """Puts together what all processes have written; in one of them."""

    def close(self) -> None:
        """Closes what it uses."""


def tree_writer(tree: Mapping[str, Any]) -> TreeWriter:
    """Makes the writer of a tree that contains only JAX's and NumPy's arrays: nested dicts, not empty."""
    return _Alone(tree) if jax.process_count() == 1 else _Together(tree)


# --- one process -------------------------------------------------------------------------------------------------


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


class _Alone:
    """Writes all arrays through TensorStore, and Orbax's index as this process knows it."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        flat = dict(sorted(traverse_util.flatten_dict(tree).items()))
        # Their values are taken here, because a later step may donate the arrays.
        self._arrays = [_Array(".".join(key), held(array)) for key, array in flat.items()]
        of_jax = {key: array for key, array in flat.items() if isinstance(array, jax.Array)}
        self._types = {key: "jax.Array" if key in of_jax else "np.ndarray" for key in flat}
        self._shardings = {".".join(key): array.sharding for key, array in of_jax.items()}

    async def begin(self, directory: Any) -> Sequence[Any]:
        return ()

    def write(self, directory: Any) -> None:
        context = writing()
        for group in grouped(self._arrays, lambda array: array.nbytes, _AT_ONCE):
            _write_together(directory, group, context)
        if self._shardings:
            (directory / _SHARDINGS).write_text(_shardings_text(self._shardings))
        (directory / _INDEX).write_text(_index_text(self._types))

    def finish(self, directory: Any) -> None:
        pass  # it is in one piece already

    def close(self) -> None:
        pass


def _write_together(folder: Any, arrays: Sequence[_Array], context: Any) -> None:
    """Writes arrays and waits for them; afterwards either all of them are in the database, or none."""
    commit = Commit(folder, context)
    opening = []
    for array in arrays:
        _, part = array.parts()[0]
        chunks = chunks_of(part.shape, part.dtype.itemsize)
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


# --- several processes -------------------------------------------------------------------------------------------


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Makes Orbax's handler, without compression: weights hardly shrink, and it takes most of the time."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


class _Together:
    """Has Orbax write all arrays, each process its own parts."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._handler = tree_handler()
        self._tree: Mapping[str, Any] = tree

    async def begin(self, directory: Any) -> Sequence[Any]:
        args = ocp.args.PyTreeSave(self._tree)
        self._tree = {}  # Orbax copies the values before this returns
        return await self._handler.async_save(epath(directory), args=args) or ()

    def write(self, directory: Any) -> None:
        pass

    def finish(self, directory: Any) -> None:
        self._handler.finalize(epath(directory))
        # If Orbax finds nothing to merge, it only logs that.
        if not (directory / DATABASE).exists():
            raise SaveError(
                f"Orbax could not put the checkpoint in {directory} together: it found nothing of its own there.",
                hint="a path of plain letters: 'run/step_100'",
            )

    def close(self) -> None:
        self._handler.close()
