"""Compute dtypes: judged by flax's own `dtype=`, and by the same function with the casts written by hand."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise.errors import DeclarationError

TOKENS = jax.random.randint(jax.random.key(0), (8, 9), 0, 13)


class Scale(nnx.Param):
    """A parameter that is computed with in float32."""


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any = None) -> None:
        # Without a dtype, `nnx.Embed` keeps the one that its table has when it is made.
        self.embed = nnx.Embed(13, 8, dtype=jnp.bfloat16, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 8, dtype=dtype, use_bias=False, decode=False, rngs=rngs)
        self.scale = Scale(jnp.ones(8))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attend(x)
        scaled = x.astype(jnp.float32) * self.scale[None, None]
        return self.embed.attend(scaled.astype(x.dtype))


def loss_of(model: Any, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


KINDS = sw.Kinds(
    params=sw.Kind(nnx.All(nnx.Param, nnx.Not(Scale)), compute="bfloat16"),
    scales=sw.Kind(Scale),
    rest=sw.Kind(...),
)
OPTIMIZERS = {("params", "scales"): optax.adam(1e-2)}


def products(text: str) -> list[str]:
    """Returns the lines of a lowered program that multiply matrices: with operand types, and the algorithm if any."""
    return re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)


def test_products_are_bfloat16_and_the_state_stays_float32() -> None:
    model = Net(nnx.Rngs(0))
    state = KINDS.plan(model, optimizers=OPTIMIZERS).take(model)
    seen = []

    @sw.train_step
    def train(model: Any, tokens: jax.Array) -> jax.Array:
        seen.append((model.embed.embedding[...].dtype, model.scale[...].dtype))
        return loss_of(model, tokens)

    lines = products(train.lower(state, TOKENS).as_text())
    assert len(lines) > 10
    assert all("bf16" in line for line in lines)
    plain = sw.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model)
    assert not all("bf16" in line for line in products(train.lower(plain, TOKENS).as_text()))
    state, _ = train(state, TOKENS)
    assert seen[0] == (jnp.bfloat16, jnp.float32)
    assert {array.dtype.name for array in jax.tree.leaves(state)} <= {"float32", "int32"}


def test_losses_as_with_the_dtype_of_flax() -> None:
    ours, flaxs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0), dtype=jnp.bfloat16)
    plain = sw.Kinds(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(Scale))), scales=sw.Kind(Scale), rest=sw.Kind(...))
    curves = []
    for kinds, model in ((KINDS, ours), (plain, flaxs)):
        state, losses, train = kinds.plan(model, optimizers=OPTIMIZERS).take(model), [], sw.train_step(loss_of)
        for _ in range(12):
            state, loss = train(state, TOKENS)
            losses.append(float(loss))
        curves.append(losses)
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.02)
    assert curves[0][-1] < 0.9 * curves[0][0]


def test_gradients_and_writes_are_those_of_casts_by_hand() -> None:
    """Statistics that the function reads in bfloat16 and writes in any floating dtype are cast back to float32."""
    model = nnx.Dict(w=nnx.Param(jnp.linspace(0.1, 1.0, 6)), mean=nnx.BatchStat(jnp.full(6, 1 / 3)))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, compute="bfloat16"), stats=sw.Kind(nnx.BatchStat, compute="float16"))
    x = jax.random.normal(jax.random.key(1), (5, 6)).astype(jnp.bfloat16)

    def fn(model: Any, x: jax.Array) -> jax.Array:
        out = x * model.w[None]
        model.mean.set_value(0.5 * model.mean[...] + 0.5 * out.astype(jnp.float32).mean(0))
        return (out**2).mean().astype(jnp.float32)

    def by_hand(w: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = x * w.astype(jnp.bfloat16)[None]
        new = 0.5 * mean.astype(jnp.float16) + 0.5 * out.astype(jnp.float32).mean(0)
        return (out**2).mean().astype(jnp.float32), new.astype(jnp.float32)

    (loss, mean), grad = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(model.w[...], model.mean[...])
    state = kinds.plan(model, optimizers={"params": optax.sgd(1.0)}).take(model)
    state, same = sw.train_step(fn)(state, x)
    np.testing.assert_array_equal(same, loss)
    np.testing.assert_array_equal(state["stats"]["mean"], mean)
    np.testing.assert_allclose(model.w[...] - state["params"]["w"], grad, rtol=1e-6)


def test_what_only_passes_through_is_not_rounded() -> None:
    """An inner `nnx.jit`, a scan or a remat returns every Variable: those that it did not change stay to the bit."""
    model = nnx.Dict(w=nnx.Param(jnp.array([1 / 3])), table=nnx.Variable(jnp.array([1 / 7])))
    kinds = sw.Kinds(all=sw.Kind(..., compute="bfloat16"))

    @sw.step(writes="all")
    def fn(model: Any, x: jax.Array) -> jax.Array:
        model.w[...] = model.w[...]

        @nnx.jit
        def inner(model: Any) -> jax.Array:
            return model.w[...] * model.table[...]

        return inner(model) * x

    with pytest.warns(sw.StatewiseWarning, match="never writes it"):
        state, out = fn(kinds.plan(model).take(model), 2.0)
    np.testing.assert_array_equal(state["all"]["w"], np.array([1 / 3], np.float32))
    np.testing.assert_array_equal(state["all"]["table"], np.array([1 / 7], np.float32))
    assert out.dtype == jnp.bfloat16


def test_evaluation_packing_scan_and_microbatches() -> None:
    model = Net(nnx.Rngs(0))
    plan = KINDS.plan(model, optimizers=OPTIMIZERS)

    @sw.step
    def evaluate(model: Any, tokens: jax.Array) -> jax.Array:
        assert model.embed.embedding[...].dtype == jnp.bfloat16
        return model(tokens)

    assert evaluate(plan.take(model), TOKENS).dtype == jnp.bfloat16
    np.testing.assert_array_equal(evaluate(plan.take(model, pack=True), TOKENS), evaluate(plan.take(model), TOKENS))
    whole, loss = sw.train_step(loss_of)(plan.take(model), TOKENS)
    for state, options in ((plan.take(model, pack=True), {}), (plan.take(model), {"microbatches": 2})):
        after, same = sw.train_step(**options)(loss_of)(state, TOKENS)
        np.testing.assert_allclose(same, loss, rtol=1e-2)
        assert {array.dtype.name for array in jax.tree.leaves(after["params"])} == {"float32"}
    with jax.disable_jit():
        _, same = sw.train_step(loss_of)(plan.take(model), TOKENS)
    np.testing.assert_allclose(same, loss, rtol=1e-2)
    assert jax.tree.structure(whole) == jax.tree.structure(plan.take(model))


def test_checkpoints_do_not_change(tmp_path: Any) -> None:
    model = Net(nnx.Rngs(0))
    sw.save(tmp_path / "a", KINDS.plan(model).take(model))
    plain = KINDS.replace(params=dataclasses.replace(KINDS["params"], compute=None))
    state, _ = sw.restore(tmp_path / "a", plain.plan(model).abstract())
    assert not sw.diff(tmp_path / "a", state)


def test_integers_keys_and_the_own_dtype_are_not_cast() -> None:
    model = nnx.Dict(
        w=nnx.Param(jnp.ones(2, jnp.bfloat16)), n=nnx.Variable(jnp.array(3)), key=nnx.Variable(jax.random.key(0))
    )
    kinds = sw.Kinds(all=sw.Kind(..., compute=jnp.bfloat16))
    dtypes = []

    @sw.step
    def fn(model: Any) -> jax.Array:
        dtypes.extend(str(model[name][...].dtype) for name in ("w", "n", "key"))
        return model.w[...].sum()

    fn(kinds.plan(model).take(model))
    assert dtypes == ["bfloat16", "int32", "key<fry>"]
    assert kinds["all"].compute == "bfloat16"
    assert "compute=bfloat16" in str(sw.census(model, kinds))


@pytest.mark.parametrize("given", ["int8", "bool", "float99", jnp.int32, 16, nnx.Param, "complex64"])
def test_a_compute_dtype_that_is_none(given: Any) -> None:
    with pytest.raises(DeclarationError, match=r"compute=.* is not a floating-point dtype\.") as raised:
        sw.Kind(nnx.Param, compute=given)
    assert raised.value.hint == "compute='bfloat16'"


def test_a_kind_without_floating_point_numbers() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), n=nnx.Variable(jnp.array(3)))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), counts=sw.Kind(..., compute="bfloat16"))
    with pytest.raises(
        DeclarationError, match="'counts' has compute='bfloat16', and no leaf of floating-point"
    ) as raised:
        kinds.plan(model)
    assert [leaf.path for leaf in raised.value.leaves] == [("n",)]
    kinds = kinds.replace(counts=dataclasses.replace(kinds["counts"], compute=None))
    assert kinds.plan(model)
