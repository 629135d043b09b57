"""Makes the golden checkpoints of each version of Flax that changed the type of a leaf, and the tables of its layers.

`PYTHONPATH=tests/helpers python tests/golden/make_flax.py` writes those of the installed version, if they are missing.
What is written on one side of a change has to restore on the other.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from flax_layers import leaf_types

HERE = Path(__file__).parent
VERSION = metadata.version("flax")
NAME = f"flax-{VERSION}"
X = jnp.arange(6.0).reshape(3, 2) / 4


class Model(nnx.Module):
    """A normalized layer in a list, one at the top, statistics, and noise."""

    def __init__(self) -> None:
        self.first = normalized(0)
        self.others = nnx.List([normalized(1)])
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(2))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.others[0](self.first(x)))
        return self.drop(x)


def ramp(_: Any, shape: tuple[int, ...]) -> jax.Array:
    """Scales that differ from each other."""
    return jnp.linspace(0.5, 1.5, *shape)


def normalized(seed: int) -> nnx.WeightNorm:
    """A layer whose scales are not all one."""
    rngs = nnx.Rngs(seed)
    return nnx.WeightNorm(nnx.Linear(2, 2, rngs=rngs), scale_init=ramp, rngs=rngs)


def plan() -> sw.Plan:
    """The plan of each of these checkpoints."""
    averages = {"params": sw.EMA(0.9)}
    return sw.plan(Model(), optimizers={"params": optax.adam(0.1)}, averages=averages)


@sw.train_step(writes=("params", "stats", "rng"))  # the layer normalizes its own kernel
def train(model: Model, x: jax.Array) -> jax.Array:
    """Moves every kind."""
    return (model(x) ** 2).mean()


def trained() -> sw.State:
    """A state after two steps."""
    state = plan().take(Model())
    for step in range(2):
        state, _ = train(state, X + step)
    return state


def output(state: sw.State) -> Any:
    """What the model of a state computes, without noise."""
    model = state.plan.build(state)
    model.eval()
    return np.asarray(model(X)).tolist()


def values(state: sw.State) -> dict[str, Any]:
    """The arrays of a state as dtype, shape and bytes, by path: the kind of a leaf is what may change."""
    found = {}
    for keys, array in jax.tree_util.tree_flatten_with_path(state)[0]:
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        words = np.asarray(jax.random.key_data(array) if is_key else array)
        kind, _, path = keys[0].key.partition("/")
        path = path if kind not in ("optimizer", "ema") else keys[0].key
        found[path] = [str(array.dtype), list(array.shape), words.tobytes().hex()]
    return found


def main() -> None:
    """The checkpoint of the installed Flax, what it holds, and the types of all leaves that its layers have."""
    if not (HERE / NAME).exists():
        state = trained()
        sw.save(HERE / NAME, state)
        content = {"layers": leaf_types(), "output": output(state), "values": values(state)}
        (HERE / f"{NAME}.json").write_text(json.dumps(content, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
