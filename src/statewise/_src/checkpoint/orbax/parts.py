"""The parts of an array that several processes hold, and which of these processes sees to each part."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

__all__ = ["holders", "most_parts", "processes_of"]


@functools.lru_cache(maxsize=4096)
def processes_of(sharding: jax.sharding.Sharding) -> frozenset[int]:
    """Returns the numbers of the processes whose devices a sharding has."""
    devices: set[jax.Device] = sharding.device_set
    return frozenset(device.process_index for device in devices)


@functools.lru_cache(maxsize=4096)
def holders(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> Mapping[str, Sequence[jax.Device]]:
    """Returns by part, its index as text, the devices that may see to it: one of each process that holds it.

    All processes see the same, and in the same order.
    """
    devices: dict[str, dict[int, jax.Device]] = {}
    index_of: Mapping[jax.Device, Any] = sharding.devices_indices_map(shape)
    for device, index in index_of.items():
        devices.setdefault(str(index), {}).setdefault(device.process_index, device)
    return {index: [each[process] for process in sorted(each)] for index, each in devices.items()}


def most_parts(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> int:
    """Returns how many different parts one process holds at most: the same number in all processes."""
    counts = collections.Counter(device.process_index for each in holders(sharding, shape).values() for device in each)
    return max(counts.values())
