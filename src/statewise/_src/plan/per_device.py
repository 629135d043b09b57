"""What a plan knows about arrays that are stored per device: which they are, and over which axes of which mesh.

A plan describes a model: one value for each leaf.  A state on a mesh holds, for leaves that are `PerDevice`, one value
for each device, along a leading axis.  Such a state has a plan of its own: the model's plan with `PerDeviceArrays`,
which are static, so a step knows the mesh even of a state that is being traced.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.placing import placed

__all__ = ["PerDeviceArrays", "spread"]


class PerDeviceArrays(NamedTuple):
    """The arrays of a state that have a leading axis, with one value for each device.

    Attributes:
      mesh: the mesh.
      axes: the mesh axes that the leading axis is sharded over.
      positions: for each kind that has such arrays, their positions.
    """

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    axes: tuple[str, ...]
    positions: tuple[tuple[str, frozenset[int]], ...]

    @property
    def devices(self) -> int:
        """Returns the number of values of each leaf."""
        return math.prod(int(self.mesh.shape[axis]) for axis in self.axes)

    @property
    def words(self) -> str:
        """Returns the mesh axes as code: `'data'`, or `('data', 'model')`."""
        return repr(self.axes[0] if len(self.axes) == 1 else self.axes)

    def of(self, kind: str) -> frozenset[int]:
        """Returns the positions of a kind's arrays that have the leading axis."""
        return dict(self.positions).get(kind, frozenset())

    def held(self, kind: str, specs: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """Returns a kind's shapes and dtypes in a state, from those of the model."""
        positions = self.of(kind)
        return tuple(
            ArraySpec((self.devices, *spec.shape), spec.dtype) if position in positions else spec
            for position, spec in enumerate(specs)
        )


def spread(array: Any, count: int, sharding: jax.sharding.Sharding | None = None, axis: int | None = None) -> Any:
    """Returns one array for each device, stacked: the same value; for PRNG keys, the device's number folded in.

    Args:
      array: the model's array.
      count: the number of devices.
      sharding: the sharding of the result; None leaves that to XLA, as under `jax.jit`.
      axis: the axis of an ensemble's members, each of which gets its own values; None if there are no members.
    """
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    if axis is not None or is_key:
        if axis is not None:
            stacked = jax.vmap(lambda member: spread(member, count), axis, axis)(jnp.asarray(array))
        else:
            stacked = jax.vmap(lambda number: _folded_in(array, number))(jnp.arange(count))
        return stacked if sharding is None else placed(stacked, sharding)
    value = jnp.asarray(array)[None]
    if sharding is None:
        return jnp.broadcast_to(value, (count, *array.shape))
    # Each device gets its part directly; a broadcast array would exist on one device first.
    devices = list(sharding.addressable_devices)
    parts = jax.device_put([value] * len(devices), devices)
    return jax.make_array_from_single_device_arrays((count, *array.shape), sharding, parts)


def _folded_in(keys: Any, number: Any) -> Any:
    flat = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.reshape(-1))
    return flat.reshape(keys.shape)
