"""Fingerprints of arrays: 64 bits that stand for all the bits of an array, so that nothing of it has to be kept.

The elements of an array, in C order, are read as unsigned words of 32 bits (smaller elements one a word, larger ones
as several).  Each word is mixed with its place, `v = mix(word ^ p)` with `p = mix(place)`; the fingerprint is two sums
modulo 2**32, of `v` and of `v * (p | 1)`.  Both `mix` and a product by an odd number can be undone, so that the change
of one word, a single bit of it, always changes both sums; that several changes cancel in both has odds of one in 2**64.
NaNs are the same where their bits are, and -0.0 is not 0.0.

Sums can be taken wherever the array lies: sharded arrays are summed shard by shard, and only the sums move.  Arrays of
one shape, dtype and place go through one compiled function, many at a time, so that a model of thousands of leaves
compiles a handful of programs and fetches a handful of small arrays.  A small array that has few of its like is fetched
instead: that takes microseconds, where to compile a function for it takes milliseconds.  Both ways give the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Fingerprint", "fingerprints"]

Fingerprint = tuple[int, int]

# Bytes that are stacked for one call, and how many arrays at most: every number of arrays is a program of its own.
_STACKED = 1 << 20
_MOST = 64
# An array of up to so many bytes is fetched where there are fewer of its like than this.
_SMALL = 16 * 1024
_FEW = 4

_WORDS: dict[int, np.dtype] = {1: np.dtype("<u1"), 2: np.dtype("<u2")}
_START = np.uint32(0x9E3779B9)


def fingerprints(arrays: Sequence[Any]) -> list[Fingerprint]:
    """The fingerprint of each array: of JAX (PRNG keys too, sharded or not), of NumPy, or a Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from statewise._src.inspect.watch.fingerprints import fingerprints
      >>> one, same, swapped = fingerprints(
      ...     [jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])]
      ... )
      >>> one == same, one == swapped
      (True, False)
    """
    found: list[Fingerprint] = [(0, 0)] * len(arrays)
    groups: dict[Any, list[int]] = {}
    fetched: list[int] = []
    for position, array in enumerate(arrays):
        if isinstance(array, jax.Array):
            groups.setdefault((array.shape, array.dtype, array.sharding), []).append(position)
        else:
            fetched.append(position)
    calls: list[tuple[list[int], Any]] = []
    with jax.disable_jit(False):
        for positions in groups.values():
            first = arrays[positions[0]]
            if len(positions) < _FEW and _can_be_fetched(first):
                fetched += positions
            else:
                calls += [(some, _dispatched([arrays[at] for at in some])) for some in _stacks(first, positions)]
    # All of them are on their way before the first is waited for.
    on_host = jax.device_get([arrays[position] for position in fetched])
    for position, array in zip(fetched, on_host, strict=True):
        found[position] = _on_host(np.asarray(array))
    for (positions, _), sums in zip(calls, jax.device_get([sums for _, sums in calls]), strict=True):
        for row, position in enumerate(positions):
            found[position] = int(sums[row, 0]), int(sums[row, 1])
    return found


def _can_be_fetched(array: jax.Array) -> bool:
    if jnp.issubdtype(array.dtype, jax.dtypes.extended) or not array.is_fully_addressable:
        return False
    return array.nbytes <= _SMALL


def _stacks(first: jax.Array, positions: Sequence[int]) -> list[list[int]]:
    """Positions of arrays that go through one call together."""
    key = jnp.issubdtype(first.dtype, jax.dtypes.extended)
    size = min(_MOST, max(1, _STACKED // max(1, _SMALL if key else first.nbytes)))
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]


def _dispatched(arrays: list[Any]) -> jax.Array:
    """The sums of arrays alike, not waited for."""
    # Whatever lies outside the device's own memory (pinned on the host) comes in for the call.
    sharding = arrays[0].sharding
    (device, *_) = sharding.addressable_devices
    usual = device.default_memory().kind
    if sharding.memory_kind not in (None, usual):
        arrays = jax.device_put(arrays, sharding.with_memory_kind(usual))
    # To the next power of two: so few numbers of arrays there are that a second model seldom compiles anything.
    return _sums(arrays + arrays[:1] * ((1 << (len(arrays) - 1).bit_length()) - len(arrays)))


def _sums_of(arrays: list[Any]) -> jax.Array:
    """The two sums of each array: (arrays, 2)."""
    stacked = jnp.stack([jax.random.key_data(a) if _is_key(a) else a for a in arrays])
    words = _words(stacked)
    shape = words.shape[1:]
    places, stride = jnp.full(shape, _START), 1
    for axis in reversed(range(len(shape))):
        places = places + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % (1 << 32))
        stride *= shape[axis]
    places = _mix(places)[None]
    values = _mix(words ^ places)
    axes = tuple(range(1, words.ndim))
    one = jnp.sum(values, axes, dtype=jnp.uint32)
    other = jnp.sum(values * (places | np.uint32(1)), axes, dtype=jnp.uint32)
    return jnp.stack([one, other], axis=-1)


_sums = jax.jit(_sums_of)


def _is_key(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.extended))


def _words(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    bits = _sub_byte_bits(array.dtype) or 8 * array.dtype.itemsize
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(bits, 32)}")).astype(jnp.uint32)


def _mix(word: Any) -> Any:
    """A bijection of 32 bits in which every bit of the word moves about half of the bits of the result."""
    word = word ^ (word >> np.uint32(16))
    word = word * np.uint32(0x7FEB352D)
    word = word ^ (word >> np.uint32(15))
    word = word * np.uint32(0x846CA68B)
    return word ^ (word >> np.uint32(16))


def _on_host(array: np.ndarray) -> Fingerprint:
    words: np.ndarray = np.ascontiguousarray(array).reshape(-1).view(_WORDS.get(array.dtype.itemsize, np.dtype("<u4")))
    bits = _sub_byte_bits(array.dtype)
    if bits:
        words = words & np.uint8((1 << bits) - 1)
    places = _mix(np.arange(words.size, dtype=np.uint32) + _START)
    values = _mix(words.astype(np.uint32) ^ places)
    other = values * (places | np.uint32(1))
    return int(values.sum(dtype=np.uint32)), int(other.sum(dtype=np.uint32))


def _sub_byte_bits(dtype: Any) -> int:
    """How many bits an element has, where that is less than a byte; 0 for all others."""
    if dtype.kind == "b" or dtype.itemsize > 1:
        return 0
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits
    return int(bits) if bits < 8 else 0
