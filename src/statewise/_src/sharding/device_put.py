"""Copies one array to other devices, avoiding the host's memory where possible.

`jax.device_put` copies complete shards from device to device, but if no device holds a shard that the target needs, it
assembles the array in the host's memory.  So the shards are made on the source's devices first, by a compiled copy:
split as on the target's mesh if that has the same number of devices, otherwise replicated.  (One device then briefly
holds the complete array.)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from statewise._src.common.placing import placed

__all__ = ["moved", "on_devices_of"]


def moved(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Copies an array to a sharding; the copy shares no memory with the array.

    Args:
      array: a concrete array; it is not changed.
      sharding: the sharding of the copy.
    """
    source = array.sharding
    if source.is_equivalent_to(sharding, array.ndim):
        # The same shards on the same devices may still belong to another mesh, and a step takes arrays of only one.
        return jnp.copy(array) if source == sharding else _put(array, sharding)
    addressable = source.is_fully_addressable and sharding.is_fully_addressable
    if not addressable or source.memory_kind != sharding.memory_kind:
        return _put(array, sharding)
    if _devices(source) == _devices(sharding):
        return _copied(sharding)(array)
    if not (source.is_fully_replicated and sharding.is_fully_replicated):
        split = on_devices_of(source, sharding)
        if split is not None:
            array = _copied(split)(array)
        elif not source.is_fully_replicated and isinstance(source, jax.NamedSharding):
            array = _copied(jax.NamedSharding(source.mesh, jax.P(), memory_kind=source.memory_kind))(array)
        if split is None and not sharding.is_fully_replicated:
            # JAX splits an array on one device there, but a replicated one on the host.
            first = array.addressable_shards[0].device
            array = jax.device_put(array, jax.sharding.SingleDeviceSharding(first, memory_kind=source.memory_kind))
    return _put(array, sharding)


def _put(array: jax.Array, sharding: Sharding) -> jax.Array:
    # If a device already has the data, JAX may return the same memory, and a step donates what its state holds.
    # Between an accelerator's memory and its host's JAX always copies, at eight times the rate of a second copy.
    source = array.sharding
    if source.device_set & sharding.device_set and (source.memory_kind == sharding.memory_kind or _is_on_cpu(source)):
        array = jnp.copy(array)
    return placed(array, sharding)


def _is_on_cpu(sharding: Any) -> bool:
    """Returns whether all of a sharding's memory kinds are the host's memory."""
    return any(device.platform == "cpu" for device in sharding.device_set)


def _devices(sharding: Sharding) -> list[Any] | None:
    """Returns the devices of a sharding, in their order; None if the order is unknown."""
    if isinstance(sharding, jax.NamedSharding):
        return list(sharding.mesh.devices.flat)
    return list(sharding.device_set) if len(sharding.device_set) == 1 else None


def on_devices_of(source: Sharding, sharding: Sharding) -> jax.NamedSharding | None:
    """Returns the split of a sharding, on as many devices of another one's mesh; None if that is not possible."""
    if not (isinstance(source, jax.NamedSharding) and isinstance(sharding, jax.NamedSharding)):
        return None
    target = sharding.mesh
    if source.mesh.size != target.size:
        return None
    devices = source.mesh.devices.reshape(target.devices.shape)
    mesh = jax.sharding.Mesh(devices, target.axis_names, axis_types=target.axis_types)
    return jax.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


@functools.lru_cache(maxsize=256)
def _copied(sharding: Sharding) -> Any:
    return jax.jit(jnp.copy, out_shardings=sharding)
