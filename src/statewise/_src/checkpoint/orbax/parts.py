"""The parts of an array that several processes hold, and which of these processes sees to each part."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

__all__ = ["holders"]


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
