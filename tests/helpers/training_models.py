"""The model, the batches and the comparison that tests of training options share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
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
