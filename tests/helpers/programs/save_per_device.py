"""One of several processes that train with a value of its own on each device; run by test_save_together.py."""

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


class Net(nnx.Module):
    """Statistics and random streams that differ from device to device."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.up(x)))


def plan() -> sw.Plan:
    """The same plan in every process."""
    kinds = sw.Kinds.standard().replace(
        stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data", resize="mean")),
        rng=sw.Kind(nnx.RngState, placement=sw.PerDevice("data", resize="first")),
    )
    # Not Adam: the gradient of a bias before a norm is nothing but rounding, of which Adam makes steps of full size.
    return kinds.plan(nnx.eval_shape(Net), optimizers={"params": optax.sgd(1e-2, momentum=0.9)})


def trained(mesh: jax.sharding.Mesh) -> sw.State:
    """A state after three steps on a mesh."""
    train = sw.train_step(lambda model, x: jnp.mean(model(x) ** 2))
    batch = np.random.default_rng(0).standard_normal((32, 4), np.float32)
    split = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.make_array_from_callback(batch.shape, split, lambda index: batch[index])
    state = plan().init(Net, mesh)
    for _ in range(3):
        state, _ = train(state, x)
    return state


def here(array: jax.Array) -> list[np.ndarray]:
    """The parts of an array that this process holds."""
    parts = [shard.data for shard in array.addressable_shards]
    keys = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(part) if keys else part) for part in parts]


def main(number: int, count: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = trained(mesh)
    sw.save(f"{folder}/together", state)
    back, report = sw.restore(f"{folder}/together", plan().abstract(mesh))
    assert report.counts["stats"] == {"restored": 2}
    assert report.counts["rng"] == {"restored": 2}
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        for one, other in zip(here(ours), here(theirs), strict=True):
            np.testing.assert_array_equal(one, other)
    print("the same", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
