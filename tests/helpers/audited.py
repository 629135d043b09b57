"""What tests of `audit` share: a model with every kind of state, and its rows as paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw

X = jax.ShapeDtypeStruct((4, 3), jnp.float32)


class Net(nnx.Module):
    """Everything at once: weights that train, one that cannot, statistics, randomness, a counter, a cache."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.unused = nnx.Param(jnp.ones(2))
        self.hits = nnx.Variable(jnp.array(0))
        self.last = nnx.Cache(jnp.zeros(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.hits[...] += 1
        y = self.drop(self.norm(self.dense(x)))
        self.last[...] = y[0]
        return y


def loss_of(model: Net, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def where(rows: tuple[sw.results.LeafAudit, ...], flag: str | None = None) -> list[str]:
    return [sw.format_path(row.path) for row in rows if flag is None or getattr(row, flag)]
