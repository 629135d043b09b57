"""One of several processes that save and restore a state together through Orbax; run by test_save_together.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable

import jax
import optax
import orbax.checkpoint as ocp

import statewise as sw
from programs.save_together import assert_same_shards, make, spread


def by_a_manager(folder: str, step: int, state: sw.State) -> None:
    """Through the first interface's manager."""
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.Composite(state=sw.checkpointable(state)))


def by_a_checkpointer(folder: str, step: int, state: sw.State) -> None:
    """Through the newer interface's."""
    with ocp.v1.training.Checkpointer(folder) as checkpointer:
        checkpointer.save_checkpointables(step, {"state": sw.checkpointable(state)})


def by_a_function(folder: str, step: int, state: sw.State) -> None:
    """Through the newer interface's function."""
    ocp.v1.save_checkpointables(f"{folder}/{step}", {"state": sw.checkpointable(state)})


WAYS: tuple[Callable[[str, int, sw.State], None], ...] = (by_a_manager, by_a_checkpointer, by_a_function)


def main(number: int, count: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    model = make()
    state = spread(sw.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model))
    for step, save in enumerate(WAYS, 1):
        save(f"{folder}/together", step, state)
    for step in range(1, len(WAYS) + 1):
        with ocp.CheckpointManager(f"{folder}/together") as manager:
            first = manager.restore(step, args=ocp.args.Composite(state=sw.checkpointable(state)))["state"]
        new = sw.checkpointable(state)
        ocp.v1.load_checkpointables(f"{folder}/together/{step}", {"state": new})
        for back in (first, new.state):
            assert_same_shards(state, back)
    print("the same", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
