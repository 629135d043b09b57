"""Arrays that each process has, placed on devices of several processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from statewise._src.common import compat

__all__ = ["placed"]


def placed(array: Any, sharding: Sharding) -> Any:
    """Returns an array on the devices of a sharding, which may be of several processes; perhaps with the same memory.

    `jax.device_put` does this but for two cases (JAX 0.10 to 0.12): it refuses PRNG keys, and if each process has one
    device, the parts of a replicated array cannot be read, so that nothing can be saved of it.

    Args:
      array: an array; if the sharding is of several processes, each of them has the same one.
      sharding: the sharding.
    """
    if sharding.is_fully_addressable or not isinstance(array, jax.Array) or isinstance(array, compat.Tracer):
        return jax.device_put(array, sharding)
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    if not array.is_fully_addressable or not (is_key or sharding.is_fully_replicated):
        return jax.device_put(array, sharding)
    parts = [
        jax.device_put(
            array if sharding.is_fully_replicated else array[index],
            SingleDeviceSharding(device, memory_kind=sharding.memory_kind),
        )
        for device, index in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts, dtype=array.dtype)
