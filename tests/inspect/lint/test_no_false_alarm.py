"""Lint finds nothing in the layers that flax ships, fresh, used or with what trains them; nor in our examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from flax_layers import SHIPPED, attention, normalized, rngs
from linted import clean, codes
from statewise.examples import demo
from statewise.examples.char_model import CharTransformer
from statewise.examples.multi_state import BatchStat, MultiState


class Transformer(nnx.Module):
    def __init__(self) -> None:
        shared = rngs()
        self.embed = nnx.Embed(5, 4, rngs=shared)
        self.blocks = nnx.List([nnx.MultiHeadAttention(2, 4, rngs=shared, dropout_rate=0.1) for _ in range(2)])
        self.norms = nnx.List([nnx.LayerNorm(4, rngs=shared) for _ in range(2)])
        self.drop = nnx.Dropout(0.1, rngs=shared)
        self.rngs = shared


class Cnn(nnx.Module):
    def __init__(self) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs())
        self.norm = nnx.BatchNorm(4, rngs=rngs())
        self.act = nnx.relu
        self.init = nnx.initializers.normal(0.02)
        self.pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))


@nnx.vmap(in_axes=0, out_axes=0)
def stacked(key: jax.Array) -> nnx.Module:
    return nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(key)), nnx.Dropout(0.5, rngs=nnx.Rngs(key)))


LAYERS: dict[str, Callable[[], Any]] = SHIPPED | {
    "a transformer": Transformer,
    "a convolutional network": Cnn,
    "layers stacked by vmap": lambda: stacked(jax.random.split(jax.random.key(0), 3)),
    "MultiState": lambda: MultiState(3, 5, rngs()),
    "CharTransformer": lambda: CharTransformer(9, context=8, width=4, depth=2, heads=2, rngs=rngs()),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_fresh_layers_are_clean(layer: str) -> None:
    model = LAYERS[layer]()
    clean(model)
    clean(sw.plan(model))
    clean(sw.plan(model).take(model))


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "layers stacked by vmap"])
def test_abstract_layers_are_clean(layer: str) -> None:
    clean(nnx.eval_shape(LAYERS[layer]))


TRAINED = [name for name in LAYERS if not name.startswith("LoRA") and name != "Rngs"]


@pytest.mark.parametrize("layer", TRAINED)
def test_layers_with_what_trains_them_are_clean(layer: str) -> None:
    model = LAYERS[layer]()
    clean(model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param))
    if sw.count(model, nnx.Param):
        # The standard kinds declare no dependence: for a model that has a cache, lint proposes it.
        proposed = ["cache-without-dependence"] if sw.count(model, nnx.Cache) else []
        assert codes(sw.plan(model, optimizers={"params": optax.adamw(1e-3)})) == proposed


@pytest.mark.parametrize("layer", TRAINED)
def test_layers_with_an_average_are_clean(layer: str) -> None:
    model = LAYERS[layer]()
    clean(model, nnx.EMA(model, decay=0.9, only=nnx.Param))


@pytest.mark.parametrize("layer", ["LoRA", "LoRA over a base", "LoRALinear"])
def test_adapters_that_are_trained_alone_are_clean(layer: str) -> None:
    model = LAYERS[layer]()
    clean(model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam))
    clean(sw.plan(model, optimizers={"lora": optax.adamw(1e-3)}))


def test_weight_norm_is_clean_where_its_scales_are_variables() -> None:
    model = normalized()
    scales = [value for value in (model.scales or {}).values() if not isinstance(value, nnx.Variable)]
    # Flax 0.12.8 kept them as plain arrays, which no optimizer trains: what `raw-array` is there to say.
    assert codes(model) == (["raw-array"] if scales else [])


def test_a_model_that_was_trained_and_used_is_clean() -> None:
    model = Cnn()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def train(model: Cnn, optimizer: nnx.Optimizer, x: jax.Array) -> None:
        grads = nnx.grad(lambda model: model.drop(model.norm(model.conv(x))).mean())(model)
        optimizer.update(model, grads)

    for _ in range(2):
        train(model, optimizer, jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32))
    clean(model, optimizer)
    model.eval()
    clean(model, optimizer)
    model.train()
    clean(model)


def test_a_cache_in_use_is_clean() -> None:
    model = attention()
    model.eval()
    model(jnp.ones((2, 1, 4)))
    clean(model, decode_length=7)


def test_the_demo_and_its_kinds_are_clean() -> None:
    model = CharTransformer(9, context=8, width=4, depth=2, heads=2, rngs=rngs())
    clean(model, kinds=demo.KINDS)
    plan = demo.KINDS.plan(model, optimizers={"params": optax.adamw(1e-3)})
    clean(plan)
    clean(plan.take(model))


def test_the_worked_example_and_its_own_kinds_are_clean() -> None:
    kinds = sw.Kinds(
        params=sw.Kind(nnx.Param),
        stats=sw.Kind(BatchStat),
        counter=sw.Kind(sw.Exactly(nnx.Variable)),
        cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like),
    )
    clean(MultiState(3, 5, rngs()), kinds=kinds)
