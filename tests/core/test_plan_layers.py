"""The standard kinds plan every layer that NNX ships, and take, put and build give it back exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.common.nnx_graph import raw_value
from strategies import Constrained, Node, OwnBatchStat, OwnStat


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def attention() -> nnx.Module:
    model = nnx.MultiHeadAttention(2, 4, decode=True, dropout_rate=0.1, rngs=rngs())
    model.init_cache((3, 5, 4))
    return model


def optimizer() -> nnx.Optimizer:
    return nnx.Optimizer(nnx.Linear(2, 3, rngs=rngs()), optax.adam(0.1), wrt=nnx.Param)


def linen() -> nnx.Module:
    return nnx.bridge.ToNNX(nn.BatchNorm(use_running_average=False), rngs=rngs()).lazy_init(jnp.ones((2, 3)))


def rnn() -> nnx.Module:
    return nnx.Bidirectional(
        nnx.RNN(nnx.LSTMCell(2, 3, rngs=rngs())), nnx.RNN(nnx.GRUCell(2, 3, rngs=rngs())), rngs=rngs()
    )


class Plain(nnx.Module, pytree=False):
    """A module that is no pytree."""

    def __init__(self) -> None:
        self.w = nnx.Param(jnp.ones(2))
        self.inner = [nnx.Param(jnp.ones(1))]


def scanned() -> nnx.Module:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: Any) -> nnx.Module:
        return nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(key)), nnx.Dropout(0.1, rngs=nnx.Rngs(key)))

    return make(jax.random.split(jax.random.key(0), 3))


LAYERS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "Linear": (lambda: nnx.Linear(2, 3, rngs=rngs()), {"params": 2}),
    "Linear without bias": (lambda: nnx.Linear(2, 3, use_bias=False, rngs=rngs()), {"params": 1}),
    "LinearGeneral": (lambda: nnx.LinearGeneral((2, 3), (4,), axis=(-2, -1), rngs=rngs()), {"params": 2}),
    "Einsum": (lambda: nnx.Einsum("ab,bc->ac", (2, 3), (3,), rngs=rngs()), {"params": 2}),
    "Conv": (lambda: nnx.Conv(2, 3, (3, 3), rngs=rngs()), {"params": 2}),
    "ConvTranspose": (lambda: nnx.ConvTranspose(2, 3, (3,), rngs=rngs()), {"params": 2}),
    "Embed": (lambda: nnx.Embed(5, 2, rngs=rngs()), {"params": 1}),
    "BatchNorm": (lambda: nnx.BatchNorm(3, rngs=rngs()), {"params": 2, "stats": 2}),
    "LayerNorm": (lambda: nnx.LayerNorm(3, rngs=rngs()), {"params": 2}),
    "RMSNorm": (lambda: nnx.RMSNorm(3, rngs=rngs()), {"params": 1}),
    "GroupNorm": (lambda: nnx.GroupNorm(4, num_groups=2, rngs=rngs()), {"params": 2}),
    "InstanceNorm": (lambda: nnx.InstanceNorm(4, rngs=rngs()), {"params": 2}),
    "SpectralNorm": (
        lambda: nnx.SpectralNorm(nnx.Linear(2, 3, rngs=rngs()), rngs=rngs()),
        {"params": 2, "stats": 2},
    ),
    "WeightNorm": (lambda: nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs()), rngs=rngs()), {}),  # versions differ
    "Dropout": (lambda: nnx.Dropout(0.5, rngs=rngs()), {"rng": 2}),
    "Rngs": (lambda: nnx.Rngs(params=0, dropout=1), {"rng": 4}),
    "MultiHeadAttention": (attention, {"params": 8, "cache": 3, "rng": 2}),
    "LSTMCell": (lambda: nnx.LSTMCell(2, 3, rngs=rngs()), {}),
    "GRUCell": (lambda: nnx.GRUCell(2, 3, rngs=rngs()), {}),
    "SimpleCell": (lambda: nnx.SimpleCell(2, 3, rngs=rngs()), {}),
    "Bidirectional RNN": (rnn, {}),
    "LoRA": (lambda: nnx.LoRA(2, 1, 3, rngs=rngs()), {"lora": 2}),
    "LoRALinear": (lambda: nnx.LoRALinear(2, 3, lora_rank=1, rngs=rngs()), {"params": 2, "lora": 2}),
    "Sequential": (
        lambda: nnx.Sequential(nnx.Linear(2, 2, rngs=rngs()), nnx.relu, nnx.BatchNorm(2, rngs=rngs())),
        {"params": 4, "stats": 2},
    ),
    "scanned layers": (scanned, {"params": 2, "rng": 2}),
    "Optimizer": (optimizer, {"params": 0, "optimizer": 6}),
    "MultiMetric": (
        lambda: nnx.MultiMetric(loss=nnx.metrics.Average(), accuracy=nnx.metrics.Accuracy()),
        {"metrics": 4},
    ),
    "Welford": (lambda: nnx.metrics.Welford(), {"metrics": 3}),
    "ToNNX": (linen, {"params": 2, "stats": 2, "rng": 2}),
    "no pytree": (Plain, {"params": 2}),
    "own types": (
        lambda: Node(
            a=OwnStat(jnp.ones(1)), b=OwnBatchStat(jnp.ones(1)), c=Constrained(jnp.ones(1)), d=nnx.data(jnp.ones(1))
        ),
        {"params": 1, "stats": 1, "variables": 2},
    ),
    "list of modules": (lambda: [nnx.Linear(1, 1, rngs=rngs()), {"a": nnx.Linear(1, 1, rngs=rngs())}], {"params": 4}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_planned_taken_put_and_built(name: str) -> None:
    make, expected = LAYERS[name]
    model = make()
    plan = sw.plan(model)
    counts = {kind: len(plan[kind]) for kind in plan if plan[kind]}
    assert {kind: count for kind, count in counts.items() if kind in expected} == {
        k: n for k, n in expected.items() if n
    }
    assert not expected or set(counts) == {kind for kind, count in expected.items() if count}
    assert plan.excluded == ()

    before = {tuple(path): raw_value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert {leaf.path for leaf in plan.leaves} == set(before)
    state = plan.take(model)
    built = plan.build(state)
    assert sw.plan(built) is plan
    assert type(built) is type(model)
    other = jax.tree.map(lambda array: array if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array * 0, state)
    plan.put(other, model)
    plan.put(state, model)
    for thing in (model, built):
        after = {tuple(path): raw_value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(thing))}
        assert after.keys() == before.keys()
        for path, value in before.items():
            same(value, after[path])


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["MultiHeadAttention", "BatchNorm", "LoRALinear", "Bidirectional RNN"])
def test_an_abstract_layer_has_the_same_plan(name: str) -> None:
    make, _ = LAYERS[name]
    assert sw.plan(nnx.eval_shape(make)) is sw.plan(make())


def test_which_kind_an_unknown_type_falls_into_is_visible() -> None:
    plan = sw.plan(Node(gate=OwnStat(jnp.ones(1))))
    assert str(plan).splitlines()[3].split() == ["gate", "variables", "OwnStat", "(1,)", "float32"]
    assert plan.kinds["variables"].saved
