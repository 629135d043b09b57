"""Makes the golden checkpoints: what this version of the format wrote, which every later one has to read.

`python tests/golden/make.py` writes those that are missing, and never writes one again: a new format gets a new set.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw

HERE = Path(__file__).parent


class Block(nnx.Module):
    """A layer, a norm, a Dropout: a kernel, statistics, a key and its count."""

    def __init__(self, seed: int) -> None:
        self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(seed))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(seed))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(seed + 10))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.dense(x)))


class Model(nnx.Module):
    """Integer keys, a tied layer, bfloat16, a value that is a dict, and an adapter."""

    def __init__(self) -> None:
        self.blocks = nnx.List([Block(0), Block(1)])
        self.tied = self.blocks[0].dense
        self.half = nnx.Param(jnp.linspace(-1, 1, 3).astype(jnp.bfloat16))
        self.several = nnx.Variable({"a.b": jnp.arange(3), "c/d": jnp.array([True, False])})
        self.lora = nnx.LoRA(2, 1, 2, rngs=nnx.Rngs(5))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.lora(x) * self.half[0].astype(x.dtype)


@sw.train_step
def train(model: Model, x: jax.Array) -> jax.Array:
    """A step of no sense, so that every kind moves."""
    return (model(x) ** 2).mean()


def plan() -> sw.Plan:
    """The plan of every golden checkpoint."""
    return sw.plan(Model(), optimizers={"params": optax.adam(0.1)})


def trained(steps: int) -> sw.State:
    """A state after some steps."""
    state = plan().take(Model())
    for step in range(steps):
        state, _ = train(state, jnp.arange(6.0).reshape(3, 2) + step)
    return state


def values(state: sw.State) -> dict[str, Any]:
    """Every array of a state as its dtype, shape and bytes, by kind and path."""
    found = {}
    for keys, array in jax.tree_util.tree_flatten_with_path(state)[0]:
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        words = np.asarray(jax.random.key_data(array) if is_key else array)
        found[jax.tree_util.keystr(keys)] = [str(array.dtype), list(array.shape), words.tobytes().hex()]
    return found


def write(name: str, state: sw.State, **options: Any) -> None:
    """A checkpoint and, beside it, what it has to restore to."""
    if (HERE / name).exists():
        return
    sw.save(HERE / name, state, **options)
    (HERE / f"{name}.json").write_text(json.dumps(values(state), indent=1, sort_keys=True) + "\n")


def main() -> None:
    """All of them."""
    state = trained(2)
    write("v1-named", state)
    write("v1-packed", state, layout="packed")
    adapted = state.replace(lora=jax.tree.map(lambda array: array + 0.25, state["lora"]))
    write("v1-adapter", adapted, only="lora", base=HERE / "v1-named")


if __name__ == "__main__":
    sys.exit(main())
