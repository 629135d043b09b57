"""Reads a folder of other names; prints how many bytes the process grew by at most."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw
import worker_memory

SIDE, LEAVES = 4096, 4


class Wide(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([nnx.Param(jnp.zeros((SIDE, SIDE))) for _ in range(LEAVES)])


if __name__ == "__main__":
    plan = sw.plan(nnx.eval_shape(Wide))
    names = sw.Names({"layers/{i}": sw.Name("model.layers.{i}.weight", "o i -> i o")})
    target = plan.abstract()
    jnp.zeros(3).block_until_ready()
    before = worker_memory.peak()
    state, _ = sw.restore(sys.argv[1], target, names=names)
    jax.block_until_ready(state)
    print(worker_memory.peak() - before, float(state["params"]["layers"][1][...][3, 5]))
