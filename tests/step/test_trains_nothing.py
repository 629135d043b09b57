"""A train step must train: where no leaf of `wrt` reaches the loss it is refused, and no program that trains is."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import modes
import statewise as sw
from refusals import refused
from statewise._src.step.dependence import differentiably_reached, zero_gradients

X = jnp.ones((2, 3))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        self.spare = nnx.Param(jnp.ones(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


def state_of(model: Any, **options: Any) -> sw.State:
    return sw.plan(model, optimizers={"params": optax.sgd(0.1)}, **options).take(model)


elsewhere = Net()
holder = types.SimpleNamespace(net=Net(), nets={"first": [Net()]})


def by_closure() -> tuple[Callable[..., Any], str]:
    model = Net()
    return lambda m, x: model(x).mean(), "`model`, a variable of its closure"


def by_global() -> tuple[Callable[..., Any], str]:
    return lambda m, x: elsewhere(x).mean(), "`elsewhere`, a global variable"


def by_attribute() -> tuple[Callable[..., Any], str]:
    return lambda m, x: holder.net(x).mean(), "`holder.net`, a global variable"


def by_container() -> tuple[Callable[..., Any], str]:
    return lambda m, x: holder.nets["first"][0](x).mean(), "`holder.nets['first'][0]`, a global variable"


def by_default() -> tuple[Callable[..., Any], str]:
    def loss(m: Any, x: Any, net: Any = Net()) -> Any:  # noqa: B008
        return net(x).mean()

    return loss, "`net`, a default of its parameters"


def by_partial() -> tuple[Callable[..., Any], str]:
    def loss(m: Any, x: Any, net: Any) -> Any:
        return net(x).mean()

    return functools.partial(loss, net=Net()), "`net`, an argument of the partial"


def by_method() -> tuple[Callable[..., Any], str]:
    class Trainer:
        def __init__(self) -> None:
            self.model = Net()

        def loss(self, m: Any, x: Any) -> Any:
            return self.model(x).mean()

    return Trainer().loss, "`self.model`, the object of the method"


def by_callable() -> tuple[Callable[..., Any], str]:
    class Loss:
        def __init__(self) -> None:
            self.model = Net()

        def __call__(self, m: Any, x: Any) -> Any:
            return self.model(x).mean()

    return Loss(), "`self.model`, the object that is called"


def by_helper() -> tuple[Callable[..., Any], str]:
    model = Net()

    def predict(x: Any) -> Any:
        return model(x)

    return lambda m, x: predict(x).mean(), "`model`, a variable of predict's closure"


def by_jit() -> tuple[Callable[..., Any], str]:
    model = Net()
    return lambda m, x: jax.jit(lambda x: model(x))(x).mean(), "`model`, a variable of its closure"


WAYS = [
    by_closure,
    by_global,
    by_attribute,
    by_container,
    by_default,
    by_partial,
    by_method,
    by_callable,
    by_helper,
    by_jit,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_object_that_stands_in_the_place_of_the_model_is_named(way: Any) -> None:
    fn, named = way()
    with pytest.raises(sw.StructureError) as caught:
        sw.train_step(fn)(state_of(Net()), X)
    assert "trains nothing: no leaf that it differentiates reaches the loss." in caught.value.message
    assert f"The function reads {named}." in caught.value.message
    assert [sw.format_path(leaf.path) for leaf in caught.value.leaves] == ["linear/bias", "linear/kernel", "spare"]
    expression = named.split("`")[1]
    assert caught.value.hint == f"use `m`, the step's argument, instead of `{expression}`"


@pytest.mark.parametrize("hijax", [False, True])
def test_all_that_the_error_says(hijax: bool) -> None:
    with nnx.var_defaults(hijax=hijax, ref=False):
        model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))

    def loss(m: Any, x: Any) -> Any:
        return model(x).mean()

    with refused(
        sw.StructureError,
        "loss trains nothing: no leaf that it differentiates reaches the loss. The function reads `model`, a variable "
        "of its closure.",
        leaves=["kernel: Param(3, 1) float32  kind=params  (not read)"],
        kind="params",
        hint="use `m`, the step's argument, instead of `model`",
    ):
        sw.train_step(loss)(state_of(model), X)


def test_nothing_is_touched_by_the_refusal_and_the_hint_trains() -> None:
    model = Net()
    state = state_of(model)
    with pytest.raises(sw.StructureError, match="use `m`"):
        sw.train_step(lambda m, x: model(x).mean())(state, X)
    state, _ = sw.train_step(lambda m, x: m(x).mean())(state, X)  # the state was not donated
    expected, optimizer = Net(), optax.sgd(0.1)
    params = nnx.state(expected, nnx.Param)
    grads = nnx.grad(lambda m: m(X).mean())(expected)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    want = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state["params"]["linear"]["kernel"], want["linear"]["kernel"][...])


UNREACHED = {
    "a constant": lambda m, x: x.sum(),
    "stop_gradient": lambda m, x: jax.lax.stop_gradient(m(x)).sum(),
    "argmax": lambda m, x: jnp.argmax(m(x)).astype(jnp.float32),
    "integers": lambda m, x: m(x).astype(jnp.int32).sum().astype(jnp.float32),
    "rounding": lambda m, x: jnp.round(m(x)).sum() + jnp.floor(m(x)).sum() + jnp.sign(m(x)).sum(),
    "a comparison": lambda m, x: (m(x) > 0).mean(),
    "zero": lambda m, x: (0.0 * m(x)).sum(),
    "in a scan": lambda m, x: jax.lax.scan(lambda c, _: (c + jax.lax.stop_gradient(m(x)).sum(), None), 0.0, length=3)[
        0
    ],
    "in a branch": lambda m, x: jax.lax.cond(x.sum() > 0, lambda: jnp.argmax(m(x)) * 1.0, lambda: 0.0),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_what_lets_no_gradient_pass_does_not_reach(name: str) -> None:
    step = sw.train_step(UNREACHED[name])
    state = state_of(Net())
    with pytest.raises(sw.StructureError, match="trains nothing"):
        step(state, X)
    with pytest.raises(sw.StructureError, match="trains nothing"):
        step.lower(state, X)
    with jax.disable_jit(), pytest.raises(sw.StructureError, match="trains nothing"):
        step(state, X)
    audit = sw.audit(step, state, X)
    assert isinstance(audit.error, sw.StructureError)
    assert len(audit.untrained) == 3


@jax.custom_vjp
def straight_through(x: jax.Array) -> jax.Array:
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def by_while(m: Any, x: Any) -> Any:
    return jax.lax.fori_loop(0, 3, lambda _, c: c + m(x).sum(), 0.0)


REACHED = {
    "scan": lambda m, x: jax.lax.scan(lambda c, row: (c + m(row).sum(), None), 0.0, x)[0],
    "fori_loop": by_while,
    "cond": lambda m, x: jax.lax.cond(x.sum() > 0, lambda: m(x).sum(), lambda: 0.0),
    "a custom gradient": lambda m, x: straight_through(m(x)).sum(),
    "jax.checkpoint": lambda m, x: jax.checkpoint(lambda m, x: m(x))(m, x).sum(),
    "jax.jit": lambda m, x: jax.jit(lambda m, x: m(x))(m, x).sum(),
    "nnx.jit": lambda m, x: nnx.jit(lambda m, x: m(x))(m, x).sum(),
    "nnx.remat": lambda m, x: nnx.remat(lambda m, x: m(x))(m, x).sum(),
    "nnx.vmap": lambda m, x: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, x).sum(),
    "vmap": lambda m, x: jax.vmap(lambda x: m(x))(x).sum(),
    "one leaf alone": lambda m, x: m.spare[...].sum(),
    "a gradient of a gradient": lambda m, x: jax.grad(lambda x: m(x).sum())(x).sum(),
    "a dtype and back": lambda m, x: m(x).astype(jnp.float16).astype(jnp.float32).sum(),
    "a frozen teacher": lambda m, x: ((m(x) - elsewhere(x)) ** 2).mean(),
    "sorting": lambda m, x: jnp.sort(m(x), axis=0)[0].sum(),
}


@pytest.mark.parametrize("name", REACHED)
def test_a_program_that_trains_is_not_refused_and_its_gradient_is_nnx_s(name: str) -> None:
    step = sw.train_step(REACHED[name])
    state, _ = step(state_of(Net()), X)
    audit = sw.audit(step, state, X)
    assert audit.error is None
    assert audit.warnings == ()
    if name in ("fori_loop", "jax.checkpoint", "jax.jit"):
        return
    with modes.classic():  # no version of Flax differentiates hijax Variables through every transform
        model = Net()
        grads = nnx.grad(lambda m: REACHED[name](m, X))(model)
    kernel = model.linear.kernel[...] - 0.1 * grads["linear"]["kernel"][...]
    np.testing.assert_allclose(state["params"]["linear"]["kernel"], kernel, rtol=1e-5, atol=1e-6)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "times": lambda a, b: a * b,
    "stop": lambda a, b: jax.lax.stop_gradient(a) + b,
    "round": lambda a, b: jnp.round(a) * b,
    "argmax": lambda a, b: jnp.argmax(a) * b,
    "where": lambda a, b: jnp.where(a > 0, b, 1.0),
    "int": lambda a, b: a.astype(jnp.int32) + b,
    "jit": lambda a, b: jax.jit(lambda a, b: jnp.sin(a) * jax.lax.stop_gradient(b))(a, b),
    "scan": lambda a, b: jax.lax.scan(lambda c, _: (c * a, None), b, length=2)[0],
    "cond": lambda a, b: jax.lax.cond(b.sum() > 0, lambda: a, lambda: jax.lax.stop_gradient(b)),
    "zero": lambda a, b: 0.0 * a + b,
}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5), st.integers(0, 5)), max_size=5))
def test_the_walk_never_calls_a_leaf_unreached_whose_gradient_is_not_zero(program: list[tuple[str, int, int]]) -> None:
    def loss(leaves: list[Any]) -> Any:
        values = list(leaves)
        for name, one, other in program:
            values.append(OPERATIONS[name](values[one % len(values)], values[other % len(values)]))
        return (values[-1] * 1.0).sum()

    leaves = [jnp.full(3, 0.3), jnp.full(3, 1.7)]
    closed = jax.make_jaxpr(loss)(leaves)
    reached = [differentiably_reached(closed, [at == chosen for at in range(2)])[0] for chosen in range(2)]
    exact = zero_gradients(loss, leaves)
    gradient = jax.grad(loss)(leaves)
    for reaches, is_zero, grad in zip(reached, exact, gradient, strict=True):
        assert reaches or is_zero
        assert reaches or not grad.any()


# --- several kinds ---------------------------------------------------------------------------------------------------


class Two(nnx.Module):
    def __init__(self) -> None:
        self.base = nnx.Param(jnp.ones(3))
        self.lora = nnx.LoRAParam(jnp.ones(3))


def two(**optimizers: Any) -> sw.State:
    return sw.plan(Two(), optimizers=optimizers or {"params": optax.sgd(0.1), "lora": optax.sgd(0.1)}).take(Two())


def only_lora(m: Any) -> Any:
    return (m.lora[...] ** 2).sum()


def test_one_kind_of_two_that_reaches_nothing_is_a_warning_once_a_trace() -> None:
    step, state = sw.train_step(only_lora), two()
    with pytest.warns(sw.StatewiseWarning) as caught:
        state, _ = step(state)
    assert len(caught) == 1
    warning = caught[0].message
    assert isinstance(warning, sw.StatewiseWarning)
    assert str(warning) == (
        "only_lora differentiates params, but no leaf of it reaches the loss: its optimizer sees only zeros.\n"
        "  base: Param(3,) float32  kind=params\n"
        "  hint: if this step should not train it: @sw.train_step(wrt=('lora',))"
    )
    assert warning.kind == "params"
    state, _ = step(state)  # no word: nothing is traced
    assert [one.message for one in sw.audit(step, state).warnings] == [warning.message]
    hinted = sw.train_step(only_lora, wrt=("lora",))
    state, _ = hinted(state)
    assert sw.audit(hinted, state).warnings == ()


def test_both_kinds_unreached_are_one_error() -> None:
    with pytest.raises(sw.StructureError, match="trains nothing") as caught:
        sw.train_step(lambda m: jnp.zeros(()))(two())
    assert [leaf.kind for leaf in caught.value.leaves] == ["params", "lora"]


def test_of_the_kinds_named_in_wrt_alone() -> None:
    with pytest.raises(sw.StructureError, match="trains nothing"):
        sw.train_step(only_lora, wrt="params")(two())


def test_kinds_updated_jointly_are_named_too() -> None:
    state = sw.plan(Two(), optimizers={("params", "lora"): optax.sgd(0.1)}).take(Two())
    with pytest.warns(sw.StatewiseWarning, match="differentiates params") as caught:
        sw.train_step(only_lora)(state)
    warning = caught[0].message
    assert isinstance(warning, sw.StatewiseWarning)
    assert warning.hint == "if this step should not train it: a separate optimizer for each kind"


def test_leaves_without_elements_are_no_reason() -> None:
    class Empty(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones((0, 3)))

    _, loss = sw.train_step(lambda m, x: (x**2).sum())(state_of(Empty()), X)
    assert float(loss) == 6.0


def stored(m: Any, x: Any) -> Any:
    cell = jax.new_ref(jnp.zeros(()))
    cell[...] = m(x).mean()
    return cell[...] ** 2


def stored_in_a_loop(m: Any, x: Any) -> Any:
    cell = jax.new_ref(jnp.zeros(()))

    def body(_: Any, carry: Any) -> Any:
        cell[...] += m(x).mean()
        return carry

    jax.lax.fori_loop(0, 3, body, 0)
    return cell[...] ** 2


def stored_by_another(m: Any, x: Any) -> Any:
    cell = jax.new_ref(jnp.zeros(()))
    jax.jit(lambda cell, value: cell.__setitem__(..., value))(cell, m(x).mean())
    return cell[...] ** 2


@pytest.mark.parametrize("loss", [stored, stored_in_a_loop, stored_by_another])
def test_a_loss_that_goes_through_a_reference_trains(loss: Callable[..., Any]) -> None:
    state, _ = sw.train_step(loss)(state_of(Net()), X)
    with modes.classic():
        model = Net()
        gradient = nnx.grad(loss)(model, X)["linear"]["kernel"][...]
    assert jnp.abs(gradient).max() > 0
    np.testing.assert_allclose(
        state["params"]["linear"]["kernel"], model.linear.kernel[...] - 0.1 * gradient, rtol=1e-6
    )


def test_a_reference_that_holds_something_else_is_no_way_to_the_loss() -> None:
    def loss(m: Any, x: Any) -> Any:
        cell = jax.new_ref(jnp.zeros(()))
        cell[...] = x.mean()
        return cell[...] + jax.lax.stop_gradient(m(x).mean())

    with pytest.raises(sw.StructureError, match="trains nothing"):
        sw.train_step(loss)(state_of(Net()), X)
