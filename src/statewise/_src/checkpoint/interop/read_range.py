"""Reading a part of an array from a file: as few bytes as a device needs, in requests that are not too small."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["read_range"]

File = io.RawIOBase | io.BufferedIOBase

# The bytes from which on a run of a row is read by itself; below it, complete rows are, in chunks.
_RUN = 4096
_CHUNK = 1 << 20


def read_range(file: File, offset: int, shape: Sequence[int], index: Sequence[slice], into: np.ndarray) -> None:
    """Reads a part of an array that is in a file, in C order.

    Args:
      file: the file, without a buffer.
      offset: where the array begins in it, in bytes.
      shape: the array's shape.
      index: the part: the positions along each axis, without steps.
      into: a buffer of the part's shape and the array's dtype, in C order.

    Raises:
      EOFError: the file is too short.
    """
    spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    if into.size == 0:
        return
    inner = [math.prod(shape[axis + 1 :]) * into.itemsize for axis in range(len(shape))]
    # The axes up to the last of which only a part is wanted; what is below is one run of bytes.
    last = max((axis for axis, span in enumerate(spans) if span != (0, shape[axis])), default=-1)
    several = next((axis for axis, (start, stop) in enumerate(spans) if stop - start > 1), len(spans))
    if last <= several:
        start = sum(span[0] * size for span, size in zip(spans, inner, strict=True))
        _read(file, offset + start, into)
        return
    run = (spans[last][1] - spans[last][0]) * inner[last]
    start, stop = spans[several]
    offset += sum(span[0] * size for span, size in zip(spans[:several], inner[:several], strict=True))
    into = into.reshape(into.shape[several:])
    if run < _RUN and inner[several] <= _CHUNK:
        _read_rows(file, offset, shape[several:], [slice(*span) for span in spans[several:]], into)
        return
    for row in range(start, stop):
        rest = [slice(*span) for span in spans[several + 1 :]]
        read_range(file, offset + row * inner[several], shape[several + 1 :], rest, into[row - start])


def _read_rows(file: File, offset: int, shape: Sequence[int], index: Sequence[slice], into: np.ndarray) -> None:
    """Reads complete rows, of which a part is wanted: fewer requests than one for each short run."""
    size = math.prod(shape[1:]) * into.itemsize
    rows = max(_CHUNK // size, 1)
    for first in range(index[0].start, index[0].stop, rows):
        last = min(first + rows, index[0].stop)
        chunk = np.empty((last - first, *shape[1:]), into.dtype)
        _read(file, offset + first * size, chunk)
        into[first - index[0].start : last - index[0].start] = chunk[(slice(None), *index[1:])]


def _read(file: File, offset: int, into: np.ndarray) -> None:
    file.seek(offset)
    flat: Any = into.reshape(-1).view(np.uint8)
    left = memoryview(flat)
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError(f"the file ends before byte {offset + into.nbytes}")
        left = left[count:]
