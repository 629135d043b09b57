"""The values of large arrays, read from the files of a disk into the memory that the arrays then have.

TensorStore reads a value into memory of its own, and copies it into an array that JAX then copies as well.  To get that
memory from the system takes longer than to read a file that is in its cache.  Here it is taken once: where the database
says that a file has an array as it is in memory, its bytes are read into an array that JAX uses as its own, and
are summed while they are in the processor's cache.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import concurrent.futures
import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from statewise._src.checkpoint.format.checksums import Sums, added, sums_of_run
from statewise._src.checkpoint.orbax.database import places_of_values
from statewise._src.checkpoint.orbax.stores import is_url

__all__ = ["LARGE", "Coming", "DiskValues"]

# Arrays of this many bytes or more are read here; for smaller ones it takes longer to find where they are.
LARGE = 1 << 20
# The number of bytes that one thread reads, and of them how many at a time, which fit the processor's cache.
_RUN, _AT_ONCE = 1 << 23, 1 << 19
# JAX uses an array's memory as its own if it begins at a multiple of this.
_ALIGNMENT = 64
# More threads than this do not make a disk faster.
_MOST_THREADS = 8


class _Place(NamedTuple):
    """Where a value is: the path of the file, the first byte, and the number of bytes."""

    path: str
    start: int
    size: int


class Coming(NamedTuple):
    """An array that is being read, and the sums of its parts."""

    array: np.ndarray
    parts: list[concurrent.futures.Future[Sums]]

    def result(self) -> tuple[np.ndarray, Sums]:
        """Returns the array and its checksum, when it has been read.

        Raises:
          OSError: the file cannot be read.
          EOFError: it is too short.
        """
        return self.array, functools.reduce(added, [part.result() for part in self.parts])


class DiskValues:
    """The values in the files of a checkpoint on a disk.

    Args:
      folder: the checkpoint's directory.
      files: the sizes of its files, by name; no other file is read.
      index: the directory in it that has the database's own file; empty if it is the folder itself.
    """

    def __init__(self, folder: Any, files: Mapping[str, int], index: str = "") -> None:
        self._folder, self._files, self._index = folder, files, index
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def __enter__(self) -> "DiskValues":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def start(self, name: str, store: Any, part: tuple[slice, ...] = ()) -> Coming | None:
        """Starts to read an array, or a part of it.

        Args:
          name: its key in the database.
          store: the array, as TensorStore has opened it.
          part: the part to read; the whole array if it is empty.

        Returns:
          the array that is coming; None if it is small, or no file has it as it is in memory.
        """
        count, end = _chunks_in_memory(store)
        # A corrupted description could have any number of chunks.
        if not count or is_url(self._folder) or count > len(self._places):
            return None
        numbers = _chunks_of(part, store.shape, store.shape[0] // count)
        places = [self._places.get(f"{name}/{number}{end}") for number in numbers]
        dtype = store.dtype.numpy_dtype
        size = math.prod(store.shape) * dtype.itemsize // count
        if not places or any(place is None or place.size != size for place in places):
            return None
        if self._pool is None:
            threads = min(_MOST_THREADS, os.cpu_count() or 1)
            self._pool = concurrent.futures.ThreadPoolExecutor(threads, "statewise-read")
        flat = _empty(len(places) * size // dtype.itemsize, dtype)
        before = numbers.start * size // dtype.itemsize
        parts = []
        for number, place in enumerate(places):
            assert place is not None, "all have been found"
            for first in range(0, size, _RUN):
                begin = (number * size + first) // dtype.itemsize
                run = flat[begin : begin + min(_RUN, size - first) // dtype.itemsize]
                parts.append(self._pool.submit(_read, place.path, place.start + first, run, before + begin))
        return Coming(flat.reshape(-1, *store.shape[1:]), parts)

    @functools.cached_property
    def _places(self) -> dict[str, _Place]:
        return dict(self._found())

    def _found(self) -> Iterator[tuple[str, _Place]]:
        for key, file, start, size in places_of_values(self._folder, self._files, self._index):
            if start + size <= self._files[file]:
                yield key, _Place(os.fspath(self._folder / file), start, size)


def _chunks_in_memory(store: Any) -> tuple[int, str]:
    """Returns how many chunks an array has, and how their keys end after the number; 0 if it is not read here.

    The chunks are, one after the other, the array as it is in memory.
    """
    dtype = store.dtype.numpy_dtype
    size = math.prod(store.shape) * dtype.itemsize
    # Of other elements of one byte not every bit counts.
    if (dtype.itemsize == 1 and dtype.kind not in "iu") or size < LARGE:
        return 0, ""
    found = store.spec().to_json()["metadata"]
    shape, chunks = tuple(found["shape"]), tuple(found["chunks"])
    is_raw = found["compressor"] is None and not found.get("filters") and found["order"] == "C"
    is_whole = shape == tuple(store.shape) and chunks[1:] == shape[1:] and shape[0] % chunks[0] == 0
    if not (is_raw and is_whole and isinstance(found["dtype"], str) and not found["dtype"].startswith(">")):
        return 0, ""
    return shape[0] // chunks[0], f"{found.get('dimension_separator', '.')}0" * (len(shape) - 1)


def _chunks_of(part: tuple[slice, ...], shape: tuple[int, ...], rows: int) -> range:
    """Returns the numbers of the chunks that make up a part of an array; none if they hold more than it.

    Args:
      part: the part; the whole array if it is empty.
      shape: the shape of the array.
      rows: the length of a chunk along the first axis; along the others it is the array's.
    """
    spans = [axis.indices(size)[:2] for axis, size in zip(part, shape, strict=False)] or [(0, shape[0])]
    (first, last), *others = spans
    is_whole = all(span == (0, size) for span, size in zip(others, shape[1:], strict=False))
    return range(first // rows, last // rows) if is_whole and not (first % rows or last % rows) else range(0)


def _empty(size: int, dtype: Any) -> np.ndarray:
    """Returns an array with one axis that JAX uses as its own."""
    nbytes = size * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype)


def _read(path: str, start: int, run: np.ndarray, before: int) -> Sums:
    """Reads a run of an array's elements, and returns what it adds to the array's sums."""
    sums = (0, 0)
    step = _AT_ONCE // run.itemsize
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for first in range(0, run.size, step):
            part = run[first : first + step]
            left = part.view(np.uint8).data
            while left:
                count = file.readinto(left)
                if not count:
                    raise EOFError(f"{path} ends before byte {start + run.nbytes}")
                left = left[count:]
            sums = added(sums, sums_of_run(part, before + first))
    return sums
