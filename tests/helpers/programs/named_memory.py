"""Reads files of other names; prints how many bytes the process grew by at most, and some of the values."""

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


def target_of(single: int, stacked: int, devices: int) -> sw.State:
    """An abstract state, of which each device has some rows of every matrix."""
    placement = lambda path, shape: sw.Sharded(*[None] * (len(shape) - 2), "data", None)  # noqa: E731
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement))
    plan = kinds.plan(nnx.eval_shape(lambda: Wide(single, stacked)))
    return plan.abstract(jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices]))


def warm_up() -> None:
    """Reads a small file, after which everything is imported."""
    plan = sw.plan(nnx.eval_shape(lambda: nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))))
    with tempfile.TemporaryDirectory() as folder:
        safetensors.numpy.save_file({"w": np.ones((3, 2), np.float32)}, f"{folder}/model.safetensors")
        sw.restore(folder, plan.abstract(), names=sw.Names({"kernel": sw.Name("w", "o i -> i o")}))


def measured(folder: str, single: int, stacked: int, devices: int) -> list[object]:
    """Reads a file; returns how many bytes the process grew by at most, and a number of each array."""
    target = target_of(single, stacked, devices)
    before = worker_memory.resident()
    state, _ = sw.restore(folder, target, names=NAMES)
    jax.block_until_ready(state)
    grown = worker_memory.peak() - before
    params = state["params"]
    numbers = [float(np.asarray(each[...])[5, 3]) for each in params["layers"].values()]
    return [grown, [*numbers, *np.asarray(params["stack"][...])[:, 3, 5].tolist()]]


if __name__ == "__main__":
    warm_up()
    found = []
    for folder, single, stacked, devices in json.loads(sys.argv[1]):  # the smaller first
        found.append(measured(folder, single, stacked, devices))
        worker_memory.clear()
    print(json.dumps(found))
