"""What a plan knows of arrays that lie per device: which they are, and over which axes of which mesh.

A plan says what a model holds: one value for each leaf.  A state on a mesh holds, of leaves that are `PerDevice`, one
for each device, along a leading axis.  Such a state has a plan of its own, which is the model's with `PerDeviceArrays`:
they are static, so a step knows the mesh of a state that is being traced too.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.common.nnx_graph import ArraySpec

__all__ = ["PerDeviceArrays", "spread"]


class PerDeviceArrays(NamedTuple):
    """Which arrays of a state have a leading axis, one value for each device.

    Attributes:
      mesh: the mesh.
      axes: the mesh axes that the leading axis is split over.
      positions: for each kind that has such arrays, which of its arrays they are.
    """

    mesh: Any
    axes: tuple[str, ...]
    positions: tuple[tuple[str, frozenset[int]], ...]

    @property
    def devices(self) -> int:
        """How many values there are of each leaf."""
        return math.prod(int(self.mesh.shape[axis]) for axis in self.axes)

    @property
    def words(self) -> str:
        """The mesh axes as code: `'data'`, or `('data', 'model')`."""
        return repr(self.axes[0] if len(self.axes) == 1 else self.axes)

    def of(self, kind: str) -> frozenset[int]:
        """Which of a kind's arrays have the leading axis."""
        return dict(self.positions).get(kind, frozenset())

    def held(self, kind: str, specs: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """Shapes and dtypes as a state holds them, from those of the model."""
        mine = self.of(kind)
        return tuple(
            ArraySpec((self.devices, *spec.shape), spec.dtype) if at in mine else spec for at, spec in enumerate(specs)
        )


def spread(array: Any, count: int, sharding: Any = None, axis: int | None = None) -> Any:
    """An array for each device, one after the other: its value; of keys, one folded in with the device's number.

    Args:
      array: the model's.
      count: how many devices.
      sharding: where the devices are; None leaves that to XLA, as under `jax.jit`.
      axis: the axis of an ensemble's members, each of which is spread by itself; None where there are none.
    """
    if axis is not None:
        made = jax.vmap(lambda one: spread(one, count), in_axes=axis, out_axes=axis)(jnp.asarray(array))
        return made if sharding is None else jax.device_put(made, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        made = jax.vmap(lambda number: _folded_in(array, number))(jnp.arange(count))
        return made if sharding is None else jax.device_put(made, sharding)
    one = jnp.asarray(array)[None]
    if sharding is None:
        return jnp.broadcast_to(one, (count, *array.shape))
    devices = list(sharding.addressable_devices)
    parts = jax.device_put([one] * len(devices), devices)
    return jax.make_array_from_single_device_arrays((count, *array.shape), sharding, parts)


def _folded_in(keys: Any, number: Any) -> Any:
    flat = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.reshape(-1))
    return flat.reshape(keys.shape)
