"""Weighted train steps: the weighted mean over the parts of a batch equals the complete batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from training_models import BATCHES, OPTIMIZERS, PARTS, Mlp, X, Y, close, loss_of, refused, trained

MASK = jnp.array([1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0], jnp.float32)


def masked(model: Any, x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    return (((model(x) - y) ** 2).mean(-1) * mask).sum() / mask.sum()


def weighted(model: Any, x: jax.Array, y: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return masked(model, x, y, mask), mask.sum()


@pytest.mark.parametrize("parts", [1, PARTS])
def test_unequal_weights_equal_the_whole_batch(parts: int) -> None:
    model, batches = Mlp(nnx.Rngs(0)), [(x, y, MASK) for x, y in BATCHES]
    whole = trained(model, OPTIMIZERS["adamw"], masked, batches)
    close(trained(model, OPTIMIZERS["adamw"], weighted, batches, microbatches=parts, weighted=True), whole)


@pytest.mark.parametrize("bad", [False, True])
def test_a_part_without_tokens_does_not_count(bad: bool) -> None:
    """Its mean is 0 / 0; and its rows may hold anything."""
    mask = MASK.at[4:8].set(0)
    batches = [(x.at[4:8].set(jnp.nan) if bad else x, y, mask) for x, y in BATCHES]
    model = Mlp(nnx.Rngs(0))
    rest = np.r_[0:4, 8:16]
    whole = trained(model, OPTIMIZERS["adamw"], masked, [(x[rest], y[rest], mask[rest]) for x, y in BATCHES])
    close(trained(model, OPTIMIZERS["adamw"], weighted, batches, microbatches=PARTS, weighted=True), whole)


def test_a_line_search_leaves_out_a_part_without_tokens() -> None:
    """The derivative of 0 / 0 is NaN, also where a zero is selected in place of it."""
    model, mask, rest = Mlp(nnx.Rngs(0)), MASK.at[4:8].set(0), np.r_[0:4, 8:16]
    whole = trained(model, optax.lbfgs(), masked, [(x[rest], y[rest], mask[rest]) for x, y in BATCHES])
    batches = [(x, y, mask) for x, y in BATCHES]
    close(trained(model, optax.lbfgs(), weighted, batches, microbatches=PARTS, weighted=True), whole)


@pytest.mark.parametrize("has_aux", [False, True])
def test_a_weight_beside_aux(has_aux: bool) -> None:
    def fn(model: Any, x: jax.Array, y: jax.Array, mask: jax.Array) -> Any:
        return (*weighted(model, x, y, mask), mask)

    model = Mlp(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    state, (loss, mask) = sw.train_step(fn, microbatches=PARTS, weighted=True, has_aux=has_aux)(state, X, Y, MASK)
    np.testing.assert_allclose(loss, masked(model, X, Y, MASK), rtol=1e-6)
    np.testing.assert_array_equal(mask.reshape(-1), MASK)


@pytest.mark.parametrize(
    "mask", [jnp.zeros(16), MASK.at[:8].set(-1.0), MASK.at[0].set(jnp.nan), MASK.at[0].set(jnp.inf)]
)
@pytest.mark.parametrize("is_eager", [False, True])
def test_weights_that_have_no_mean_change_nothing(mask: jax.Array, is_eager: bool) -> None:
    model = Mlp(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.adam(0.1)}).take(model)
    before = jax.tree.map(np.array, state)
    step = sw.train_step(weighted, microbatches=PARTS, weighted=True)
    with jax.disable_jit(is_eager):  # where the weights are known, and the outcome is the same
        state, loss = step(state, X, Y, mask)
    assert np.isnan(loss)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(state), jax.tree.leaves(before))


def test_the_weights_of_bfloat16_are_summed_in_float32() -> None:
    def fn(model: Any, x: jax.Array) -> Any:
        return model.w[...] * x.mean(), jnp.array(257, jnp.bfloat16)  # 256: and 256 + 256 + 256 + 1 would be 768

    model = nnx.Dict(w=nnx.Param(jnp.array(1.0)))
    state = sw.plan(model, optimizers={"params": optax.sgd(1.0)}).take(model)
    state, loss = sw.train_step(fn, microbatches=PARTS, weighted=True)(state, jnp.arange(8.0))
    np.testing.assert_allclose((loss, state["params"]["w"]), (3.5, -2.5))


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (loss_of, r"loss_of has weighted=True, but does not return \(loss, weight\)"),
        (lambda model, x, y: (loss_of(model, x, y), jnp.ones(2)), r"not a scalar: its shape is \(2,\)"),
        (lambda model, x, y: (loss_of(model, x, y), jnp.array(1j)), "is complex64, not a real number"),
        (lambda model, x, y: (loss_of(model, x, y), {"a": 1.0}), "not a weight"),
        (lambda model, x, y: (jnp.ones(2), 1.0), "The loss of .* is not a scalar"),
    ],
)
def test_weights_that_are_none(fn: Any, match: str) -> None:
    refused(match, X, Y, fn=fn, weighted=True)
