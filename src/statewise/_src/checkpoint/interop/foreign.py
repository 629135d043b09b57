"""What others wrote: safetensors files and plain Orbax checkpoints, each as a `Source`.

What is corrupted is a `CorruptedError`, what is no checkpoint at all a `RestoreError`; nothing in a file is believed
before it was checked, and nothing is run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Collection, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.interop.recognize import recognized, within
from statewise._src.checkpoint.interop.sources import Source, SourceArray, is_linen
from statewise._src.checkpoint.orbax.paths import check_usable, place_of
from statewise._src.checkpoint.orbax.write import tree_handler
from statewise._src.common.paths import Leaf, format_path, plain_key
from statewise.errors import CorruptedError, RestoreError, StatewiseError

__all__ = [
    "SAFETENSORS_DTYPES",
    "foreign_leaves",
    "is_foreign",
    "items_with",
    "open_path",
    "safetensors_package",
]

# Of a safetensors file, by the format's codes; those that are missing here have no dtype in JAX.
SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
ORBAX_FILE = "_METADATA"


# --- which -----------------------------------------------------------------------------------------------------


def is_foreign(path: Any) -> bool:
    """Whether something stands at a path that is no checkpoint of Statewise, but that `open_path` may read."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    folder = place_of(path)
    return folder.is_file() or (
        folder.is_dir() and not items_with(folder, NAME) and bool(items_with(folder, ORBAX_FILE))
    )


def open_path(path: Any) -> Source:
    """Opens a safetensors file, or a plain Orbax checkpoint.

    Raises:
      RestoreError: there is nothing, or nothing that is known here.
      CorruptedError: it is not what was written.
    """
    folder = place_of(path, "sw.convert('run/checkpoint', dst)")
    if not folder.exists():
        raise RestoreError(
            f"There is nothing at {folder}.", hint="the path of a checkpoint's directory, or of a .safetensors file"
        )
    if folder.is_file():
        return _open_safetensors(FilePath(os.fspath(folder)))
    items = items_with(folder, ORBAX_FILE)
    if len(items) == 1:
        return _open_orbax(items[0])
    if items:
        raise RestoreError(
            f"{folder} holds several items: {', '.join(item.name for item in items)}.",
            hint=f"the path of one of them: {str(items[0])!r}",
        )
    steps = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and items_with(entry, ORBAX_FILE)]
    if steps:
        raise RestoreError(f"{folder} holds several steps.", hint=f"the path of one of them: {str(steps[-1])!r}")
    inside = within(folder)
    raise RestoreError(
        f"{folder} is no checkpoint that is known here: it has neither {NAME} nor Orbax's {ORBAX_FILE}"
        + (f", but it {inside.what}." if inside else "."),
        hint=inside.hint if inside else "a checkpoint of Statewise, a plain Orbax checkpoint, or a .safetensors file",
    )


def items_with(folder: Any, name: str) -> list[Any]:
    """The folder itself if it has a file of this name; otherwise its folders that do: a step's items."""
    if (folder / name).exists():
        return [folder]
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and (entry / name).exists())


def foreign_leaves(path: Any) -> list[Leaf]:
    """The leaves of what others wrote, each with a kind; reads no array.

    A safetensors file that Statewise wrote tells the kinds; of Linen's variables each collection is one; anything else
    is of one kind, `arrays`.
    """
    source = open_path(path)
    linen = is_linen(source.entries)
    return [
        dataclasses.replace(entry.leaf(), kind=entry.kind or (str(entry.path[0]) if linen else "arrays"))
        for entry in source.entries
    ]


# --- safetensors -----------------------------------------------------------------------------------------------


def safetensors_package() -> Any:
    """The package `safetensors`, which is optional.

    Raises:
      StatewiseError: it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise StatewiseError(
            "safetensors files need the package safetensors, which is not installed.",
            hint="pip install 'statewise[safetensors]'",
        ) from error
    return safetensors


def _open_safetensors(path: FilePath) -> Source:
    package = safetensors_package()
    try:
        # Checks the whole header: that it is JSON, and that the arrays lie one after the other, to the file's end.
        with package.safe_open(path, framework="np") as file:
            told = _told((file.metadata() or {}).get("statewise"))
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
    except (package.SafetensorError, OSError, ValueError) as error:
        _check_other(path)
        raise CorruptedError(
            f"{path} is corrupted, or no safetensors file: {_first_line(error)}.",
            hint="fetch or write it again; sw.convert reads checkpoints of Statewise, of Orbax, and .safetensors files",
        ) from error
    header.pop("__metadata__", None)
    entries = [
        SourceArray(
            name,
            tuple(name.split(".")),
            tuple(facts["shape"]),
            SAFETENSORS_DTYPES.get(facts["dtype"], facts["dtype"]),
            **told.get(name, {}),
        )
        for name, facts in header.items()
    ]
    dtypes = {entry.name: entry.dtype for entry in entries}

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        arrays = {}
        with path.open("rb") as raw:
            for name in names:
                # Not through the package: its NumPy side knows no float8, its Flax side makes 32 bits of 64.
                start, stop = header[name]["data_offsets"]
                raw.seek(8 + length + start)
                data = np.fromfile(raw, np.uint8, stop - start)
                if data.size != stop - start:
                    raise CorruptedError(f"{path} is corrupted: it has become shorter.", hint="fetch or write it again")
                dtype = dtype_of(dtypes[name])
                assert dtype is not None, "a dtype that JAX lacks fits no leaf"
                arrays[name] = data.view(dtype).reshape(header[name]["shape"])
        return arrays

    return Source(str(path), "safetensors", tuple(entries), read)


def _check_other(path: FilePath) -> None:
    """Raises where a file is of another format: then it is not corrupted."""
    try:
        found = recognized(path)
    except OSError:
        return  # which is what is said of it then
    if found.certain or not (path.name.endswith(".safetensors") or found.what == "a safetensors file"):
        raise RestoreError(f"{path} is not a checkpoint, but {found.what}.", hint=found.hint)


def _told(text: str | None) -> dict[str, dict[str, Any]]:
    """What a file that Statewise wrote says of its leaves: kind, type, PRNG.  Nothing where it is odd."""
    try:
        leaves = json.loads(text or "{}")["leaves"]
        return {
            name: {field: facts[field] for field in ("kind", "type", "prng") if isinstance(facts.get(field), str)}
            for name, facts in leaves.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200].rstrip(".")


# --- Orbax -----------------------------------------------------------------------------------------------------


def _open_orbax(folder: Any) -> Source:
    check_usable(folder)
    handler = tree_handler()
    try:
        tree = handler.metadata(folder)
        tree = getattr(tree, "tree", tree)
    except Exception as error:  # Orbax raises what it likes for what it cannot read
        raise CorruptedError(
            f"{folder} is corrupted: Orbax cannot read its metadata: {_first_line(error)}.",
            hint="convert another checkpoint",
        ) from error
    finally:
        handler.close()
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_value)
    paths = [tuple(map(plain_key, keys)) for keys, _ in flat]
    entries, others = [], []
    for path, (_, value) in zip(paths, flat, strict=True):
        if getattr(value, "shape", None) is not None and getattr(value, "dtype", None) is not None:
            entries.append(SourceArray(format_path(path), path, tuple(value.shape), str(np.dtype(value.dtype))))
        elif value is not None and not isinstance(value, dict):
            others.append(format_path(path))

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        return _read_orbax(folder, structure, [format_path(path) for path in paths], entries, names)

    return Source(str(folder), "orbax", tuple(entries), read, tuple(others))


def _is_value(node: Any) -> bool:
    return not isinstance(node, (dict, list, tuple)) or not node


def _read_orbax(
    folder: Any, structure: Any, order: Sequence[str], entries: Sequence[SourceArray], names: Collection[str]
) -> dict[str, np.ndarray]:
    if not names:
        return {}
    dtypes = {entry.name: dtype_of(entry.dtype) for entry in entries if entry.name in set(names)}
    item = [np.empty((), dtypes[name]) if name in dtypes else ocp.PLACEHOLDER for name in order]
    how = [ocp.RestoreArgs(restore_type=np.ndarray) if name in dtypes else ocp.RestoreArgs() for name in order]
    handler = tree_handler()
    try:
        read = handler.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                jax.tree_util.tree_unflatten(structure, item),
                restore_args=jax.tree_util.tree_unflatten(structure, how),
            ),
        )
    except Exception as error:  # Orbax and TensorStore raise what they like for what they cannot read
        raise CorruptedError(
            f"{folder} is corrupted: Orbax cannot read its arrays: {_first_line(error)}.",
            hint="convert another checkpoint",
        ) from error
    finally:
        handler.close()
    values = structure.flatten_up_to(read)
    arrays = {name: np.asarray(value) for name, value in zip(order, values, strict=True) if name in dtypes}
    odd = [
        entry.leaf("is not what was saved")
        for entry in entries
        if entry.name in arrays
        and (arrays[entry.name].shape != entry.shape or str(arrays[entry.name].dtype) != entry.dtype)
    ]
    if odd:
        raise CorruptedError(f"{folder} is corrupted.", leaves=odd, hint="convert another checkpoint")
    return arrays
