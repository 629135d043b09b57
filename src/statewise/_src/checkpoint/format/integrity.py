"""Finding what is corrupted in a checkpoint: which files, and which leaves.

Files are compared with the manifest before anything else is read; arrays with their sums, afterwards.  If something is
wrong, every requested leaf is read again, by itself, so that the error can name the affected ones.  That does not use
Orbax, because its own index may be what is corrupted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from statewise._src.checkpoint.format.checksums import Sums, sums_of
from statewise._src.checkpoint.format.files import sha256_of
from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.format.parse import is_plain_file
from statewise._src.checkpoint.orbax.database import open_stored, opened, reading
from statewise._src.checkpoint.orbax.epath import size_of
from statewise._src.checkpoint.orbax.store_errors import StoreError
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.common.paths import Leaf
from statewise.errors import CorruptedError

__all__ = ["corrupted", "corrupted_files", "is_whole", "stored_array"]

# How many objects of a store are looked at, at the same time.
_AT_ONCE = 16


def corrupted_files(folder: Any, manifest: Manifest) -> list[str]:
    """Returns what is wrong with the files: missing ones, other sizes, other contents of small ones."""
    if not isinstance(folder, StorePath):
        return [wrong for name, facts in manifest.files.items() if (wrong := _wrong(folder / name, name, facts))]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "statewise-check") as pool:  # each request takes its time
        return list(
            filter(None, pool.map(lambda name: _wrong(folder / name, name, manifest.files[name]), manifest.files))
        )


def _wrong(path: Any, name: str, facts: Mapping[str, Any]) -> str:
    """Returns what is wrong with a file; empty if nothing is."""
    try:
        if isinstance(path, StorePath):
            return _wrong_in_store(path, name, facts)
        size = size_of(path)
        if not is_plain_file(path):
            return f"{name} is not a file"
        if size != facts["bytes"]:
            return f"{name} has {size} bytes, not {facts['bytes']}"
        if "sha256" in facts and sha256_of(path, facts.get("parts")) != facts["sha256"]:
            return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except StoreError as error:
        if error.is_refusal:
            raise
        return f"{name} cannot be read: {error.strerror}"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return ""


def _wrong_in_store(path: StorePath, name: str, facts: Mapping[str, Any]) -> str:
    """Returns what is wrong with an object, whose size the store does not tell: its last byte has to be its last."""
    size = facts["bytes"]
    if path.read_range(size, size + 1) is not None:
        return f"{name} has more than {size} bytes"
    if size and path.read_range(size - 1, size) is None:
        return f"{name} has fewer than {size} bytes"
    if "sha256" in facts and sha256_of(path, facts.get("parts", [[0, size]])) != facts["sha256"]:
        return f"{name} is not what was written"
    return ""


def corrupted(
    folder: Any, manifest: Manifest, files: Sequence[str], records: Sequence[LeafRecord], error: Exception | None = None
) -> CorruptedError:
    """Returns the error for a corrupted checkpoint, with those of these leaves that are affected."""
    broken = _broken(folder, manifest, records)
    what = "; ".join(files[:5]) + (f"; and {len(files) - 5} files more" if len(files) > 5 else "")
    if not what:
        what = "arrays cannot be read" if broken else f"Orbax could not read it: {str(error).splitlines()[0][:200]}"
    return CorruptedError(f"{folder} is corrupted: {what}.", leaves=broken, hint="restore another checkpoint")


def _broken(folder: Any, manifest: Manifest, records: Sequence[LeafRecord]) -> list[Leaf]:
    database = reading(folder, manifest.index)
    read: dict[tuple[str, ...], Any] = {}
    leaves = []
    for record in records:
        stored = [place for array in record.arrays if (place := manifest.stored(array)) is not None]
        for key, shape, _ in stored:
            with contextlib.suppress(ValueError, OSError):  # how TensorStore reports what it cannot read
                if key not in read:
                    read[key] = opened(open_stored(database, key), shape).read().result()
        if any(key not in read for key, *_ in stored):
            leaves.append(record.leaf("cannot be read"))
        elif not all(is_whole(stored_array(array, manifest, read), array) for array in record.arrays):
            leaves.append(record.leaf("is not what was saved"))
        for array in record.arrays:
            read.pop(array.key or (), None)  # the next leaves need only the buffers
    return leaves


def stored_array(record: ArrayRecord, manifest: Manifest, read: Mapping[tuple[str, ...], Any]) -> Any:
    """Returns an array as it is stored, from what was read, by key."""
    shape, dtype = record.on_disk
    if record.key is not None:
        return read[record.key]
    if record.buffer is None:
        return np.zeros(shape, dtype_of(dtype))
    number, start = record.buffer
    flat = np.array(read[manifest.buffers[number].key].reshape(-1)[start : start + math.prod(shape)])
    # A buffer that is too short gives too few elements, which `is_whole` then rejects.
    return flat.reshape(shape) if flat.size == math.prod(shape) else flat


def is_whole(array: Any, record: ArrayRecord, known: Sums | None = None) -> bool:
    """Returns whether an array is what was stored; its sums need not be computed if they are known."""
    if not isinstance(array, (jax.Array, np.ndarray)):  # Orbax returns its argument if it has nothing to read
        return False
    shape, dtype = record.on_disk
    return array.shape == shape and array.dtype == dtype_of(dtype) and (known or sums_of(array)) == record.sums
