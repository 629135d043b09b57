"""One of several processes that save the steps of a run together; run by test_checkpoints_stores.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import optax
import orbax.checkpoint as ocp

import statewise as sw
from programs.save_together import assert_same_shards, make, spread


def main(number: int, count: int, port: str, directory: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    state = spread(sw.plan(make(), optimizers={"params": optax.adam(1e-2)}).take(make()))
    for first, options in ((1, None), (3, ocp.v1.training.Checkpointer)):
        with sw.Checkpoints(directory, max_to_keep=3, options=options) as checkpoints:
            for step in (first, first + 1):
                assert checkpoints.save(step, state, metrics={"loss": step / 2}, average=sw.checkpointable(state))
            checkpoints.wait()
            assert checkpoints.latest == first + 1
            back = checkpoints.restore(state, extra="metrics")
            assert back.extra == {"metrics": {"loss": (first + 1) / 2}}
            assert_same_shards(state, back.state)
    print("the same", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
