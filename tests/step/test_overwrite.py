"""`sw.overwrite_with_gradient`: judged by flax's own fp8 layers and its train state."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import fp8_ops
from flax.training import train_state

import statewise as sw


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(16, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp, name="dense")(x)


X = jax.random.normal(jax.random.key(0), (16, 16))
GRADIENT = fp8_ops.OVERWRITE_WITH_GRADIENT


def of_flax(steps: int) -> tuple[Any, list[Any]]:
    """Trains as flax recommends, with its train state."""
    variables = Linen().init(jax.random.key(1), X)
    state = train_state.TrainState.create(apply_fn=Linen().apply, params=variables, tx=optax.adam(1e-2))

    @jax.jit
    def step(state: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(lambda params: (state.apply_fn(params, x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(steps):
        state, loss = step(state, X)
        losses.append(loss)
    return state.params, losses


class Fp8(nnx.Variable):
    """Scales and amax histories."""


class Bridged(nnx.Module):
    """Linen's variables in NNX: parameters, and what gradients replace."""

    def __init__(self) -> None:
        variables = Linen().init(jax.random.key(1), X)
        self.params = nnx.data(jax.tree.map(nnx.Param, variables["params"]))
        self.fp8 = nnx.data(jax.tree.map(Fp8, variables[GRADIENT]))

    def __call__(self, x: jax.Array) -> jax.Array:
        variables = {"params": self.params, GRADIENT: self.fp8}
        is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        return Linen().apply(jax.tree.map(lambda leaf: leaf[...], variables, is_leaf=is_leaf), x)


KINDS = sw.Kinds(params=sw.Kind(nnx.Param), fp8=sw.Kind(Fp8))
OPTIMIZERS = {"params": optax.adam(1e-2), "fp8": sw.overwrite_with_gradient()}


def loss_of(model: Any, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


@pytest.mark.parametrize("pack", [False, True])
def test_to_the_bit_as_the_train_state_of_flax(pack: bool) -> None:
    expected, losses = of_flax(5)
    model = Bridged()
    state, train = KINDS.plan(model, optimizers=OPTIMIZERS).take(model, pack=pack), sw.train_step(loss_of)
    for loss in losses:
        state, same = train(state, X)
        np.testing.assert_allclose(same, loss, rtol=1e-6)
    history = expected[GRADIENT]["dense"]["Fp8DirectDotGeneralOp_0"]
    assert any(np.asarray(array).max() != 1.0 for array in jax.tree.leaves(history))  # they have moved
    plain = nnx.to_pure_dict(state["fp8"])["fp8"]
    jax.tree.map(np.testing.assert_array_equal, plain, jax.tree.map(np.asarray, dict(expected[GRADIENT])))


def test_the_gradient_itself_also_where_sums_would_round() -> None:
    """The new value is not the old one plus a difference: 1e8 + (0.1 - 1e8) is 0 in float32."""
    model = nnx.Dict(w=nnx.Param(jnp.array([1e8, 1.0])))
    state = sw.plan(model, optimizers={"params": sw.overwrite_with_gradient()}).take(model)
    state, _ = sw.train_step(lambda model, x: jnp.vdot(model.w[...], x))(state, jnp.array([0.1, 3.0]))
    np.testing.assert_array_equal(state["params"]["w"], np.array([0.1, 3.0], np.float32))


def test_an_audit_knows_which_gradients_replace_something() -> None:
    """An amax history is made from values, and no cotangent reaches it; but `stopped` would be replaced by zero."""
    model = Bridged()
    model.stopped = Fp8(jnp.ones(()))

    def stopped(model: Any, x: jax.Array) -> jax.Array:
        return loss_of(model, x) * jax.lax.stop_gradient(model.stopped[...])

    state = KINDS.plan(model, optimizers=OPTIMIZERS).take(model)
    audit = sw.audit(sw.train_step(stopped), state, X)
    assert [sw.format_path(row.path) for row in audit.leaves if row.zero_gradient] == ["stopped"]


@jax.custom_vjp
def recorded(history: jax.Array, x: jax.Array) -> jax.Array:
    return x


def backward(saved: tuple[Any, Any], grad: Any) -> tuple[Any, Any]:
    history, x = saved
    return jnp.concatenate([jnp.abs(x).max()[None], history[:-1]]), grad


recorded.defvjp(lambda history, x: (x, (history, x)), backward)
PARTS = jnp.array([1.0, -2.0, 3.0, 0.5, -7.0, 6.0, 4.0, 4.5])


def history_of(x: jax.Array, fn: Any, **options: Any) -> Any:
    """Trains once in four parts, with an amax history: its gradient is the history, moved by one."""
    model = nnx.Dict(history=Fp8(jnp.zeros(5)), w=nnx.Param(jnp.array(1.0)))
    state = KINDS.plan(model, optimizers=OPTIMIZERS).take(model)
    state, _ = sw.train_step(fn, microbatches=4, **options)(state, x)
    return state["fp8"]["history"]


def test_each_part_starts_from_the_gradients_of_the_part_before() -> None:
    history = history_of(PARTS, lambda model, x: (recorded(model.history[...], x) * model.w[...]).mean())
    np.testing.assert_array_equal(history, [4.5, 7.0, 3.0, 2.0, 0.0])


@pytest.mark.parametrize("padding", [0.0, 1e9, np.nan])
def test_a_part_of_weight_0_replaces_nothing(padding: float) -> None:
    def weighted(model: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_data = (jnp.abs(x) > 0) & (jnp.abs(x) < 1e8)
        losses = recorded(model.history[...], x) * model.w[...]
        return jnp.where(is_data, losses, 0).sum() / is_data.sum(), is_data.sum()

    history = history_of(PARTS.at[2:4].set(padding).at[6:].set(padding), weighted, weighted=True)
    np.testing.assert_array_equal(history, [7.0, 2.0, 0.0, 0.0, 0.0])


def test_within_other_transformations_the_gradient_to_rounding() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.array([1.0, 2.0])))
    chained = optax.chain(optax.clip(10.0), sw.overwrite_with_gradient())
    state = sw.plan(model, optimizers={"params": chained}).take(model)
    state, _ = sw.train_step(lambda model, x: jnp.vdot(model.w[...], x))(state, jnp.array([0.25, 30.0]))
    np.testing.assert_allclose(state["params"]["w"], [0.25, 10.0], rtol=1e-6)
