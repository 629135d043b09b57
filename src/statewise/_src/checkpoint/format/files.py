"""The files of a checkpoint, and the checks that they are what was written.

A small file has a SHA-256.  Most of a large file is arrays, which have checksums of their own, compared when an array
has been read; a second pass over the file would take the same time again.  The bytes between and after the arrays, such
as the database's index, have a SHA-256.  So no bit of a checkpoint can change unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.orbax.database import places_of_values
from statewise._src.checkpoint.orbax.epath import size_of

__all__ = ["HASHED", "files_of", "sha256_of"]

# Files up to this size have a SHA-256 of all their bytes.
SMALL_FILE = 1024 * 1024
# No file has a SHA-256 of more than this: checking it would take seconds, and for a forged size hours.
HASHED = 1 << 30
# If a state is a complete checkpoint, Orbax keeps the times of its commit beside it, and writes them last.
_OF_ORBAX = "_CHECKPOINT_METADATA"

Parts = Sequence[Sequence[int]]


def files_of(directory: Any) -> dict[str, dict[str, Any]]:
    """Returns every file below a directory as the manifest has it, without the manifest and files that change later.

    Returns:
      by their paths within: `bytes`, and `sha256`, of the complete file or of its `parts`.
    """
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
    ends: dict[str, int] = {}
    parts: dict[str, list[list[int]]] = {}
    # Sorted, the arrays of a file come one after the other: a part is what is between one's end and the next one.
    for name, start, length in sorted(places_of_values(directory, sizes)):
        end = ends.get(name, 0)
        if start > end:
            parts.setdefault(name, []).append([end, start - end])
        ends[name] = max(end, start + length)
    for name, end in ends.items():
        if end < sizes[name]:
            parts.setdefault(name, []).append([end, sizes[name] - end])
    return {name: parts.get(name, []) for name in ends}
