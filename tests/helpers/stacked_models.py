"""A small model with every kind in it, a train step and ensembles of it, for the tests of `plan.stacked`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from comparing import data


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        # Before a norm a bias has no gradient but rounding, which Adam would blow up.
        self.dense = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)
        self.seen = nnx.Cache(jnp.zeros((2, 3)))
        self.steps = nnx.Variable(jnp.array(0))
        self.pair = nnx.Variable({"a": jnp.ones(2), "b": jnp.zeros((), jnp.bfloat16)}, ref=False)
        self.table = nnx.data(jnp.arange(3.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.drop(nnx.tanh(self.norm(self.dense(x)))))


KINDS = sw.Kinds.standard().replace(cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0))
OPTIMIZERS = {"params": optax.adam(1e-2)}
AVERAGES = {"params": sw.EMA(0.9)}
X = jax.random.normal(jax.random.key(1), (4, 5, 3))
Y = X.sum(-1, keepdims=True)


def make(key: jax.Array) -> Net:
    return Net(nnx.Rngs(key))


def keys(members: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), members)


PLAN = KINDS.plan(make(jax.random.key(0)), optimizers=OPTIMIZERS, averages=AVERAGES)


def states_of(members: int, seed: int = 0, pack: Any = False, plan: sw.Plan = PLAN) -> list[sw.State]:
    return [plan.take(make(key), pack=pack) for key in keys(members, seed)]


def loss_of(model: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    model.steps[...] += 1
    return ((model(x) - y) ** 2).mean()


train = sw.train_step(loss_of)


@sw.step(writes="cache")
def remember(model: Net, x: jax.Array) -> jax.Array:
    model.seen[...] += x
    return model.seen[...].sum()


def trained(states: sw.State, x: jax.Array, y: jax.Array) -> tuple[sw.State, jax.Array]:
    axes = states.plan.axes()
    made: tuple[sw.State, jax.Array] = jax.vmap(train, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, x, y)
    return made


def same(one: Any, other: Any) -> None:
    """To the bit, structure and plan included."""
    mine, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
    assert mine[1] == theirs[1]
    for a, b in zip(mine[0], theirs[0], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(data(a)).tobytes() == np.asarray(data(b)).tobytes()


def close(one: Any, other: Any) -> None:
    mine, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
    assert mine[1] == theirs[1]
    for a, b in zip(mine[0], theirs[0], strict=True):
        np.testing.assert_allclose(np.asarray(data(a), float), np.asarray(data(b), float), rtol=2e-5, atol=1e-6)
