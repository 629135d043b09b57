"""Copies of many arrays: equal, in memory of their own, and where and as committed as the arrays are."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshes import compilations
from statewise._src.common import copying
from statewise._src.common.copying import copies_of

MANY = copying._MANY


def facts(array: jax.Array) -> tuple[Any, ...]:
    return array.shape, array.dtype, array.weak_type, array.sharding, array.committed


def check(arrays: list[jax.Array]) -> None:
    copies = copies_of(arrays)
    assert list(map(facts, copies)) == list(map(facts, arrays))
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(copy))
    own = {shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards if array.size}
    new = {shard.data.unsafe_buffer_pointer() for copy in copies for shard in copy.addressable_shards if copy.size}
    assert len(new) == sum(len(copy.addressable_shards) for copy in copies if copy.size)
    assert not own & new


def kinds() -> list[jax.Array]:
    """One array of each kind that there is."""
    mesh = jax.make_mesh((4,), ("data",))
    with jax.default_device(jax.devices()[2]):
        elsewhere = jnp.arange(6.0)
    return [
        jnp.arange(6.0),
        jnp.arange(6, dtype=jnp.bfloat16),
        jnp.asarray(3.0),
        jnp.asarray(1) * 2,
        jnp.zeros((0, 3)),
        jnp.ones((), bool),
        elsewhere,
        jax.device_put(jnp.arange(6.0), jax.devices()[1]),
        jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("data"))),
    ]


@pytest.mark.parametrize("count", [0, 1, 9, MANY - 1])
def test_few(count: int) -> None:
    check(list(itertools.islice(itertools.cycle(kinds()), count)))


def test_arrays_of_one_type_are_copied_by_one_program_however_many() -> None:
    arrays = jax.device_put([np.full(3, number, np.float32) for number in range(MANY + 70)])
    check(arrays)
    with compilations() as compiled:
        copies_of(arrays)
        copies_of(jax.device_put([np.full(3, number, np.float32) for number in range(2 * MANY)]))
    assert compiled == []


def test_many_of_every_kind() -> None:
    arrays = [array for array in kinds() for _ in range(MANY + 1)]
    check([array.copy() if not array.committed else array for array in arrays])


def test_the_default_device_of_the_moment_does_not_matter() -> None:
    arrays = jax.device_put([np.full(3, number, np.float32) for number in range(MANY)])
    with jax.default_device(jax.devices()[1]):
        check(arrays)
