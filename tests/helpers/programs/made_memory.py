"""Makes a model in a process of its own and prints how much memory that took; run by test_placement_peak.py."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

import statewise as sw

LEAVES, SIDE = 12, 2048


def make() -> nnx.Dict:
    """201 MB of parameters; not drawn at random, which takes as much memory again, of each device for its own part."""
    return nnx.Dict(**{f"w{number}": nnx.Param(jnp.full((SIDE, SIDE), float(number))) for number in range(LEAVES)})


def used() -> int:
    """The most that this process has had, in bytes; `getrusage` would count what its parent had when it was forked."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(how: str) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    kinds = sw.Kinds.standard()
    kinds = kinds.replace(params=dataclasses.replace(kinds["params"], placement=sw.Sharded("data")))
    plan = kinds.plan(nnx.eval_shape(make))
    jnp.zeros(8).block_until_ready()
    before = used()
    state = plan.init(make, mesh) if how == "init" else plan.take(make(), mesh=mesh)
    jax.block_until_ready(state)
    largest = max(
        sum(
            shard.data.nbytes
            for array in jax.tree.leaves(state)
            for shard in array.addressable_shards
            if shard.device == device
        )
        for device in mesh.devices.flat
    )
    print(used() - before, largest)


if __name__ == "__main__":
    main(sys.argv[1])
