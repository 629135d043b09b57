"""One network twice, in Linen and in NNX, and a model with one of everything: for conversions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw

X = jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)


class LinenNet(nn.Module):
    """Not of Statewise, and not of NNX."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(3, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="out")(x)


class Net(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.norm(self.dense(x)))


class Odd(nnx.Module):
    """One of everything: lists, ties, keys, no elements, no axes, small dtypes, values of several arrays."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.tied = self.layers[0].kernel
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.empty = nnx.Variable(jnp.zeros((0, 3)))
        self.count = nnx.Variable(jnp.array(3, jnp.int32))
        self.half = nnx.Param(jnp.arange(2, dtype=jnp.bfloat16))
        self.quarter = nnx.Variable(jnp.arange(3).astype(jnp.float8_e4m3fn))
        self.several = nnx.Variable({"a": jnp.ones(2), "b": (jnp.zeros(3), jnp.array(True))})
        self.old_key = nnx.Variable(jax.random.key(4, impl="rbg"))


def linen(seed: int = 0) -> dict[str, Any]:
    """Variables after one step of training, so that the statistics are none of the initial ones."""
    variables = LinenNet().init(jax.random.key(seed), X)
    _, written = LinenNet().apply(variables, X, train=True, mutable=["batch_stats"])
    return {"params": variables["params"], "batch_stats": written["batch_stats"]}


def state_of(seed: int = 1) -> sw.State:
    net = Net(nnx.Rngs(seed))
    return sw.plan(net).take(net)


def odd(seed: int = 0, **optimizers: Any) -> sw.State:
    model = Odd(nnx.Rngs(seed))
    return sw.plan(model, optimizers=optimizers or None).take(model)


def equal(one: Any, other: Any) -> bool:
    """Whether two nested dicts hold the same arrays."""
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
