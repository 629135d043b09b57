"""One of several processes that place a model, which each has, on the devices of all; run by test_save_together.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[5]}"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from meshes import number


class Step(nnx.Variable):
    """A counter."""


class Net(nnx.Module):
    """Weights that are split, statistics, a scalar and random streams that are replicated."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.steps = Step(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.steps[...] += 1
        return self.drop(self.norm(self.up(x)))


def kinds(rng: sw.Sharded | sw.Replicated | sw.PerDevice) -> sw.Kinds:
    """Weights split along their last axis, and the streams as is said."""
    return sw.Kinds(
        params=sw.Kind(nnx.Param, placement=lambda path, shape: sw.Sharded(*(None,) * (len(shape) - 1), "data")),
        stats=sw.Kind(nnx.BatchStat, restart=lambda array, key: jax.random.normal(key, array.shape, array.dtype)),
        rng=sw.Kind(nnx.RngState, placement=rng, missing="restart", restart=lambda value: value),
        steps=sw.Kind(Step, missing="restart", restart=jnp.zeros_like),
    )


def here(array: jax.Array) -> list[tuple[object, np.ndarray]]:
    """The parts of an array that this process holds, each with its place."""
    return [(shard.index, number(shard.data)) for shard in array.addressable_shards]


def check_same(placed: jax.Array, own: jax.Array) -> None:
    """Each part on each device of this process is that of the array that the process has."""
    assert placed.shape == own.shape
    assert len(placed.addressable_shards) == jax.local_device_count()
    whole = number(own)
    for index, values in here(placed):
        np.testing.assert_array_equal(values, whole[index])


def check_taken(plan: sw.Plan, mesh: jax.sharding.Mesh) -> sw.State:
    """A model's state on the mesh holds what the model holds, however it is taken."""
    own = plan.take(Net())
    for options in ({}, {"copy": False}, {"pack": ("stats",)}):
        state = plan.take(Net(), mesh=mesh, **options)
        for kind in ("params", "stats", "rng", "steps"):
            for placed, array in zip(jax.tree.leaves(state[kind]), jax.tree.leaves(own[kind]), strict=True):
                check_same(placed, array)
    return plan.take(Net(), mesh=mesh)


def check_kept(plan: sw.Plan, state: sw.State, mesh: jax.sharding.Mesh, folder: str) -> None:
    """What is saved comes back, and what a checkpoint lacks starts again, on the devices of all processes."""
    sw.save(f"{folder}/all", state)
    back, _ = sw.restore(f"{folder}/all", plan.abstract(mesh))
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        for (_, one), (_, other) in zip(here(ours), here(theirs), strict=True):
            np.testing.assert_array_equal(one, other)
    sw.save(f"{folder}/some", state, only=("params", "stats", "optimizer"))
    target = plan.take(Net(), mesh=mesh)
    back, report = sw.restore(f"{folder}/some", target)
    assert report.counts["rng"] == {"restarted": 2}, report
    for fresh, own in zip(jax.tree.leaves(back["rng"]), jax.tree.leaves(target["rng"]), strict=True):
        for (_, one), (_, other) in zip(here(fresh), here(own), strict=True):
            np.testing.assert_array_equal(one, other)
    assert [values.item() for _, values in here(back["steps"]["steps"])] == [0] * jax.local_device_count()


def check_elsewhere(plan: sw.Plan, folder: str) -> None:
    """On a mesh of one process alone that process restores, and the others say why they cannot."""
    mesh = jax.sharding.Mesh(np.array([each for each in jax.devices() if each.process_index == 0]), ("data",))
    path = f"{folder}/all"
    if jax.process_index() == 0:
        back, _ = sw.restore(path, plan.abstract(mesh))
        assert all(array.is_fully_addressable for array in jax.tree.leaves(back))
        return
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(path, plan.abstract(mesh))
    assert caught.value.message == f"{path} cannot be restored in process 1: the target is on devices of another one."
    assert "goes to process 0 alone" in str(caught.value)
    assert caught.value.hint.startswith("a mesh with devices of every process; or ")


def main(process: int, count: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    train = sw.train_step(lambda model, x: jnp.mean(model(x) ** 2))
    batch = np.random.default_rng(0).standard_normal((16, 4), np.float32)
    x = jax.make_array_from_callback(batch.shape, jax.NamedSharding(mesh, jax.P("data")), lambda index: batch[index])
    plan = kinds(sw.Replicated()).plan(Net(), optimizers={"params": optax.adam(1e-2)})
    state = check_taken(plan, mesh)
    losses = []
    for _ in range(3):
        state, loss = train(state, x)
        losses.append(float(loss))
    check_kept(plan, state, mesh, folder)
    check_elsewhere(plan, folder)
    key = jax.device_put(jax.random.key(7), jax.local_devices()[0])
    alone = jax.tree.leaves(plan.take(Net()).restart("stats", key=key)["stats"])
    for placed, own in zip(jax.tree.leaves(state.restart("stats", key=key)["stats"]), alone, strict=True):
        check_same(placed, own)
    each = kinds(sw.PerDevice("data")).plan(Net()).take(Net(), mesh=mesh)
    own = jax.random.key_data(jax.tree.leaves(plan.take(Net())["rng"])[-1])
    assert all(values.shape[1:] == own.shape for _, values in here(jax.tree.leaves(each["rng"])[-1]))
    print("losses", *(f"{loss:.6f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
