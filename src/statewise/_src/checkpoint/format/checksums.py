"""Checksums of arrays that do not depend on how an array is sharded.

The elements of an array, in C order, are read as unsigned words `w[0], w[1], ...`: of 1, 2 or 4 bytes like the
elements, of 4 where those are larger, in little-endian order; sub-byte integers count as one byte with the unused bits
cleared.  A checksum is two sums modulo 2**32, as in Fletcher's (J. G. Fletcher, "An arithmetic checksum for serial
transmissions", IEEE Transactions on Communications 30, 1982), with positions for his running sum:

    plain = w[0] + w[1] + ...          placed = 1 w[0] + 2 w[1] + 3 w[2] + ...

Sums can be computed shard by shard, in any order, on the devices or on the host, and the result is always the same.  A
change of one word always changes the first sum; an exchange of two words nearly always changes the second.  They detect
accidents: someone who changes a file on purpose can make the sums match.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Pieces", "Sums", "added", "held", "is_spread", "sums_of", "sums_of_run", "sums_of_runs"]

Sums = tuple[int, int]

_MODULUS = 1 << 32
# Arrays of this many bytes or more are summed on an accelerator; for smaller ones compiling takes longer than the host.
_FAR = 1 << 25
# The number of words per step, which fit a core's cache, in rows of `_ROW` words.
_CHUNK, _ROW = 1 << 16, 1 << 12
_PLACES = np.arange(1, _ROW + 1, dtype=np.uint32)
_ROWS = np.arange(0, _CHUNK, _ROW, dtype=np.uint32)
_WORDS: dict[int, np.dtype] = {1: np.dtype("<u1"), 2: np.dtype("<u2")}


def sums_of(array: Any) -> Sums:
    """Returns the two sums of a JAX or NumPy array; of PRNG keys, pass `jax.random.key_data`.

    Example:
      >>> import numpy as np
      >>> from statewise._src.checkpoint.format.checksums import sums_of
      >>> sums_of(np.array([3, 5], np.uint8))
      (8, 13)
    """
    if isinstance(array, jax.Array):
        if is_spread(array) or _is_far(array):
            plain, placed = _on_devices(array)
            return int(plain), int(placed)
        array = held(array)
    return _of_pieces(array) if isinstance(array, Pieces) else _on_host(np.asarray(array))


def sums_of_run(run: np.ndarray, before: int) -> Sums:
    """Returns what a run of an array's elements adds to the sums of the array.

    Args:
      run: the run, with one axis.
      before: the number of elements before it.

    Example:
      >>> import numpy as np
      >>> from statewise._src.checkpoint.format.checksums import sums_of_run
      >>> sums_of_run(np.array([5], np.uint8), 1)
      (5, 10)
    """
    plain, placed = _on_host(run)
    each = _words(run[:1]).size  # an element of 8 bytes is two words
    return plain, (placed + before * each * plain) % _MODULUS


def sums_of_runs(flat: np.ndarray, runs: Sequence[tuple[int, int]]) -> list[Sums]:
    """Returns the sums of many small arrays in one buffer: of each run of its elements, as if it were an array.

    Args:
      flat: the buffer, with one axis.
      runs: for each run, its first element and its number of elements.

    Example:
      >>> import numpy as np
      >>> from statewise._src.checkpoint.format.checksums import sums_of_runs
      >>> sums_of_runs(np.array([7, 3, 5], np.uint8), [(1, 2), (0, 1)])
      [(8, 13), (7, 7)]
    """
    each = _words(flat[:1]).size  # an element of 8 bytes is two words
    sums: list[Sums] = []
    for first, lengths in _adjacent(runs):
        size = sum(lengths)
        if len(lengths) == 1:
            sums.append(_on_host(flat[first : first + size]))
            continue
        words = _words(flat[first : first + size]).astype(np.uint64)
        starts = each * np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        plain = np.add.reduceat(words, starts)
        words *= np.arange(1, words.size + 1, dtype=np.uint64)
        # Each run counts its words from 1, so the words before it are subtracted from the place of each of its words.
        # NumPy's sums are modulo 2**64, and therefore right modulo 2**32 too.
        placed = np.add.reduceat(words, starts) - starts.astype(np.uint64) * plain
        sums.extend(zip((plain % _MODULUS).tolist(), (placed % _MODULUS).tolist(), strict=True))
    return sums


def _adjacent(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """Yields groups of adjacent runs that fit in a cache: the first element of each group, and the runs' lengths.

    A run without elements is a group of its own (`reduceat` has no empty slices), as is a run that is too large.
    """
    most = 4 * _CHUNK
    first, end = 0, -1
    lengths: list[int] = []
    for start, length in runs:
        # `end == first`: the group holds one run without elements.
        if start != end or not length or end == first or end - first >= most or length > most:
            if lengths:
                yield first, lengths
            first, lengths = start, []
        lengths.append(length)
        end = start + length
    if lengths:
        yield first, lengths


def added(one: Sums, other: Sums) -> Sums:
    """Returns the checksum of two parts of one array together, from those of the parts."""
    return (one[0] + other[0]) % _MODULUS, (one[1] + other[1]) % _MODULUS


def is_spread(array: Any) -> bool:
    """Returns whether parts of an array are on devices of other processes only."""
    return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def _is_far(array: jax.Array) -> bool:
    """Returns whether an array is summed on its devices: to copy it to the host takes longer than to read it there."""
    return array.nbytes >= _FAR and all(device.platform != "cpu" for device in array.devices())


class Pieces(NamedTuple):
    """An array in pieces, as its devices hold it: to assemble it would take the same amount of memory again.

    Attributes:
      shape: the shape of the complete array.
      parts: for each piece, its first index along each axis, and the piece.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], np.ndarray], ...]


def held(array: Any) -> "np.ndarray | Pieces":
    """Returns the present values of an array of this process: as one array, or in pieces if devices share it.

    A JAX array gives views: if it is donated later, JAX copies it first.  A NumPy array may be written to at any time,
    even if it is read-only, because it may be a view of another; so it is copied.
    """
    if not isinstance(array, jax.Array):
        host = np.asarray(array)
        return host.copy() if host.size and (host.flags.writeable or host.base is not None) else host
    if len(array.sharding.device_set) == 1:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_shards[0].data)
    # Replicas of a shard have the same values: one of each is enough.
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    parts = ((tuple(axis.start or 0 for axis in shard.index), np.asarray(shard.data)) for shard in shards)
    return Pieces(array.shape, tuple(parts))


def _of_pieces(array: Pieces) -> Sums:
    plain = placed = 0
    for start, part in array.parts:
        if part.shape[1:] == array.shape[1:]:  # the piece is a run of elements
            before = start[0] * math.prod(part.shape[1:]) if start else 0
            sums = sums_of_run(part.reshape(-1), before)
        else:
            sums = _of_piece(part, start, array.shape)
        plain, placed = plain + sums[0], placed + sums[1]
    return plain % _MODULUS, placed % _MODULUS


def _of_piece(part: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> Sums:
    """Returns the sums of the words of a piece, each with its place in the complete array."""
    if not part.size:
        return 0, 0
    words = _words(part).reshape(*part.shape, -1)  # an element of 8 bytes is two words
    # Strides in words, along the axes of the complete array and along the words of one element.
    strides = [math.prod((*shape[axis + 1 :], words.shape[-1])) for axis in range(part.ndim)] + [1]
    first = 1 + sum(begin * stride for begin, stride in zip(start, strides, strict=False))
    rows = max(1, _CHUNK * words.shape[0] // words.size)
    plain = placed = 0
    for row in range(0, words.shape[0], rows):
        chunk = words[row : row + rows].astype(np.uint64)
        total = int(chunk.sum())
        plain += total
        # The place of a word is linear in its index: `placed` is the sum over the axes, each with its stride.
        placed += (first + row * strides[0]) * total
        for axis, stride in enumerate(strides):
            along = chunk.sum(axis=tuple(other for other in range(chunk.ndim) if other != axis))
            # NumPy's sums are modulo 2**64, and therefore right modulo 2**32 too.
            placed += stride * int(np.dot(along, np.arange(along.size, dtype=np.uint64)))
    return plain % _MODULUS, placed % _MODULUS


def _words(array: np.ndarray) -> np.ndarray:
    words: np.ndarray = np.ascontiguousarray(array).reshape(-1).view(_WORDS.get(array.dtype.itemsize, np.dtype("<u4")))
    bits = _sub_byte_bits(array.dtype)
    return words & np.uint8((1 << bits) - 1) if bits else words


def _on_host(array: np.ndarray) -> Sums:
    words = _words(array)
    end = words.size - words.size % _ROW
    plain = placed = 0
    for start in range(0, end, _CHUNK):
        rows = words[start : min(start + _CHUNK, end)].astype(np.uint32, copy=False).reshape(-1, _ROW)
        # The place of a word is that of its row and that in its row: this needs sums alone, and products only of sums.
        # NumPy's sums of these words are modulo 2**32.
        columns = np.add.reduce(rows, axis=0, dtype=np.uint32)
        lines = np.add.reduce(rows, axis=1, dtype=np.uint32)
        total = int(np.add.reduce(lines, dtype=np.uint32))
        plain += total
        placed += start * total + int(np.dot(columns, _PLACES)) + int(np.dot(lines, _ROWS[: lines.size]))
    rest = words[end:].astype(np.uint32, copy=False)
    total = int(np.add.reduce(rest, dtype=np.uint32))
    placed += end * total + int(np.dot(rest, _PLACES[: rest.size]))
    return (plain + total) % _MODULUS, placed % _MODULUS


def _sub_byte_bits(dtype: Any) -> int:
    """Returns the number of bits of an element if that is less than a byte; 0 for all others."""
    if dtype.kind == "b" or dtype.itemsize > 1:
        return 0
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits
    return int(bits) if bits < 8 else 0


@jax.jit
def _on_devices(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the same sums where no process has the complete array: XLA adds them over the shards."""
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            array = jnp.stack([array.real, array.imag], axis=-1)
        bits = _sub_byte_bits(array.dtype) or 8 * array.dtype.itemsize
        word = jnp.dtype(f"uint{min(bits, 32)}")
        words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    places, stride = jnp.ones((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        places = places + steps * np.uint32(stride % _MODULUS)
        stride *= words.shape[axis]
    return jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * places, dtype=jnp.uint32)
