"""One array from devices to devices: the values, the place, no shared memory, and no way through the host."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from comparing import data
from statewise._src.sharding.device_put import moved

P = jax.P


def places() -> dict[str, Any]:
    devices = np.array(jax.devices())
    four, other, two = devices[:4], devices[4:], devices[4:6]
    return {
        "one": SingleDeviceSharding(devices[0]),
        "another": SingleDeviceSharding(devices[7]),
        "split over 2x2": NamedSharding(Mesh(four.reshape(2, 2), ("a", "b")), P("a", "b")),
        "split over 4": NamedSharding(Mesh(four, ("c",)), P(None, "c")),
        "whole on 4": NamedSharding(Mesh(four, ("c",)), P()),
        "split over 4, backwards": NamedSharding(Mesh(four[::-1], ("c",)), P("c")),
        "split over 4 others": NamedSharding(Mesh(other, ("c",)), P("c")),
        "whole on 4 others": NamedSharding(Mesh(other, ("c",)), P()),
        "explicitly split over 4": NamedSharding(Mesh(four, ("e",), axis_types=(AxisType.Explicit,)), P("e")),
        "split over 2": NamedSharding(Mesh(two, ("c",)), P("c")),
        "split over 8": NamedSharding(Mesh(devices.reshape(2, 4), ("a", "b")), P(("a", "b"))),
    }


def pointers(array: jax.Array) -> set[int]:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(array) if is_key else array
    return {shard.data.unsafe_buffer_pointer() for shard in words.addressable_shards}


@pytest.mark.parametrize("of", ["numbers", "keys"])
def test_from_anywhere_to_anywhere_on_the_devices(of: str) -> None:
    """The host's memory is out of bounds: from here to there and back, an array never leaves the devices."""
    given = jnp.arange(64.0).reshape(8, 8) if of == "numbers" else jax.random.split(jax.random.key(0), (8, 8))
    for here, there in itertools.product(places().values(), repeat=2):
        array = jax.device_put(given, here)
        with (
            jax.transfer_guard_device_to_host("disallow_explicit"),
            jax.transfer_guard_host_to_device("disallow_explicit"),
        ):
            found = jax.block_until_ready(moved(array, there))
        assert found.sharding.is_equivalent_to(there, 2)
        assert np.array_equal(data(found), data(given))
        assert not pointers(found) & pointers(array)


def test_the_same_pieces_on_another_mesh_are_of_that_mesh() -> None:
    devices = np.array(jax.devices())
    explicit = {"axis_types": (AxisType.Explicit,)}
    one, other = Mesh(devices, ("a",), **explicit), Mesh(devices, ("b",), **explicit)
    array = jax.device_put(jnp.arange(8.0), NamedSharding(one, P()))
    found = moved(array, NamedSharding(other, P()))
    assert found.sharding == NamedSharding(other, P())
    assert not pointers(found) & pointers(array)
    split = jax.device_put(jnp.arange(8.0), NamedSharding(other, P("b")))
    assert np.array_equal(jax.jit(jnp.add)(found, split), 2 * np.arange(8.0))  # JAX refuses arrays of two meshes


def test_what_jax_itself_would_take_through_the_host() -> None:
    """Should this begin to fail, then JAX has learned it, and `moving` can go."""
    array = jax.device_put(jnp.arange(64.0).reshape(8, 8), places()["split over 2x2"])
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"),
        jax.transfer_guard_device_to_host("disallow_explicit"),
        jax.transfer_guard_host_to_device("disallow_explicit"),
    ):
        jax.device_put(array, places()["split over 4 others"])
