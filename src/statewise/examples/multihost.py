"""Training in several processes: on a cluster, or in a few terminals of one machine.

Every process runs this same program on its own devices; JAX makes one mesh of all of them.  Parameters, moments and
batches are sharded over it, and everything else is replicated.  All processes write a checkpoint together, each its own
part, and any number of processes can restore it.

Two processes on one machine, each with two devices that XLA simulates on the CPU:

    python -m statewise.examples.multihost run --coordinator localhost:7777 --processes 2 --process 0 --cpu-devices 2 &
    python -m statewise.examples.multihost run --coordinator localhost:7777 --processes 2 --process 1 --cpu-devices 2

On Slurm, Open MPI and TPU pods JAX finds the other processes by itself, and only the directory is needed.  Kill a
process, start all of them again, in any number, and training continues from the newest complete step.  Send SIGTERM to
one, as machines that are taken away do: all save the same step, and end.
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
    """A network with everything that a restart must restore: parameters, statistics, random streams."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, features) to (batch, 1)."""
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def make_model() -> Network:
    """Makes the same model in every process, from the same seed."""
    return Network(nnx.Rngs(0))


def split(path: Any, shape: tuple[int, ...]) -> sw.Sharded | sw.Replicated:
    """Shards the first axis over all devices if it divides evenly."""
    return sw.Sharded("data") if shape and shape[0] % jax.device_count() == 0 else sw.Replicated()


def make_plan() -> sw.Plan:
    """Plans the model with its placements; makes no array."""
    kinds = sw.Kinds.standard()
    kinds = kinds.replace(params=dataclasses.replace(kinds["params"], placement=split))
    return kinds.plan(nnx.eval_shape(make_model), optimizers={"params": optax.adam(1e-2)})


@sw.train_step
def train(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Trains one step on the mean squared error."""
    return jnp.mean((model(x) - y) ** 2)


def batch_of(step: int, mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array]:
    """Returns the batch of a step, sharded over all devices: each process makes the rows of its own devices."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    random = np.random.default_rng(step)
    x = random.standard_normal((BATCH, FEATURES), np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True))

    def placed(batch: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])

    return placed(x), placed(y)


def train_until(last: int, directory: str, *, every: int = 5, mesh: jax.sharding.Mesh | None = None) -> sw.State:
    """Trains up to a step, from the newest checkpoint if there is one, and saves along the way.

    Args:
      last: the number of the last step.
      directory: the directory of the checkpoints, on a file system that all processes share.
      every: the number of steps between two checkpoints.
      mesh: the mesh; by default all devices along one axis.

    Returns:
      the state after the last step; after an earlier one if a process was sent SIGTERM.
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
            if checkpoints.manager.reached_preemption(step):  # then this step is saved, whatever `every` says
                _say(f"preempted at step {step}")
                break
    return state


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m statewise.examples.multihost", description="Train together.")
    parser.add_argument("directory", help="the directory of the checkpoints, which all processes share")
    parser.add_argument("--steps", type=int, default=20, help="the number of the last step (20)")
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints (5)")
    parser.add_argument("--coordinator", help="host:port of process 0; JAX finds it on Slurm, Open MPI and TPU")
    parser.add_argument("--processes", type=int, help="the number of processes; found like the coordinator")
    parser.add_argument("--process", type=int, help="the index of this process, from 0; found like the coordinator")
    parser.add_argument("--cpu-devices", type=int, help="run on this many devices that XLA simulates on the CPU")
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
