"""A small model, a train step and plans with averages, for the tests of `sw.EMA`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_bias=False, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.tanh(self.norm(self.first(x))))


def batch(number: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), (6, 3))


def loss_of(model: Net, x: jax.Array) -> jax.Array:
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    return ((model(x) - 1.0) ** 2).mean() + sum(leaf[...].sum() for leaf in params)


train = sw.train_step(loss_of)
SGD = {"params": optax.sgd(0.1)}


def warmup(count: jax.Array) -> jax.Array:
    return jnp.minimum(0.9, (1 + count) / (10 + count))


def planned(averages: Any, optimizers: Any = SGD, kinds: sw.Kinds | None = None) -> tuple[Net, sw.Plan]:
    model = Net(nnx.Rngs(0))
    return model, (kinds or sw.Kinds.standard()).plan(model, optimizers=optimizers, averages=averages)


def close(one: Any, other: Any) -> None:
    ours, theirs = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-5, atol=1e-6)
