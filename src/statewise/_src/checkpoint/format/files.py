"""The files of a checkpoint, and how each is known to be what was written.

A small file has a SHA-256.  Of a large one most is the arrays', which have checksums of their own, looked at when an
array has been read; a second pass over all of it would take as long again.  What is left between and behind them, the
database's index say, has a SHA-256: so no bit of a checkpoint can change without being noticed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import tensorstore as ts

from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.orbax.paths import spec_of

__all__ = ["HASHED", "files_of", "sha256_of"]

# Files up to this size have a SHA-256 of all their bytes.
SMALL_FILE = 1024 * 1024
# No file has a SHA-256 of more than this: to look for it would take seconds, and a forged one would take hours.
HASHED = 1 << 30
# Where a state is all of a checkpoint, Orbax keeps the times of its commit beside it, and writes them last.
_OF_ORBAX = "_CHECKPOINT_METADATA"
# TensorStore's text for a value that stands in a file: folder, file, where it begins, and its length.
_VALUE = re.compile(r"value:([^:]*):([^:]*):([0-9]+):([0-9]+)")

Parts = Sequence[Sequence[int]]


def files_of(directory: Any) -> dict[str, dict[str, Any]]:
    """Every file below a directory but the manifest and what changes later, as the manifest has it.

    Returns:
      by their paths within: `bytes`, and `sha256`, of the whole file or of its `parts`.
    """
    found: dict[str, Any] = {}
    folders = [(directory, "")]
    while folders:
        folder, prefix = folders.pop()
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                folders.append((entry, f"{name}/"))
            elif name not in (NAME, _OF_ORBAX):
                found[name] = entry
    sizes = {name: entry.stat().length for name, entry in found.items()}
    large = {name: size for name, size in sizes.items() if size > SMALL_FILE}
    apart = _apart_from_arrays(directory, large) if large else {}
    return {name: _facts(entry, sizes[name], apart.get(name)) for name, entry in found.items()}


def _facts(path: Any, size: int, parts: Parts | None) -> dict[str, Any]:
    if parts is None:
        return {"bytes": size} | ({"sha256": sha256_of(path)} if size <= HASHED else {})
    if not 0 < sum(length for _, length in parts) <= HASHED:
        return {"bytes": size}
    return {"bytes": size, "sha256": sha256_of(path, parts), "parts": parts}


def sha256_of(path: Any, parts: Parts | None = None) -> str:
    """The SHA-256 of a file, or of parts of it, one after the other: where each begins, and its length."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start, length in [(0, HASHED + 1)] if parts is None else parts:
            file.seek(start)
            left = length
            while left > 0 and (data := file.read(min(left, SMALL_FILE))):
                digest.update(data)
                left -= len(data)
    return digest.hexdigest()


def _apart_from_arrays(directory: Any, sizes: Mapping[str, int]) -> dict[str, list[list[int]]]:
    """What of each of these files is no array's; nothing for a file in which no array stands."""
    ends: dict[str, int] = {}
    parts: dict[str, list[list[int]]] = {}
    for name, start, length in sorted(_values(directory, sizes)):
        end = ends.get(name, 0)
        if start > end:
            parts.setdefault(name, []).append([end, start - end])
        ends[name] = max(end, start + length)
    for name, end in ends.items():
        if end < sizes[name]:
            parts.setdefault(name, []).append([end, sizes[name] - end])
    return {name: parts.get(name, []) for name in ends}


def _values(directory: Any, names: Collection[str]) -> Iterator[tuple[str, int, int]]:
    """Where in these files the arrays stand: the file, where in it, and how many bytes.

    Raises:
      ValueError: TensorStore cannot read its own index.
    """
    if not (directory / "manifest.ocdbt").exists():
        return
    store = ts.KvStore.open(spec_of(directory)).result()
    versions = ts.ocdbt.dump(store).result()["versions"]
    nodes = [versions[-1]["root"]["location"]] if versions and "location" in versions[-1]["root"] else []
    while nodes:
        for entry in ts.ocdbt.dump(store, node=nodes.pop()).result()["entries"]:
            found = _VALUE.fullmatch(entry.get("indirect_value", ""))
            if "location" in entry:
                nodes.append(entry["location"])
            elif found is not None and found[1] + found[2] in names:
                yield found[1] + found[2], int(found[3]), int(found[4])
