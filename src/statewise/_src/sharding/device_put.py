"""One array from devices to devices, without a way through the host where there is another.

`jax.device_put` copies whole pieces from device to device, but where the pieces that a device shall hold are on no
device as they are, it puts them together in the host's memory.  So they are made on the source's devices first, by a
compiled copy: split as on the target's mesh, where that has as many devices; else whole, on one of them.  (That one
device then holds one whole array for a moment.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["moved"]


def moved(array: jax.Array, place: Any) -> jax.Array:
    """A copy of an array, laid out as a sharding says; it shares no memory with the array.

    Args:
      array: a concrete array; it stays as it is.
      place: the sharding.
    """
    here = array.sharding
    if here.is_equivalent_to(place, array.ndim):
        # The same pieces on the same devices may still be of another mesh, and a step takes arrays of one.
        return jnp.copy(array) if here == place else _put(array, place)
    if not (here.is_fully_addressable and place.is_fully_addressable) or here.memory_kind != place.memory_kind:
        return _put(array, place)
    ours, theirs = _devices(here), _devices(place)
    if ours == theirs:
        return _copied(place)(array)
    if not (_is_whole(here) and _is_whole(place)):
        same = _here(here, place) if ours and theirs and len(ours) == len(theirs) else None
        if same is not None:
            array = _copied(same)(array)
        elif not _is_whole(here) and isinstance(here, jax.NamedSharding):
            array = _copied(jax.NamedSharding(here.mesh, jax.P(), memory_kind=here.memory_kind))(array)
        if same is None and not _is_whole(place):
            # A whole array on one device is cut up there; one that is whole on several, on the host.
            first = array.addressable_shards[0].device
            array = jax.device_put(array, jax.sharding.SingleDeviceSharding(first, memory_kind=here.memory_kind))
    return _put(array, place)


def _put(array: jax.Array, place: Any) -> jax.Array:
    # What JAX puts on a device that has it already may be the same memory, and a step donates what its state holds.
    # Between an accelerator's memory and its host's there is always a copy, at eight times the rate of a second one.
    here = array.sharding
    if here.device_set & place.device_set and (here.memory_kind == place.memory_kind or _is_on_cpu(here)):
        array = jnp.copy(array)
    return jax.device_put(array, place)


def _is_on_cpu(sharding: Any) -> bool:
    """Whether all kinds of a device's memory are the host's."""
    return any(device.platform == "cpu" for device in sharding.device_set)


def _is_whole(sharding: Any) -> bool:
    return bool(sharding.is_fully_replicated)


def _devices(sharding: Any) -> list[Any] | None:
    """The devices of a sharding, in their order; None where that is not told."""
    if isinstance(sharding, jax.NamedSharding):
        return list(sharding.mesh.devices.flat)
    return list(sharding.device_set) if len(sharding.device_set) == 1 else None


def _here(here: Any, place: Any) -> Any:
    """The split of another mesh, on the devices of this one."""
    if not (isinstance(here, jax.NamedSharding) and isinstance(place, jax.NamedSharding)):
        return None
    there = place.mesh
    mesh = jax.sharding.Mesh(
        here.mesh.devices.reshape(there.devices.shape), there.axis_names, axis_types=there.axis_types
    )
    return jax.NamedSharding(mesh, place.spec, memory_kind=place.memory_kind)


@functools.lru_cache(maxsize=256)
def _copied(place: Any) -> Any:
    return jax.jit(jnp.copy, out_shardings=place)
