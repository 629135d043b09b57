"""Training in several processes: on a cluster, or in a few terminals of one machine.

Every process runs this same program on its own devices; JAX makes one mesh of all of them.  Parameters and moments are
split over it, a batch too, the rest is on every device.  A checkpoint is written by all processes together, each its
own part, and restored by any number of them.

Two processes on one machine, each with two devices that XLA makes of the CPU:

    python -m statewise.examples.multihost run --coordinator localhost:7777 --processes 2 --process 0 --cpu-devices 2 &
    python -m statewise.examples.multihost run --coordinator localhost:7777 --processes 2 --process 1 --cpu-devices 2

On Slurm, on Open MPI and on TPU pods JAX finds the others by itself: the directory is then all that it takes.  Kill
a process, start all of them again, as many as you like, and the training goes on from the newest complete step.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw

__all__ = ["Network", "batch_of", "main", "make_plan", "train", "train_until"]

FEATURES, HIDDEN, BATCH = 16, 64, 32


class Network(nnx.Module):
    """A network with all that has to come back: parameters, statistics, random streams."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (batch, features) to (batch, 1)."""
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def make_model() -> Network:
    """The same model in every process: the same seed."""
    return Network(nnx.Rngs(0))


def split(path: Any, shape: tuple[int, ...]) -> sw.Sharded | sw.Replicated:
    """Splits the first axis over all devices, where it can be."""
    return sw.Sharded("data") if shape and shape[0] % jax.device_count() == 0 else sw.Replicated()


def make_plan() -> sw.Plan:
    """What there is and where it lies; no array is made."""
    kinds = sw.Kinds.standard()
    kinds = kinds.replace(params=dataclasses.replace(kinds["params"], placement=split))
    return kinds.plan(nnx.eval_shape(make_model), optimizers={"params": optax.adam(1e-2)})


@sw.train_step
def train(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error."""
    return jnp.mean((model(x) - y) ** 2)


def batch_of(step: int, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """The batch of a step, split over all devices: each process makes the rows that its own devices hold."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    random = np.random.default_rng(step)
    x = random.standard_normal((BATCH, FEATURES), np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True))

    def placed(whole: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return placed(x), placed(y)


def train_until(last: int, directory: str, *, every: int = 5, mesh: jax.sharding.Mesh | None = None) -> sw.State:
    """Trains up to a step, from the newest checkpoint if there is one; saves as it goes.

    Args:
      last: the number of the last step.
      directory: where the checkpoints go; on a file system that all processes see.
      every: steps between two checkpoints.
      mesh: all devices, in one axis, by default.

    Returns:
      the state after the last step.
    """
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    plan = make_plan()
    with sw.Checkpoints(directory, every=every, max_to_keep=3) as checkpoints:
        if checkpoints.latest is None:
            state, done = plan.init(make_model, mesh), 0
        else:
            state, _, done, _ = checkpoints.restore(plan.abstract(mesh))
            _say(f"resumed from step {done}")
        for step in range(done + 1, last + 1):
            state, loss = train(state, *batch_of(step, mesh))
            checkpoints.save(step, state)
            _say(f"step {step} loss {float(loss).hex()} = {float(loss):.4f}")
    return state


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m statewise.examples.multihost", description="Train together.")
    parser.add_argument("directory", help="where the checkpoints go; every process has to see it")
    parser.add_argument("--steps", type=int, default=20, help="the number of the last step (20)")
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints (5)")
    parser.add_argument("--coordinator", help="host:port of process 0; on Slurm, Open MPI and TPU found by JAX")
    parser.add_argument("--processes", type=int, help="how many processes; found like the coordinator")
    parser.add_argument("--process", type=int, help="which of them this is, from 0; found like the coordinator")
    parser.add_argument("--cpu-devices", type=int, help="run on this many devices that XLA makes of the CPU")
    given = parser.parse_args(arguments)
    if given.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", given.cpu_devices)
    jax.distributed.initialize(given.coordinator, given.processes, given.process)
    try:
        train_until(given.steps, given.directory, every=given.every)
    finally:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
