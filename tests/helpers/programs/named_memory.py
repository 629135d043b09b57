"""Reads a file of other names; prints how many bytes the process grew by at most, and some of the values."""

from __future__ import annotations

import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

import statewise as sw
import worker_memory

SIDE = 4096


class Wide(nnx.Module):
    """Matrices one by one, and others stacked."""

    def __init__(self, single: int, stacked: int) -> None:
        self.layers = nnx.List([nnx.Param(jnp.zeros((SIDE, SIDE))) for _ in range(single)])
        self.stack = nnx.Param(jnp.zeros((stacked, SIDE, SIDE)))


NAMES = sw.Names(
    {
        "layers/{i}": "model.layers.{i}.weight",
        "stack": sw.Name("model.blocks.{i}.weight", "layer o i -> layer i o"),
    }
)


def target_of(single: int, stacked: int) -> sw.State:
    """An abstract state: on a mesh if there are several devices, every matrix in rows."""
    placement = lambda path, shape: sw.Sharded(*[None] * (len(shape) - 2), "data", None)  # noqa: E731
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement))
    plan = kinds.plan(nnx.eval_shape(lambda: Wide(single, stacked)))
    return plan.abstract(jax.make_mesh((jax.device_count(),), ("data",)))


def warm_up() -> None:
    """Reads a small file, after which everything is imported."""
    plan = sw.plan(nnx.eval_shape(lambda: nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))))
    with tempfile.TemporaryDirectory() as folder:
        safetensors.numpy.save_file({"w": np.ones((3, 2), np.float32)}, f"{folder}/model.safetensors")
        sw.restore(folder, plan.abstract(), names=sw.Names({"kernel": sw.Name("w", "o i -> i o")}))


if __name__ == "__main__":
    target = target_of(int(sys.argv[2]), int(sys.argv[3]))
    warm_up()
    before = worker_memory.peak()
    state, _ = sw.restore(sys.argv[1], target, names=NAMES)
    jax.block_until_ready(state)
    grown = worker_memory.peak() - before
    params = state["params"]
    single = [float(np.asarray(each[...])[5, 3]) for each in params["layers"].values()]
    print(json.dumps([grown, single, np.asarray(params["stack"][...])[:, 3, 5].tolist()]))
