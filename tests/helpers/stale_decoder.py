"""A decoder whose cache depends on its parameters, and steps that read it, write it, or change those."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import statewise as sw

X = jnp.array([1.0, 2.0])


class Decoder(nnx.Module):
    """A sum for each of two slots: what it has read, times the scale at that time."""

    def __init__(self, value: Any = 1.0) -> None:
        self.scale = nnx.Param(jnp.full((), value))
        self.shift = nnx.LoRAParam(jnp.zeros(()))
        self.sum = nnx.Cache(jnp.zeros(2))

    def __call__(self, x: Any) -> jax.Array:
        self.sum[...] += (self.scale[...] + self.shift[...]) * x
        return self.sum[...]


CACHE = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0, depends_on=("params", "lora"))
KINDS = sw.Kinds.standard().replace(cache=CACHE)
OPTIMIZERS: Any = {"params": optax.sgd(0.125), "lora": optax.sgd(0.125)}
AVERAGES: Any = {"params": sw.EMA(0.5)}
PLAN = KINDS.plan(Decoder(), optimizers=OPTIMIZERS, averages=AVERAGES)


@sw.step(writes="cache")
def decode(decoder: Decoder, x: Any) -> jax.Array:
    return decoder(x)


@sw.step
def evaluate(decoder: Decoder, x: Any) -> jax.Array:
    return decoder.sum[...] * x


@sw.step
def forward(decoder: Decoder, x: Any) -> jax.Array:
    return decoder.scale[...] * x


@sw.step(writes="cache")
def fill(decoder: Decoder, x: Any) -> None:
    decoder.sum[...] = decoder.scale[...] * x


@sw.train_step(wrt="params")
def train(decoder: Decoder, x: Any) -> jax.Array:
    return (decoder.scale[...] * x).sum() ** 2


def declared(**changes: Any) -> sw.Plan:
    return KINDS.replace(cache=dataclasses.replace(CACHE, **changes)).plan(Decoder(), optimizers=OPTIMIZERS)


def decoded(plan: sw.Plan = PLAN, **options: Any) -> sw.State:
    state, _ = decode(plan.take(Decoder(), **options), X)
    return state


def moved(state: sw.State, kind: str = "params") -> sw.State:
    return state.replace(**{kind: jax.tree.map(lambda array: array + 1, state[kind])})


def is_stale(state: sw.State) -> bool:
    try:
        evaluate(state, X)
    except sw.StaleError:
        return True
    return False
