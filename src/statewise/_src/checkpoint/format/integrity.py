"""Telling what of a checkpoint is corrupted: which files, and which leaves.

Files are compared with what the manifest says of them, before anything else is read; arrays by their sums, afterwards.
Where something is wrong, every leaf that was asked for is read once more, by itself, so that the error can name those
which are affected: without Orbax, whose own index may be what is corrupted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from statewise._src.checkpoint.format.checksums import sums_of
from statewise._src.checkpoint.format.files import sha256_of
from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.format.parse import is_plain_file
from statewise._src.checkpoint.orbax.read import open_stored, opened
from statewise._src.common.paths import Leaf
from statewise.errors import CorruptedError

__all__ = ["corrupted", "corrupted_files", "is_whole", "stored_array"]


def corrupted_files(folder: Any, manifest: Manifest) -> list[str]:
    """What is wrong with the files: missing ones, other sizes, other contents of small ones."""
    wrong = []
    for name, facts in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().length
            if not is_plain_file(path):
                wrong.append(f"{name} is no file")
            elif size != facts["bytes"]:
                wrong.append(f"{name} has {size} bytes, not {facts['bytes']}")
            elif "sha256" in facts and sha256_of(path, facts.get("parts")) != facts["sha256"]:
                wrong.append(f"{name} is not what was written")
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
    return wrong


def corrupted(
    folder: Any, manifest: Manifest, files: Sequence[str], records: Sequence[LeafRecord], error: Exception | None = None
) -> CorruptedError:
    """The error for damage, with those of these leaves that it concerns."""
    broken = _broken(folder, manifest, records)
    what = "; ".join(files[:5]) + (f"; and {len(files) - 5} files more" if len(files) > 5 else "")
    if not what:
        what = "arrays cannot be read" if broken else f"Orbax could not read it: {str(error).splitlines()[0][:200]}"
    return CorruptedError(f"{folder} is corrupted: {what}.", leaves=broken, hint="restore another checkpoint")


def _broken(folder: Any, manifest: Manifest, records: Sequence[LeafRecord]) -> list[Leaf]:
    context = ts.Context()
    read: dict[tuple[str, ...], Any] = {}
    leaves = []
    for record in records:
        keys = {key: shape for one in record.arrays for key, shape in _places(one, manifest)}
        for key, shape in keys.items():
            with contextlib.suppress(ValueError, OSError):  # how TensorStore says that it cannot
                if key not in read:
                    read[key] = opened(open_stored(folder, key, context), shape).read().result()
        if any(key not in read for key in keys):
            leaves.append(record.leaf("cannot be read"))
        elif not all(is_whole(stored_array(one, manifest, read), one) for one in record.arrays):
            leaves.append(record.leaf("is not what was saved"))
        for one in record.arrays:
            read.pop(one.key or (), None)  # the next leaves need only the buffers
    return leaves


def _places(one: ArrayRecord, manifest: Manifest) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The key that an array stands at, and the shape of what is there; nothing for an empty one."""
    if one.buffer is not None:
        buffer = manifest.buffers[one.buffer[0]]
        return [(buffer.key, (buffer.elements,))]
    return [] if one.key is None else [(one.key, one.on_disk[0])]


def stored_array(one: ArrayRecord, manifest: Manifest, read: Mapping[tuple[str, ...], Any]) -> Any:
    """An array as it is stored, out of what was read, by key."""
    shape, dtype = one.on_disk
    if one.key is not None:
        return read[one.key]
    if one.buffer is None:
        return np.zeros(shape, dtype_of(dtype))
    number, start = one.buffer
    flat = np.array(read[manifest.buffers[number].key].reshape(-1)[start : start + math.prod(shape)])
    return flat.reshape(shape) if flat.size == math.prod(shape) else flat


def is_whole(array: Any, one: ArrayRecord) -> bool:
    """Whether an array is what was stored."""
    if not isinstance(array, (jax.Array, np.ndarray)):  # Orbax gives back what it was asked with, where it has nothing
        return False
    shape, dtype = one.on_disk
    return array.shape == shape and array.dtype == dtype_of(dtype) and sums_of(array) == one.sums
