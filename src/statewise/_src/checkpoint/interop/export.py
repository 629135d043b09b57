"""Writing what others read: safetensors files, plain Orbax checkpoints, Linen's variable collections.

Each format has names of its own for the same leaves, and things that it cannot hold.  `add_obstacles` finds all of them
before anything is read or written; `export` writes, so that what has the final name is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from statewise._src.checkpoint.format.keys import OrbaxKeys, type_name
from statewise._src.checkpoint.format.records import _STORABLE
from statewise._src.checkpoint.interop.foreign import SAFETENSORS_DTYPES, safetensors_package
from statewise._src.checkpoint.interop.sources import ARRAY
from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.paths import make_folder, new_place, short_name
from statewise._src.checkpoint.orbax.progress import growing
from statewise._src.checkpoint.orbax.write import tree_handler
from statewise._src.checkpoint.save import flush
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise.errors import SaveError

__all__ = ["FORMATS", "Piece", "add_obstacles", "collection_of", "destination", "export"]

FORMATS = ("statewise", "orbax", "safetensors", "linen")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One array on its way into another format.

    Attributes:
      path: where it stands in what is written; it may lie deeper than its leaf's path.
      leaf: its leaf.
      dtype: its dtype's name, as it is written; of PRNG keys that of their words.
      shape: its shape, as it is written.
      prng: of PRNG keys the implementation.
      source: the name of the entry that it is read from; None where the target's value is kept.
      at: kind and position in the target's state; None without a target.
      note: what to say of it.
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
    """The Linen collection in which NNX has Variables of a type, given as a type or by its name; None for raw arrays.

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
        if module == "collection":  # of a leaf of which nothing else is known
            return name
        # Looked up, never imported: a name on disk must not run code.
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            # Not by getattr: a module may import what it is asked for.
            found = vars(found).get(part) if isinstance(found, (ModuleType, type)) else None
        if not isinstance(found, type):
            return name.rpartition(".")[2] or None
        cls = found
    if not issubclass(cls, nnx.Variable):
        return None
    try:
        return str(nnx.variable_name_from_type(cls))
    except ValueError:  # what NNX itself would call it
        return cls.__name__


# --- what is in the way ----------------------------------------------------------------------------------------


def add_obstacles(problems: Problems, to: str, pieces: Sequence[Piece]) -> None:
    """Adds the leaves that a format cannot hold."""
    if to == "statewise":
        return
    dtypes = SAFETENSORS_DTYPES.values() if to == "safetensors" else _STORABLE
    keys = keys_of(to, pieces)
    first: dict[str, Piece] = {}
    inner = {key[:depth]: piece for key, piece in zip(keys, pieces, strict=True) if key for depth in range(1, len(key))}
    for key, piece in zip(keys, pieces, strict=True):
        if piece.dtype not in dtypes:
            title = "safetensors" if to == "safetensors" else "Orbax"
            problems.add(
                piece.leaf,
                f"{title} has no {piece.dtype}",
                f"state.cast(...) to a dtype that it has, or leave it out: rename={{{piece.source!r}: None}}",
            )
        if key is None:
            problems.add(
                piece.leaf,
                "is no Variable, so that it belongs to no Linen collection",
                f"hold it in an nnx.Variable, or leave it out: rename={{{piece.source!r}: None}}",
            )
            continue
        if not _is_utf8("".join(key)):
            problems.add(piece.leaf, "has a name that is not UTF-8", _RENAME_ONE)
            continue
        other = first.setdefault(".".join(key), piece)  # which is how Orbax writes a key
        if other is not piece:
            problems.add(piece.leaf, f"would have the same name as {format_path(other.path)}", _RENAME)
        elif key in inner:
            problems.add(piece.leaf, f"would stand where {format_path(inner[key].path)} hangs below", _RENAME)
        elif key == ("__metadata__",) and to == "safetensors":
            problems.add(piece.leaf, "has a name that safetensors keeps for itself", _RENAME)


_RENAME_ONE = "give it another name: rename={'name in the source': 'another/path'}"
_RENAME = "give them names that differ: rename={'name in the source': 'another/path'}"


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def keys_of(to: str, pieces: Sequence[Piece]) -> list[tuple[str, ...] | None]:
    """What each array is called in a format; None where it has no name for it."""
    if to == "safetensors":
        return [(safetensors_name(piece.path),) for piece in pieces]
    if to == "linen":
        collections = [collection_of(piece.leaf.type) for piece in pieces]
        return [
            None if name is None else (name, *map(str, piece.path))
            for name, piece in zip(collections, pieces, strict=True)
        ]
    orbax = OrbaxKeys()
    return [orbax.key(piece.path) for piece in pieces]


def safetensors_name(path: Path) -> str:
    """A path as a safetensors file names it: `layers.0.kernel`."""
    return ".".join(map(str, path))


# --- writing ---------------------------------------------------------------------------------------------------


def destination(path: Any, to: str = "orbax") -> FilePath:
    """Where to write.

    Raises:
      SaveError: there is something already, or it cannot be written to.
    """
    return new_place(
        path,
        arrays=to != "safetensors",
        example="sw.convert(src, 'run/converted')",
        store="convert to a local path, and copy what is there then",
        taken="another path",
    )


def export(to: str, final: FilePath | None, pieces: Sequence[Piece], arrays: Sequence[np.ndarray]) -> Any:
    """Writes arrays in a format; gives the nested dict where there is no place to write to.

    Raises:
      SaveError: it could not be written; nothing of it was left.
    """
    keys = [key for key in keys_of(to, pieces) if key is not None]
    if to == "safetensors":
        assert final is not None, "a safetensors file has a path"
        # In C order, and 0-d arrays as they are, which np.ascontiguousarray would change.
        flat = {key[0]: np.asarray(array, order="C") for key, array in zip(keys, arrays, strict=True)}
        package = safetensors_package()
        with _committed(final, arrays) as place:
            try:
                package.numpy.save_file(flat, place, metadata={"statewise": _told(keys, pieces)})
            except package.SafetensorError as error:  # of the file system: dtypes were looked at before
                raise OSError(str(error)) from error
        return None
    tree: dict[str, Any] = {}
    for (*nodes, last), array in zip(keys, arrays, strict=True):
        if final is None or array.size:  # Orbax stores no array without elements
            node = tree
            for name in nodes:
                node = node.setdefault(name, {})
            node[last] = np.asarray(array)
    if final is None:
        return tree
    if not tree:
        raise SaveError(
            f"There is nothing to write to {final}: no array has elements, and Orbax stores no others.",
            hint="sw.convert(src, 'run/converted.safetensors')",
        )
    with _committed(final, arrays) as place, contextlib.closing(ocp.Checkpointer(tree_handler())) as checkpointer:
        checkpointer.save(epath(place), args=ocp.args.PyTreeSave(tree))
    return None


def _told(keys: Sequence[tuple[str, ...]], pieces: Sequence[Piece]) -> str:
    """What the file says of its leaves: kind, type, PRNG implementation, other paths; as JSON."""
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
def _committed(final: FilePath, arrays: Sequence[np.ndarray]) -> Iterator[FilePath]:
    """A place to write arrays to, which has the final name when all went well, and is gone when not."""
    folder = final.parent / f".{short_name(final.name)}.tmp-{secrets.token_hex(4)}"
    place = folder / "converted"  # a name that leaves room for what Orbax adds to it
    try:
        make_folder(folder.parent)
        folder.mkdir()
        with growing(f"writing {final.name}", sum(array.nbytes for array in arrays), lambda: [folder]):
            yield place
        flush(place)
        _give_name(place, final)
    except SaveError:
        raise
    except (OSError, ValueError) as error:  # a ValueError is how TensorStore reports what the file system refuses
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(" [")[0]
        raise SaveError(
            f"{final} could not be written: {reason}. Nothing of it was left.",
            hint="free some space, or choose a directory that can be written to",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _give_name(place: FilePath, final: FilePath) -> None:
    taken = final.exists()
    if not taken and place.is_dir():
        place.rename(final)
    elif not taken:
        try:
            os.link(place, final)  # where a rename would go over what another writer has made this very moment
        except FileExistsError:
            taken = True
        except OSError:  # a file system without links
            place.rename(final)
    if taken:
        raise SaveError(
            f"Another writer has written {final} meanwhile; that one is whole, this one was dropped.",
            hint="another path for each writer",
        )
