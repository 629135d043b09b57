"""The models, the batches and the comparisons that tests of training options share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise.errors import StructureError

PARTS = 4
X = jax.random.normal(jax.random.key(1), (16, 6))
Y = jax.random.normal(jax.random.key(2), (16, 3))
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adamw": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
}
BATCHES = [(X + shift, Y) for shift in (0.0, 0.5, -0.5)]


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.tanh(self.first(x)))


class Block(nnx.Module):
    def __init__(self, channels: int, rngs: nnx.Rngs, dtype: Any, norm_dtype: Any) -> None:
        self.first = nnx.Conv(channels, channels, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.second = nnx.Conv(channels, channels, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(channels, dtype=norm_dtype, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        out = nnx.relu(self.norms[0](self.first(x)))
        return nnx.relu(x + self.norms[1](self.second(out)))


class ResNet(nnx.Module):
    """Residual blocks with batch statistics, for images of 3 channels."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, norm_dtype: Any = None) -> None:
        self.stem = nnx.Conv(3, 4, (3, 3), dtype=dtype, rngs=rngs)
        self.block = Block(4, rngs, dtype, norm_dtype)
        self.head = nnx.Linear(4, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.block(self.stem(x)).mean((1, 2)))


def image_loss(model: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model(images).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def images(seed: int, count: int = 16) -> tuple[jax.Array, jax.Array]:
    """Returns random images and labels."""
    shape = (count, 6, 6, 3)
    return jax.random.normal(jax.random.key(seed), shape), jax.random.randint(jax.random.key(seed + 1), (count,), 0, 3)


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 8, use_bias=False, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        return self.embed.attend(self.norm(x + self.attend(x)))


def token_loss(model: Any, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def loss_of(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return ((model(x) - y) ** 2).mean()


def close(left: Any, right: Any, rtol: float = 1e-5) -> None:
    """Asserts that two pytrees have the same numbers, to rounding of the largest in each leaf."""
    ours, theirs = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * max(1e-3, np.abs(other).max(initial=0.0)))


def trained(model: Any, tx: Any, fn: Callable[..., Any], batches: list[tuple[Any, ...]], **options: Any) -> Any:
    plan = sw.plan(model, optimizers={"params": tx})
    state, step, losses = plan.take(model), sw.train_step(**options)(fn), []
    for batch in batches:
        state, loss = step(state, *batch)
        losses.append(loss)
    return state, losses


def refused(match: str, *args: Any, error: type[Exception] = StructureError, fn: Any = None, **options: Any) -> Any:
    """Asserts that a step is refused, and that its state is as it was; returns the error."""
    model = Mlp(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    with pytest.raises(error, match=match) as raised:
        sw.train_step(loss_of if fn is None else fn, **options)(state, *args)
    jax.block_until_ready(jax.tree.leaves(state))  # nothing was donated
    return raised.value


def by_hand(model: Any, tx: Any, fn: Callable[..., Any], batches: list[tuple[Any, ...]]) -> tuple[Any, list[Any]]:
    """Trains by `lax.scan` over the parts, with NNX and Optax alone; returns the model's state and the losses."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    opt_state, losses = tx.init(params), []

    @jax.jit
    def step(params: Any, rest: Any, opt_state: Any, batch: Any) -> Any:
        def part(carry: Any, own: Any) -> Any:
            rest, total = carry

            def of(params: Any) -> Any:
                # Copies: NNX writes into the objects that it is given.
                model = nnx.merge(graphdef, params, rest, copy=True)
                loss = fn(model, *own)
                return loss, nnx.state(model, nnx.Not(nnx.Param))

            (loss, rest), grads = jax.value_and_grad(of, has_aux=True)(params)
            return (rest, jax.tree.map(jnp.add, total, grads)), loss

        zeros = jax.tree.map(jnp.zeros_like, params)
        parts = jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), batch)
        (rest, total), losses = jax.lax.scan(part, (rest, zeros), parts)
        grads = jax.tree.map(lambda g: g / PARTS, total)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, losses.mean()

    for batch in batches:
        params, rest, opt_state, loss = step(params, rest, opt_state, batch)
        losses.append(loss)
    return nnx.state(nnx.merge(graphdef, params, rest)), losses
