"""Writing other formats: safetensors files, plain Orbax checkpoints, Linen's variable collections.

Each format has its own names for the same leaves, and things that it cannot represent.  `add_obstacles` finds all of
these before anything is read or written; `export` writes, and what has the final name is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
from flax import nnx, traverse_util

from statewise._src.checkpoint.format.keys import OrbaxKeys, is_utf8, type_name
from statewise._src.checkpoint.format.records import STORABLE
from statewise._src.checkpoint.interop.safetensors import RESERVED, SAFETENSORS_DTYPES, write_file
from statewise._src.checkpoint.interop.sources import ARRAY
from statewise._src.checkpoint.orbax.flush import make_folder, named
from statewise._src.checkpoint.orbax.paths import new_place
from statewise._src.checkpoint.orbax.plain import write_tree
from statewise._src.checkpoint.orbax.progress import growing
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.checkpoint.store_commit import check_free
from statewise._src.checkpoint.temporary import clear_abandoned, removed_on_failure, temporary_beside
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise.errors import SaveError

__all__ = [
    "FORMATS",
    "Format",
    "Piece",
    "add_obstacles",
    "checkpoint_destination",
    "collection_of",
    "committed",
    "destination",
    "export",
]

Format = Literal["statewise", "orbax", "safetensors", "linen"]
FORMATS: tuple[Format, ...] = get_args(Format)
_log = logging.getLogger("statewise")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One array that is converted into another format.

    Attributes:
      path: its path in what is written; it may be deeper than its leaf's path.
      leaf: its leaf.
      dtype: the name of its dtype, as written; for PRNG keys that of their words.
      shape: its shape, as written.
      prng: for PRNG keys the implementation.
      source: the name of the entry that it is read from; None if the target's value is kept.
      at: kind and position in the target's state; None without a target.
      note: what to say about it.
    """

    path: Path
    leaf: Leaf
    dtype: str
    shape: tuple[int, ...]
    prng: str | None = None
    source: str | None = None
    at: tuple[str, int] | None = None
    note: str = ""


def collection_of(cls: Any) -> str | None:
    """Returns the Linen collection for Variables of a type, which may be given by its name; None for raw arrays.

    Example:
      >>> from flax import nnx
      >>> from statewise._src.checkpoint.interop.export import collection_of
      >>> collection_of(nnx.BatchStat), collection_of("flax.nnx:Param"), collection_of("jax:Array")
      ('batch_stats', 'params', None)
    """
    if isinstance(cls, str):
        module, _, name = cls.partition(":")
        if cls == ARRAY:
            return None
        if module == "collection":  # the collection is all that is known about the leaf
            return name
        # The type is looked up, never imported: a name on disk must not run code.
        value: Any = sys.modules.get(module)
        for part in name.split("."):
            # Not with getattr: a module may import what it is asked for.
            value = vars(value).get(part) if isinstance(value, (ModuleType, type)) else None
        if not isinstance(value, type):
            return name.rpartition(".")[2] or None
        cls = value
    if not issubclass(cls, nnx.Variable):
        return None
    try:
        return str(nnx.variable_name_from_type(cls))
    except ValueError:  # the type is not registered; NNX itself would use this name
        return cls.__name__


# --- what a format cannot represent ----------------------------------------------------------------------------


def add_obstacles(problems: Problems, to: str, pieces: Sequence[Piece]) -> None:
    """Adds the leaves that a format cannot represent."""
    if to == "statewise":
        return
    title, dtypes = ("safetensors", SAFETENSORS_DTYPES.values()) if to == "safetensors" else ("Orbax", STORABLE)
    keys = keys_of(to, pieces)
    first: dict[str, Piece] = {}
    # All prefixes of keys: an array cannot have one of these as its own key.
    inner = {key[:depth]: piece for key, piece in zip(keys, pieces, strict=True) if key for depth in range(1, len(key))}
    for key, piece in zip(keys, pieces, strict=True):
        leave_out = f"or leave it out: rename={{{piece.source!r}: None}}"
        if piece.dtype not in dtypes:
            hint = f"state.cast(...) to a dtype that it has, {leave_out}"
            problems.add(piece.leaf, f"{title} has no {piece.dtype}", hint)
        if key is None:
            note = "is not a Variable, so that it is not in a Linen collection"
            problems.add(piece.leaf, note, f"hold it in an nnx.Variable, {leave_out}")
            continue
        if not is_utf8("".join(key)):
            problems.add(piece.leaf, "has a name that is not UTF-8", _RENAME_ONE)
            continue
        other = first.setdefault(".".join(key), piece)  # Orbax joins the parts of a key with dots
        if other is not piece:
            problems.add(piece.leaf, f"would have the same name as {format_path(other.path)}", _RENAME)
        elif key in inner:
            problems.add(piece.leaf, f"would be a parent of {format_path(inner[key].path)}", _RENAME)
        elif key == (RESERVED,) and to == "safetensors":
            problems.add(piece.leaf, "has a name that safetensors reserves", _RENAME)


_RENAME_ONE = "give it another name: rename={'name in the source': 'another/path'}"
_RENAME = "give them names that differ: rename={'name in the source': 'another/path'}"


def keys_of(to: str, pieces: Sequence[Piece]) -> list[tuple[str, ...] | None]:
    """Returns the key of each array in a format; None for an array that it has no name for."""
    if to == "safetensors":
        return [(safetensors_name(piece.path),) for piece in pieces]
    if to == "linen":
        collections = ((collection_of(piece.leaf.type), piece.path) for piece in pieces)
        return [None if name is None else (name, *map(str, path)) for name, path in collections]
    orbax = OrbaxKeys()
    return [orbax.key(piece.path) for piece in pieces]


def safetensors_name(path: Path) -> str:
    """Returns a path as a safetensors file names it: `layers.0.kernel`."""
    return ".".join(map(str, path))


# --- writing ---------------------------------------------------------------------------------------------------


def destination(path: object, to: str = "orbax") -> FilePath:
    """Returns the path to write another format to, which is not one in an object store.

    Raises:
      SaveError: there is something already, or it cannot be written to.
    """
    example = "sw.convert(src, 'run/converted')"
    store = "convert to a local path, and then copy the result"
    place = new_place(path, arrays=to != "safetensors", example=example, store=store, taken="another path")
    assert isinstance(place, FilePath), "others are refused"
    return place


def checkpoint_destination(path: object) -> FilePath | StorePath:
    """Returns the path to write a checkpoint of Statewise to.

    Raises:
      SaveError: there is something already, or it cannot be written to.
    """
    place = new_place(path, example="sw.convert(src, 'run/converted', target=target)", taken="another path")
    if isinstance(place, StorePath):
        check_free(place)
    return place


def export(to: str, final: FilePath | None, pieces: Sequence[Piece], arrays: Sequence[np.ndarray]) -> Any:
    """Writes arrays in a format; returns the nested dict if there is no path to write to.

    Raises:
      SaveError: it could not be written; the error says whether anything of it is left.
    """
    keys = [key for key in keys_of(to, pieces) if key is not None]
    if to == "safetensors":
        assert final is not None, "a safetensors file has a path"
        flat = {key[0]: array for key, array in zip(keys, arrays, strict=True)}
        with committed(final, sum(array.nbytes for array in arrays)) as place:
            write_file(place, flat, {"statewise": _metadata(keys, pieces)})
        return None
    # Orbax does not store arrays without elements.
    stored = {key: np.asarray(each) for key, each in zip(keys, arrays, strict=True) if final is None or each.size}
    tree = traverse_util.unflatten_dict(stored)
    if final is None:
        return tree
    if not tree:
        raise SaveError(
            f"There is nothing to write to {final}: no array has elements, and Orbax does not store others.",
            hint="sw.convert(src, 'run/converted.safetensors')",
        )
    with committed(final, sum(array.nbytes for array in arrays)) as place:
        write_tree(place, tree)
    return None


def _metadata(keys: Sequence[tuple[str, ...]], pieces: Sequence[Piece]) -> str:
    """Returns what the file says about its leaves, as JSON: kind, type, PRNG implementation, other paths."""
    leaves: dict[str, dict[str, Any]] = {}
    for (name,), piece in zip(keys, pieces, strict=True):
        leaf = piece.leaf
        facts = {
            "kind": leaf.kind,
            "type": leaf.type if isinstance(leaf.type, str) else type_name(leaf.type),
            "prng": piece.prng,
            "aliases": list(map(safetensors_name, leaf.aliases)),
        }
        leaves[name] = {field: fact for field, fact in facts.items() if fact}
    return json.dumps({"format": 1, "leaves": leaves})


@contextlib.contextmanager
def committed(final: FilePath, nbytes: int) -> Iterator[FilePath]:
    """Yields a path to write that many bytes to; afterwards it has the final name, or is removed if that failed."""
    folder = temporary_beside(final)
    place = folder / "converted"  # a short name, because Orbax adds to it
    with removed_on_failure(final, folder):
        make_folder(final.parent)
        clear_abandoned(final)
        folder.mkdir()
        with growing(f"writing {final.name}", nbytes, lambda: [folder]):
            yield place
        with named(place, final):
            _give_name(place, final)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning("%s is complete, but %s is left: %s", final, folder, error.strerror)


def _give_name(place: FilePath, final: FilePath) -> None:
    """Renames what was written, unless another writer has made something with that name."""
    if final.exists():
        raise FileExistsError(final)
    if place.is_dir():
        place.rename(final)
        return
    try:
        os.link(place, final)  # a rename would replace a file that another writer makes at this moment
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        place.rename(final)
