"""Reading a part of one of our arrays, from all those of theirs that it is.

What is read goes into a buffer that the caller has; beside it there is at most a chunk for each thread.
"""

from __future__ import annotations

import concurrent.futures
import math
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from statewise._src.checkpoint.interop.sources import Source
from statewise._src.names.layout import Layout
from statewise._src.names.pieces import Piece, pieces

__all__ = ["fill_ours"]

# The bytes that are read, and rearranged, at once.
_CHUNK = 4 << 20
_THREADS = min(8, os.cpu_count() or 1)
# The bytes up to which a chunk comes from the heap.
_SMALL = 1 << 20


class _Scratch(threading.local):
    """Memory for the chunk that a thread rearranges.

    Each thread's heap keeps what was freed in it, which would add up to more than an array; a mapping is given back.
    """

    memory: Any = b""

    def array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """Returns an array, which is valid until the thread asks for the next one."""
        count = math.prod(shape)
        if count * dtype.itemsize <= _SMALL:
            return np.empty(shape, dtype)
        if len(self.memory) < count * dtype.itemsize:
            self.memory = mmap.mmap(-1, count * dtype.itemsize)
        return np.frombuffer(self.memory, dtype, count).reshape(shape)


def fill_ours(source: Source, layout: Layout, dtype: np.dtype[Any], index: Sequence[slice], out: np.ndarray) -> None:
    """Reads a part of one of our arrays.

    Args:
      source: has their arrays.
      layout: which of them ours is.
      dtype: their dtype.
      index: the positions of the part along each of our axes, without steps.
      out: a buffer of the part's shape; of another dtype, it gets the numbers as they are in that.
    """
    scratch = _Scratch()

    def read(piece: Piece) -> None:
        if piece.is_direct and out.dtype == dtype:
            source.fill(piece.name, piece.index, piece.into)
            return
        chunk = scratch.array(piece.shape, dtype)
        source.fill(piece.name, piece.index, chunk)
        within: tuple[Any, ...] = (*piece.within, ...)
        piece.into[...] = chunk[within]

    every = (part for piece in pieces(layout, index, out) for part in piece.cut(_CHUNK // out.itemsize))
    if out.nbytes <= _CHUNK or _THREADS == 1:
        for piece in every:
            read(piece)
        return
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(read, every):
            pass
