"""One of two processes with Orbax's emergency manager: one replica each, and a step that only the second one has kept.

The first writes to the place that lasts, every second step; the second keeps each step on its own disk.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from orbax.checkpoint._src.multihost import multihost  # the manager asks for this call, which is nowhere else
from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

import statewise as sw
from programs.save_together import make

STEPS = 5


def shards(array: jax.Array) -> list[np.ndarray]:
    return [np.asarray(shard.data) for shard in array.addressable_shards]


def main(number: int, count: int, port: str, folder: str) -> None:
    flags.FLAGS.mark_as_parsed()
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    ocp.multihost.initialize_runtime_to_distributed_ids()
    multihost.initialize_distributed_to_device_ids()
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((count, 4), ("replica", "data"), axis_types=auto)
    state: Any = sw.plan(make()).init(make, mesh)
    local, lasting = Path(folder, f"local{number}"), Path(folder, "lasting")
    for place in (local, lasting):
        place.mkdir(parents=True, exist_ok=True)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), dict(state))
    options = emergency.CheckpointManagerOptions(
        local=emergency.LocalCheckpointOptions(save_interval_steps=1, max_to_keep=2),
        persistent=emergency.PersistentCheckpointOptions(save_interval_steps=2, max_to_keep=2),
    )
    with emergency.CheckpointManager(local, lasting, mesh, abstract, options=options) as manager:
        for step in range(1, STEPS + 1):
            state = state.replace(**{kind: jax.tree.map(jnp.negative, state[kind]) for kind in state})
            manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(dict(state))))
            manager.wait_until_finished()
    with emergency.CheckpointManager(local, lasting, mesh, abstract, options=options) as manager:
        step = manager.latest_step()
        back = state.replace(**manager.restore(step)["state"])
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        for ours, theirs in zip(shards(one), shards(other), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    print("the same at", step, flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
