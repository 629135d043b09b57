"""One of several processes that save and restore a state together; run by test_save_together.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw


def make() -> nnx.Linear:
    """The same model in every process."""
    return nnx.Linear(8, 16, rngs=nnx.Rngs(0))


def spread(state: sw.State) -> sw.State:
    """A state over all devices of all processes: what can be is split, the rest is on each of them."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(array: jax.Array) -> jax.Array:
        splits = array.ndim and array.shape[0] % jax.device_count() == 0
        sharding = jax.NamedSharding(mesh, jax.P("all") if splits else jax.P())
        whole = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, state)


def assert_same_shards(state: sw.State, back: sw.State) -> None:
    """Asserts that two states have the same shardings, and the same values on the devices of this process."""
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert ours.sharding == theirs.sharding
        for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)


def main(number: int, count: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    model = make()
    state = spread(sw.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model))
    train = sw.train_step(lambda model, x: jnp.mean(model(x) ** 2))
    x = jnp.ones((4, 8))
    state, _ = train(state, x)
    sw.save(f"{folder}/together", state)
    back, report = sw.restore(f"{folder}/together", state)
    assert report.counts == {"params": {"restored": 2}, "optimizer": {"restored": 5}}
    assert_same_shards(state, back)
    print("the same", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
