"""The files of a checkpoint, and the checks that they are what was written.

A small file has a SHA-256.  Most of a large file is arrays, which have checksums of their own, compared when an array
has been read; a second pass over the file would take the same time again.  The bytes between and after the arrays, such
as the database's index, have a SHA-256.  So no bit of a checkpoint can change unnoticed.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.orbax.database import places_of_values
from statewise._src.checkpoint.orbax.epath import size_of
from statewise._src.checkpoint.orbax.store_errors import store_errors
from statewise._src.checkpoint.orbax.stores import StorePath, listing

__all__ = ["HASHED", "files_of", "sha256_of"]

# Files up to this size have a SHA-256 of all their bytes.
SMALL_FILE = 1024 * 1024
# No file has a SHA-256 of more than this: checking it would take seconds, and for a forged size hours.
HASHED = 1 << 30
# If a state is a complete checkpoint, Orbax keeps the times of its commit beside it, and writes them last.
_OF_ORBAX = "_CHECKPOINT_METADATA"
# How many objects of a store are looked at, at the same time.
_AT_ONCE = 16

Parts = Sequence[Sequence[int]]


def files_of(directory: Any, own: str = "") -> dict[str, dict[str, Any]]:
    """Returns every file below a directory as the manifest has it, without the manifest and files that change later.

    Args:
      directory: the checkpoint's directory.
      own: in an object store, the directory in it that its writer has; what other writers left there is not listed.

    Returns:
      by their paths within: `bytes`, and `sha256`, of the complete file or of its `parts`.
    """
    if isinstance(directory, StorePath):
        return _objects_of(directory, own)
    files: dict[str, Any] = {}
    folders = [(directory, "")]
    while folders:
        folder, prefix = folders.pop()
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                folders.append((entry, f"{name}/"))
            elif name not in (NAME, _OF_ORBAX):
                files[name] = entry
    sizes = {name: size_of(entry) for name, entry in files.items()}
    large = {name: size for name, size in sizes.items() if size > SMALL_FILE}
    parts = _without_arrays(directory, large) if large else {}
    return {name: _facts(entry, sizes[name], parts.get(name)) for name, entry in files.items()}


def _objects_of(directory: StorePath, own: str) -> dict[str, dict[str, Any]]:
    """Returns the objects below a path of a store, which does not tell their sizes: what is read of them does."""
    below = directory / own if own else directory
    prefix = f"{own}/" if own else ""
    names = [name for name in (f"{prefix}{each}" for each in listing(below)) if name not in (NAME, _OF_ORBAX)]
    ends: dict[str, int] = {}
    values: dict[str, list[tuple[int, int]]] = {}
    with store_errors():
        for _, name, start, length in places_of_values(directory, names, own):
            values.setdefault(name, []).append((start, length))
            ends[name] = max(ends.get(name, 0), start + length)

    def facts(name: str) -> dict[str, Any]:
        path, end = directory / name, ends.get(name, 0)
        if end <= SMALL_FILE:
            data = path.read_bytes()
            return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        size = end - 1 + len(path.read_range(end - 1, None) or b"")
        return _facts(path, size, _between(values[name], size))

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "statewise-files") as pool:
        return dict(zip(names, pool.map(facts, names), strict=True))


def _facts(path: Any, size: int, parts: Parts | None) -> dict[str, Any]:
    if parts is None:
        return {"bytes": size} | ({"sha256": sha256_of(path)} if size <= HASHED else {})
    if not 0 < sum(length for _, length in parts) <= HASHED:
        return {"bytes": size}
    return {"bytes": size, "sha256": sha256_of(path, parts), "parts": parts}


def sha256_of(path: Any, parts: Parts | None = None) -> str:
    """Returns the SHA-256 of a file, or of parts of it, one after the other: for each its first byte and its length."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        # In blocks, so that a large file is never in memory as a whole.
        for start, length in [(0, HASHED + 1)] if parts is None else parts:
            file.seek(start)
            left = length
            while left > 0 and (data := file.read(min(left, SMALL_FILE))):
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()


def _without_arrays(directory: Any, sizes: Mapping[str, int]) -> dict[str, list[list[int]]]:
    """Returns the parts of each of these files that are not an array's; no entry for a file without arrays."""
    values: dict[str, list[tuple[int, int]]] = {}
    for _, name, start, length in places_of_values(directory, sizes):
        values.setdefault(name, []).append((start, length))
    return {name: _between(places, sizes[name]) for name, places in values.items()}


def _between(places: Sequence[tuple[int, int]], size: int) -> list[list[int]]:
    """Returns the parts of a file of this size that are between these places, and after them."""
    parts, end = [], 0
    # Sorted, the arrays of a file come one after the other: a part is what is between one's end and the next one.
    for start, length in sorted(places):
        if start > end:
            parts.append([end, start - end])
        end = max(end, start + length)
    return [*parts, [end, size - end]] if end < size else parts
