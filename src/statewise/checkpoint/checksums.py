"""Checksums of arrays that do not depend on how an array is laid over devices.

The elements of an array, in C order, are read as unsigned words `w[0], w[1], ...`: of 1, 2 or 4 bytes like the
elements, of 4 where those are larger, in little-endian order; sub-byte integers count as one byte with the unused bits
cleared.  A checksum is two sums modulo 2**32, as in Fletcher's (J. G. Fletcher, "An arithmetic checksum for serial
transmissions", IEEE Transactions on Communications 30, 1982), with positions for his running sum:

    plain = w[0] + w[1] + ...          placed = 1 w[0] + 2 w[1] + 3 w[2] + ...

Sums can be taken shard by shard, in any order, on the devices or on the host, and always give the same.  A change of
one word always changes the first; the exchange of two words nearly always the second.  They find accidents: whoever
changes a file on purpose can make them fit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Sums", "sums_of"]

Sums = tuple[int, int]

_MODULUS = 1 << 32
# Words at a time: what fits a core's cache.  2**32 * 2**16 * 2**15 stays below 2**64.
_CHUNK = 1 << 16
_PLACES = np.arange(1, _CHUNK + 1, dtype=np.uint64)
_WORDS: dict[int, np.dtype] = {1: np.dtype("<u1"), 2: np.dtype("<u2")}


def sums_of(array: Any) -> Sums:
    """The two sums of an array, JAX's or NumPy's; of PRNG keys take `jax.random.key_data`.

    Example:
      >>> import numpy as np
      >>> from statewise.checkpoint.checksums import sums_of
      >>> sums_of(np.array([3, 5], np.uint8))
      (8, 13)
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        plain, placed = _on_devices(array)
        return int(plain), int(placed)
    return _on_host(np.asarray(array))


def _on_host(array: np.ndarray) -> Sums:
    words: np.ndarray = np.ascontiguousarray(array).reshape(-1).view(_word(array.dtype))
    bits = _sub_byte_bits(array.dtype)
    if bits:
        words = words & np.uint8((1 << bits) - 1)
    plain = placed = 0
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint64)
        total = int(chunk.sum())
        plain += total
        placed += start * total + int(np.dot(chunk, _PLACES[: chunk.size]))
    return plain % _MODULUS, placed % _MODULUS


def _word(dtype: np.dtype) -> np.dtype:
    return _WORDS.get(dtype.itemsize, np.dtype("<u4"))


def _sub_byte_bits(dtype: Any) -> int:
    """How many bits an element has, where that is less than a byte; 0 for all others."""
    if dtype.kind == "b" or dtype.itemsize > 1:
        return 0
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits
    return int(bits) if bits < 8 else 0


@jax.jit
def _on_devices(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same sums where no process holds the whole array: XLA adds them up over the shards."""
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
