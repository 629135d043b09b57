"""Fingerprints of arrays: 64 bits that represent all the bits of an array, so that the array need not be kept.

The elements of an array, in C order, are read as unsigned words of 32 bits (a smaller element is one word, a larger one
is several).  Each word is mixed with its index, `v = mix(word ^ p)` with `p = mix(index)`; the fingerprint is two sums
modulo 2**32, of `v` and of `v * (p | 1)`.  Both `mix` and a product by an odd number can be undone, so a change of one
word, even of a single bit, always changes both sums; the odds that several changes cancel in both are one in 2**64.
NaNs are equal if their bits are, and -0.0 is not 0.0.

Sums can be computed wherever the array is: sharded arrays are summed shard by shard, and only the sums move.  Arrays of
one shape, dtype and sharding go through one compiled function, many at a time, so that a model of thousands of leaves
compiles a handful of programs and fetches a handful of small arrays.  A small array of which there are few alike is
fetched instead: that takes microseconds, while compiling a function for it takes milliseconds.  Both ways give the same
fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Fingerprint", "fingerprints"]

Fingerprint = tuple[int, int]

# Bytes that are stacked for one call, and the largest number of arrays: each number of arrays is its own program.
_STACKED = 1 << 20
_MOST = 64
# An array of at most this many bytes is fetched if there are fewer arrays alike than this.
_SMALL = 16 * 1024
_FEW = 4

_WORDS: dict[int, np.dtype] = {1: np.dtype("<u1"), 2: np.dtype("<u2")}
# The first index, so that a short array does not have the index 0, which mixes to 0.
_START = np.uint32(0x9E3779B9)


def fingerprints(arrays: Sequence[Any]) -> list[Fingerprint]:
    """Returns the fingerprint of each array: of JAX (PRNG keys too, sharded or not), of NumPy, or a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from statewise._src.inspect.watch.fingerprints import fingerprints
      >>> one, same, swapped = fingerprints(
      ...     [jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])]
      ... )
      >>> one == same, one == swapped
      (True, False)
    """
    prints: list[Fingerprint] = [(0, 0)] * len(arrays)
    groups: dict[Any, list[int]] = {}
    fetched: list[int] = []
    for position, array in enumerate(arrays):
        if isinstance(array, jax.Array):
            groups.setdefault((array.shape, array.dtype, array.sharding), []).append(position)
        else:
            fetched.append(position)
    calls: list[tuple[list[int], jax.Array]] = []
    with jax.disable_jit(False):
        for positions in groups.values():
            first = arrays[positions[0]]
            is_small = not _is_key(first) and first.is_fully_addressable and first.nbytes <= _SMALL
            if is_small and len(positions) < _FEW:
                fetched += positions
                continue
            size = min(_MOST, max(1, _STACKED // max(1, _SMALL if _is_key(first) else first.nbytes)))
            for start in range(0, len(positions), size):
                stack = positions[start : start + size]
                calls.append((stack, _dispatched([arrays[position] for position in stack])))
    # All calls are dispatched before the first result is waited for.
    on_host, sums_of_calls = jax.device_get(([arrays[position] for position in fetched], [sums for _, sums in calls]))
    for position, array in zip(fetched, on_host, strict=True):
        prints[position] = _on_host(np.asarray(array))
    for (stack, _), sums in zip(calls, sums_of_calls, strict=True):
        # A call may have more rows than arrays: the rest is padding.
        for position, row in zip(stack, sums, strict=False):
            prints[position] = int(row[0]), int(row[1])
    return prints


def _dispatched(arrays: list[Any]) -> jax.Array:
    """Returns the sums of arrays with one shape, dtype and sharding, without waiting for them."""
    # Arrays outside the device's own memory (pinned on the host) are moved there for the call.
    sharding = arrays[0].sharding
    (device, *_) = sharding.addressable_devices
    usual = device.default_memory().kind
    if sharding.memory_kind not in (None, usual):
        arrays = jax.device_put(arrays, sharding.with_memory_kind(usual))
    # Padded to a power of two: with so few different numbers of arrays, a second model seldom compiles anything.
    return _sums(arrays + arrays[:1] * ((1 << (len(arrays) - 1).bit_length()) - len(arrays)))


def _sums_of(arrays: list[Any]) -> jax.Array:
    """Returns the two sums of each array: (arrays, 2)."""
    stacked = jnp.stack([jax.random.key_data(array) if _is_key(array) else array for array in arrays])
    words = _words(stacked)
    shape = words.shape[1:]
    # The index of each word in C order, from one iota for each axis: a reshape would gather a sharded array.
    places, stride = jnp.full(shape, _START), 1
    for axis in reversed(range(len(shape))):
        places = places + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % (1 << 32))
        stride *= shape[axis]
    return jnp.stack(_two_sums(jnp, words, _mix(places)[None], tuple(range(1, words.ndim))), axis=-1)


# Not a decorator: tests lower it, and the run-time type checker would hide it.
_sums = jax.jit(_sums_of)


def _two_sums(numpy: Any, words: Any, mixed_places: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    values = _mix(words ^ mixed_places)
    # The second factor is odd, so that the product can be undone.
    weighted = values * (mixed_places | np.uint32(1))
    return numpy.sum(values, axes, dtype=numpy.uint32), numpy.sum(weighted, axes, dtype=numpy.uint32)


def _is_key(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.extended))


def _words(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    # To unsigned integers of the same width; of 64 bits, to two of 32 along a new last axis.
    bits = _sub_byte_bits(array.dtype) or 8 * array.dtype.itemsize
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(bits, 32)}")).astype(jnp.uint32)


def _mix(word: Any) -> Any:
    """Maps words one to one, so that each bit of a word changes about half of the bits of the result."""
    word = word ^ (word >> np.uint32(16))
    word = word * np.uint32(0x7FEB352D)
    word = word ^ (word >> np.uint32(15))
    word = word * np.uint32(0x846CA68B)
    return word ^ (word >> np.uint32(16))


def _on_host(array: np.ndarray) -> Fingerprint:
    words: np.ndarray = np.ascontiguousarray(array).reshape(-1).view(_WORDS.get(array.dtype.itemsize, np.dtype("<u4")))
    bits = _sub_byte_bits(array.dtype)
    if bits:
        # NumPy stores such an element in a byte, whose other bits are undefined.
        words = words & np.uint8((1 << bits) - 1)
    places = _mix(np.arange(words.size, dtype=np.uint32) + _START)
    first, second = _two_sums(np, words.astype(np.uint32), places, (0,))
    return int(first), int(second)


def _sub_byte_bits(dtype: Any) -> int:
    """Returns the number of bits of an element, if that is less than a byte; 0 for all others."""
    if dtype.kind == "b" or dtype.itemsize > 1:
        return 0
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits
    return int(bits) if bits < 8 else 0
