"""Reading an array of a source onto the devices of a sharding, so that the host holds little beside what it reads.

On the CPU a device's memory is the host's: each part is read into a buffer that JAX then takes as it is.  For another
device the host holds one part at a time; of an array that is stacked in the files, one position of the stack, which a
program on the device puts into its part.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.checkpoint.interop.sources import Source, SourceArray, stored_dtype

__all__ = ["read_placed"]

# JAX takes a NumPy array on the CPU without a copy if it is aligned to this many bytes.
_ALIGNED = 64

Index = tuple[slice, ...]


def read_placed(source: Source, entry: SourceArray, prng: str | None, sharding: Any, wanted: Any = None) -> Any:
    """Reads an array onto the devices of a sharding; each process reads what its own devices need.

    Args:
      source: the source.
      entry: the array.
      prng: the implementation, if the array is the words of PRNG keys.
      sharding: where to; None for the default device.
      wanted: the dtype that it becomes while it is read, if every number of its own is one of that.

    Returns:
      the array; one in a dtype that JAX does not have here is a NumPy array.
    """
    dtype = stored_dtype(entry)
    if prng is not None:
        words = jnp.asarray(source.read((entry.name,))[entry.name])
        return jax.device_put(jax.random.wrap_key_data(words, impl=prng), sharding)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return source.read((entry.name,))[entry.name]
    dtype = dtype if wanted is None else np.dtype(wanted)
    sharding = jnp.zeros(()).sharding if sharding is None else sharding
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(entry.shape).items():
        spans = tuple(part.indices(size)[:2] for part, size in zip(index, entry.shape, strict=True))
        devices.setdefault(spans, []).append(
            jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        )
    parts: list[jax.Array] = []
    for spans, places in devices.items():
        parts += _read_part(source, entry, dtype, tuple(slice(*span) for span in spans), places)
    return jax.make_array_from_single_device_arrays(entry.shape, sharding, parts, dtype=dtype)


def _read_part(
    source: Source, entry: SourceArray, dtype: np.dtype[Any], index: Index, places: Sequence[Any]
) -> list[jax.Array]:
    """Returns a part of an array, on each of some devices."""
    shape = tuple(part.stop - part.start for part in index)
    counts = [shape[axis] if axis in entry.stacked else 1 for axis in range(len(shape))]
    if max(counts, default=1) == 1 or 0 in shape or not all(map(_is_streamed, places)):
        return _put(source, entry, dtype, index, places)
    wholes = [jnp.zeros(shape, dtype, device=place) for place in places]
    for position in itertools.product(*map(range, counts)):
        one = list(index)
        for axis in entry.stacked:
            start = index[axis].start + position[axis]
            one[axis] = slice(start, start + 1)
        parts = _put(source, entry, dtype, tuple(one), places)
        wholes = [_updated(whole, part, position) for whole, part in zip(wholes, parts, strict=True)]
        jax.block_until_ready(wholes)  # or the host would hold what is still on its way
    return wholes


def _put(
    source: Source, entry: SourceArray, dtype: np.dtype[Any], index: Index, places: Sequence[Any]
) -> list[jax.Array]:
    buffer = _aligned(tuple(part.stop - part.start for part in index), dtype)
    source.fill(entry.name, index, buffer)
    # Nothing else has the buffer, so that the array may be the buffer itself; it then lives as long as the array.
    return jax.block_until_ready([jax.device_put(buffer, place, may_alias=True) for place in places])


def _is_streamed(place: Any) -> bool:
    """Returns whether a stack goes to a place one position at a time: into a device's own memory."""
    (device,) = place.device_set
    own = place.memory_kind is None or place.memory_kind == device.default_memory().kind
    return own and device.platform != "cpu"


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Returns a new buffer whose memory JAX can take as it is."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + nbytes].view(dtype).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0)
def _updated(whole: jax.Array, part: jax.Array, position: Sequence[Any]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part, position)
