"""Files of other programs: safetensors files and plain Orbax checkpoints, each as a `Source`.

A corrupted one is a `CorruptedError`, something that is not a checkpoint a `RestoreError`.  Nothing in a file is used
before it was checked, and nothing is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.locate import check_finished, is_left
from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.interop.recognize import within
from statewise._src.checkpoint.interop.safetensors import first_line, open_file
from statewise._src.checkpoint.interop.several_files import (
    check_local,
    has_safetensors,
    is_several,
    open_files,
    open_folder,
)
from statewise._src.checkpoint.interop.sources import Source, SourceArray, is_linen
from statewise._src.checkpoint.orbax.epath import with_file
from statewise._src.checkpoint.orbax.paths import check_usable, place_of
from statewise._src.checkpoint.orbax.plain import described_tree, read_tree
from statewise._src.checkpoint.orbax.store_errors import reads, said, unreadable
from statewise._src.checkpoint.orbax.stores import StorePath, copying
from statewise._src.common.paths import Leaf, format_path, plain_key
from statewise._src.common.problems import Problems
from statewise._src.names.names import NamesData
from statewise.errors import CorruptedError, RestoreError

__all__ = ["foreign_leaves", "is_foreign", "only_item", "open_path"]

ORBAX_FILE = "_METADATA"


# --- which -----------------------------------------------------------------------------------------------------


def is_foreign(path: object) -> bool:
    """Returns whether something at a path is not a checkpoint of Statewise, but may be one that `open_path` reads."""
    if is_several(path):
        return True
    if not isinstance(path, (str, os.PathLike)):
        return False
    folder = place_of(path)
    with reads(folder):
        if isinstance(folder, StorePath) and (folder / NAME).is_file():
            return False  # the answer to one request
        if not folder.is_dir():
            return bool(folder.is_file())
        return not _items_with(folder, NAME) and bool(_items_with(folder, ORBAX_FILE) or has_safetensors(folder))


def open_path(path: object) -> Source:
    """Opens safetensors files: one, several, or a folder of them; or a plain Orbax checkpoint.

    Raises:
      RestoreError: there is nothing, or nothing in a known format.
      CorruptedError: it is not what was written.
    """
    if isinstance(path, (list, tuple)):
        return open_files(path)
    folder = place_of(path, "sw.convert('run/checkpoint', dst)")
    with reads(folder):
        return _opened(folder)


def _opened(folder: Any) -> Source:
    if not folder.exists():
        raise RestoreError(
            f"There is nothing at {folder}.", hint="the path of a checkpoint's directory, or of a .safetensors file"
        )
    check_finished(folder)
    if folder.is_file():
        check_local(folder)
        return open_file(FilePath(os.fspath(folder)))
    item = only_item(folder, ORBAX_FILE)
    if item is not None:
        return _open_orbax(item)
    if has_safetensors(folder):
        check_local(folder)
        return open_folder(FilePath(os.fspath(folder)))
    steps = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _items_with(entry, ORBAX_FILE)]
    if steps:
        raise RestoreError(f"{folder} holds several steps.", hint=f"the path of one of them: {str(steps[-1])!r}")
    inside = within(folder)
    raise RestoreError(
        f"{folder} is not a checkpoint in a known format: it has neither {NAME} nor Orbax's {ORBAX_FILE}"
        + (f", but it {inside.what}." if inside else "."),
        hint=inside.hint if inside else "a checkpoint of Statewise, a plain Orbax checkpoint, or a .safetensors file",
    )


def _items_with(folder: Any, name: str) -> list[Any]:
    """Returns the directory itself if it has a file of this name; otherwise its directories that do: a step's items."""
    if (folder / name).exists():
        return [folder]
    return [item for item in with_file(folder, name) if not is_left(f"{item.name}/")]


def only_item(folder: Any, name: str) -> Any:
    """Returns the only item of a directory that has a file of this name, or the directory itself; None if none has.

    Raises:
      RestoreError: several items have one.
    """
    items = _items_with(folder, name)
    if len(items) > 1:
        hint = f"the path of one of them: {str(items[0])!r}"
        raise RestoreError(f"{folder} holds several items: {', '.join(item.name for item in items)}.", hint=hint)
    return items[0] if items else None


def foreign_leaves(path: object, names: NamesData | None = None) -> list[Leaf]:
    """Returns the leaves of another program's file, each with a kind; reads no array.

    A safetensors file that Statewise wrote has the kinds; for Linen's variables each collection is one; anything else
    is of one kind, `arrays`.  With names, arrays that no row is about are of the kind `dropped`.
    """
    source = open_path(path)
    linen = is_linen(source.entries)
    if names is not None:
        kinds = {entry.name: "arrays" if names.rows_about(entry.name) else "dropped" for entry in source.entries}
        return [dataclasses.replace(entry.leaf(), kind=kinds[entry.name]) for entry in source.entries]
    return [
        dataclasses.replace(entry.leaf(), kind=entry.kind or (str(entry.path[0]) if linen else "arrays"))
        for entry in source.entries
    ]


# --- Orbax -----------------------------------------------------------------------------------------------------


def _open_orbax(folder: Any) -> Source:
    check_usable(folder)
    if isinstance(folder, StorePath) and folder.scheme != "gs":
        raise RestoreError(
            f"{folder} is a plain Orbax checkpoint, and Orbax cannot read it from {folder.scheme}://.",
            hint=f"copy it to a disk: {copying(folder)}",
        )
    with _by_orbax(folder, "metadata"):
        tree = described_tree(folder)
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_value)
    paths = [tuple(map(plain_key, keys)) for keys, _ in flat]
    order = list(map(format_path, paths))
    entries, others = [], []
    for name, path, (_, value) in zip(order, paths, flat, strict=True):
        if getattr(value, "shape", None) is not None and getattr(value, "dtype", None) is not None:
            entries.append(SourceArray(name, path, tuple(value.shape), str(np.dtype(value.dtype))))
        elif value is not None and not isinstance(value, dict):
            others.append(name)

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        wanted = [entry for entry in entries if entry.name in set(names)]
        return _read_orbax(folder, structure, order, wanted) if wanted else {}

    return Source(str(folder), "orbax", tuple(entries), read, tuple(others))


def _is_value(node: Any) -> bool:
    return not isinstance(node, (dict, list, tuple)) or not node


@contextlib.contextmanager
def _by_orbax(folder: Any, what: str) -> Iterator[None]:
    """Reports whatever Orbax raises in a block as a corrupted checkpoint, and what a store refuses as what it said."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise any exception for what they cannot read
        if isinstance(folder, StorePath) and said(error).is_refusal:
            raise unreadable(folder, said(error)) from error
        raise CorruptedError(
            f"{folder} is corrupted: Orbax cannot read its {what}: {first_line(error)}.",
            hint="convert another checkpoint",
        ) from error


def _read_orbax(
    folder: Any, structure: Any, order: Sequence[str], wanted: Sequence[SourceArray]
) -> dict[str, np.ndarray]:
    dtypes = {entry.name: dtype_of(entry.dtype) for entry in wanted}
    with _by_orbax(folder, "arrays"):
        read = read_tree(folder, structure, [dtypes.get(name) for name in order])
    arrays = {name: np.asarray(value) for name, value in zip(order, read, strict=True) if name in dtypes}
    problems = Problems()
    for entry in wanted:
        array = arrays[entry.name]
        if array.shape != entry.shape or str(array.dtype) != entry.dtype:
            problems.add(entry.leaf(), "is not what was saved")
    problems.raise_as(CorruptedError, f"{folder} is corrupted.", "convert another checkpoint")
    return arrays
