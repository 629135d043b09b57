"""A layer with five kinds, three of which depend on others, and steps that read and write them in every way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import statewise as sw


class Adapter(nnx.Variable):
    pass


class Memo(nnx.Variable):
    pass


class Draft(nnx.Variable):
    pass


class Layer(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(2))
        self.shift = Adapter(jnp.ones(2))
        self.sum = nnx.Cache(jnp.zeros(4))
        self.memo = Memo(jnp.zeros(2))
        self.draft = Draft(jnp.zeros(2))

    def current(self, x: Any) -> jax.Array:
        return (self.scale[...] * x + self.shift[...]).sum()


KINDS = sw.Kinds(
    params=sw.Kind(nnx.Param),
    adapter=sw.Kind(Adapter),
    cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0, depends_on=("params", "adapter")),
    # Depends on the cache, and so on what that depends on.
    memo=sw.Kind(Memo, restart=jnp.zeros_like, depends_on="cache"),
    draft=sw.Kind(Draft, saved=False, restart=jnp.zeros_like, depends_on="params", stale="restart"),
)
SOURCES = {"cache": ("params", "adapter"), "memo": ("params", "adapter", "cache"), "draft": ("params",)}
PLAN = KINDS.plan(
    Layer(), optimizers={"params": optax.sgd(0.1), "adapter": optax.sgd(0.1)}, averages={"params": sw.EMA(0.5)}
)


@sw.train_step(wrt="params")
def train(layer: Layer, x: Any) -> jax.Array:
    return layer.current(x) ** 2


@sw.train_step(wrt="adapter")
def tune(layer: Layer, x: Any) -> jax.Array:
    return layer.current(x) ** 2


@sw.train_step(wrt="params", writes="cache")
def train_and_decode(layer: Layer, x: Any) -> jax.Array:
    layer.sum[...] += layer.current(x)
    return layer.current(x) ** 2


@sw.step(writes="cache")
def decode(layer: Layer, x: Any) -> jax.Array:
    layer.sum[...] += layer.current(x)
    return layer.sum[...].sum()


@sw.step(writes="cache")
def fill(layer: Layer, x: Any) -> None:
    layer.sum[...] = jnp.full(4, layer.current(x))


@sw.step(writes=("params", "cache"))
def load(layer: Layer, x: Any) -> None:
    layer.scale[...] = jnp.full(2, x)
    layer.sum[...] = jnp.full(4, layer.scale[...].sum())


@sw.step(writes="memo")
def memoize(layer: Layer, x: Any) -> None:
    layer.memo[...] += layer.sum[...].sum() * x


@sw.step
def read_memo(layer: Layer, x: Any) -> jax.Array:
    return layer.memo[...].sum() * x


@sw.step(writes="draft")
def sketch(layer: Layer, x: Any) -> None:
    layer.draft[...] += layer.scale[...] * x


@sw.step
def read_draft(layer: Layer, x: Any) -> jax.Array:
    return layer.draft[...].sum() * x
