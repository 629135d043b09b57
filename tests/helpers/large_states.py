"""What tests of checkpoints on meshes share: meshes, states of 200 MB, and whether two states hold the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    """The first devices, in a mesh of this shape: its last axis is `model`, one before it `data`."""
    count = int(np.prod(shape))
    names = ("data", "model")[-len(shape) :]
    axis_types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=axis_types, devices=jax.devices()[:count])


def split_for(axes: int) -> Any:
    """Matrices split over all axes of the mesh, all else on every device."""
    return lambda path, shape: sw.Sharded(*("data", "model")[-axes:]) if len(shape) == 2 else sw.Replicated()


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array)


def assert_same(one: sw.State, other: sw.State) -> None:
    for left, right in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(bits(left), bits(right))


LEAVES, SIDE = 12, 2048


def make_large() -> nnx.Dict:
    return nnx.Dict(**{f"w{number}": nnx.Param(jnp.full((SIDE, SIDE), float(number))) for number in range(LEAVES)})


def large_plan(axes: int) -> sw.Plan:
    kinds = sw.Kinds.standard()
    kinds = kinds.replace(params=dataclasses.replace(kinds["params"], placement=split_for(axes)))
    return kinds.plan(nnx.eval_shape(make_large))
