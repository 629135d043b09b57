"""Variable hooks: in steps they run as under flax's own `nnx.jit`; what an optimizer does not run is found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from hints import parses
from linted import clean, codes, finds
from statewise._src.common.nnx_graph import raw_value


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable hooks are deprecated")
        yield


def clipped(variable: Any, value: Any) -> Any:
    return jnp.clip(value, 0.0, 1.0)


def doubled(variable: Any, value: Any) -> Any:
    return 2 * value


class Bounded(nnx.Param):
    """By a method of its class, which flax takes for the hook of that name."""

    def on_set_value(self, value: Any) -> Any:
        return jnp.clip(value, 0.0, 1.0)


class Overloads(nnx.Param):
    """As flax recommends instead of hooks."""

    def set_value(self, value: Any, **options: Any) -> None:
        super().set_value(jnp.clip(value, 0.0, 1.0), **options)


def by_metadata(value: Any) -> nnx.Param[Any]:
    return nnx.Param(value, on_set_value=clipped)


MAKES = {"metadata": by_metadata, "method": Bounded, "overload": Overloads}


class Model(nnx.Module):
    """Reads through one hook, and writes through another."""

    def __init__(self, make: Any = by_metadata) -> None:
        self.w = make(jnp.full(3, 0.5))
        self.scale = nnx.Param(jnp.ones(3), on_get_value=doubled)
        self.level = nnx.Variable(jnp.zeros(3), on_set_value=clipped, on_get_value=doubled)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.level[...] = self.level[...] + x
        return (self.w[...] * self.scale[...] * x).sum() + self.level[...].sum()


X = jnp.array([0.3, 0.6, -2.0])


def assert_same(state: sw.State, model: nnx.Module) -> None:
    """A state and a model of flax's have the same raw values."""
    ours = state.plan.build(state)
    for name, leaf in vars(model).items():
        if isinstance(leaf, nnx.Variable):
            np.testing.assert_allclose(raw_value(getattr(ours, name)), raw_value(leaf), rtol=1e-6)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_in_a_step_hooks_run_as_under_nnx_jit(make: Any) -> None:
    model = Model(make)
    state = sw.plan(model).take(model)
    step = sw.step(lambda model, x: model(x), writes="variables")
    theirs = nnx.jit(lambda model, x: model(x))
    for _ in range(3):
        state, out = step(state, X)
        np.testing.assert_allclose(out, theirs(model, X), rtol=1e-6)
        assert_same(state, model)
    assert float(jnp.abs(raw_value(model.level)).max()) <= 1  # the hook did run


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_train_step_passes_hooks_by_where_flax_does(make: Any) -> None:
    model = Model(make)
    state = sw.plan(model, optimizers={"params": optax.adam(0.9)}).take(model)
    optimizer = nnx.Optimizer(model, optax.adam(0.9), wrt=nnx.Param)
    train = sw.train_step(lambda model, x: model(x))

    @nnx.jit
    def theirs(model: Model, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: model(x))(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(4):
        state, loss = train(state, X)
        np.testing.assert_allclose(loss, theirs(model, optimizer, X), rtol=1e-5)
        assert_same(state, model)
    assert float(raw_value(model.w).min()) < 0  # flax's own optimizer left the bound, too


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_gradients_are_those_of_flax(make: Any) -> None:
    loss, grads = sw.value_and_grad(lambda model: model(X))(model := Model(make))
    own_loss, own = nnx.value_and_grad(lambda model: model(X))(other := Model(make))
    np.testing.assert_allclose(loss, own_loss)
    for name in ("w", "scale"):
        np.testing.assert_allclose(raw_value(grads[name]), raw_value(own[name]))
    np.testing.assert_allclose(raw_value(model.level), raw_value(other.level))


HINT = (
    "@sw.step(writes='params')\n"
    "def run_hooks(model):  # after each step: state, _ = run_hooks(state)\n"
    "    for _, leaf in nnx.iter_graph(model, graph=True):\n"
    "        if isinstance(leaf, {}):\n"
    "            leaf.set_value(leaf.get_raw_value())"
)
OWN_HINT = (
    "for _, leaf in nnx.iter_graph(model, graph=True):\n"
    "    if isinstance(leaf, {}):\n"
    "        leaf.set_value(leaf.get_raw_value())  # after each optimizer.update(model, grads)"
)


@pytest.mark.parametrize(
    ("name", "type_", "code", "how"),
    [
        ("metadata", "Param", "nnx.Param", "on_set_value"),
        ("method", "Bounded", "Bounded", "on_set_value"),
        ("overload", "Overloads", "Overloads", "Overloads.set_value"),
    ],
)
def test_what_an_optimizer_writes_past_its_hook(name: str, type_: str, code: str, how: str) -> None:
    model = nnx.Dict(w=MAKES[name](jnp.ones(3)), b=nnx.Param(jnp.ones(3)))
    finds(
        "hook-not-run",
        "The optimizer of params writes 1 leaf without running its hook.",
        [f"w: {type_}(3,) float32  kind=params  ({how})"],
        HINT.format(code),
        sw.plan(model, optimizers={"params": optax.sgd(1.0)}),
    )
    finds(
        "hook-not-run",
        "The nnx.Optimizer at 1 writes 1 leaf without running its hook.",
        [f"0/w: {type_}(3,) float32  kind=params  ({how})"],
        OWN_HINT.format(code).replace("value())", "value()[...])" if model.w.ref else "value())"),
        model,
        nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param),
    )
    parses(HINT.format(code))
    parses(OWN_HINT.format(code))


def test_several_leaves_of_several_types_and_kinds() -> None:
    model = nnx.Dict(
        a=Bounded(jnp.ones(3)), b=Overloads(jnp.ones(3)), c=nnx.LoRAParam(jnp.ones(3), on_set_value=clipped)
    )
    plan = sw.plan(model, optimizers={("params", "lora"): optax.sgd(1.0)})
    (found,) = sw.lint(plan, ignore="base-trained-under-lora")
    assert found.message == "The optimizer of params+lora writes 3 leaves without running their hooks."
    assert found.hint.startswith("@sw.step(writes=('params', 'lora'))\n")
    assert "isinstance(leaf, (Bounded, Overloads, nnx.LoRAParam))" in found.hint


def test_hooks_that_run_or_are_not_trained_are_fine() -> None:
    reads = nnx.Dict(
        w=nnx.Param(jnp.ones(3), on_get_value=doubled), made=nnx.Param(jnp.ones(3), on_create_value=doubled)
    )
    clean(sw.plan(reads, optimizers={"params": optax.sgd(1.0)}))
    clean(reads, nnx.Optimizer(reads, optax.sgd(1.0), wrt=nnx.Param))
    clean(nnx.Dict(w=Bounded(jnp.ones(3))))
    clean(sw.plan(nnx.Dict(w=Bounded(jnp.ones(3)))))
    counted = nnx.Dict(w=nnx.Param(jnp.ones(3)), level=nnx.Variable(jnp.ones(3), on_set_value=clipped))
    clean(sw.plan(counted, optimizers={"params": optax.sgd(1.0)}))
    kinds = sw.Kinds(base=sw.Kind(Bounded, frozen=True), rest=sw.Kind(...))
    both = nnx.Dict(w=Bounded(jnp.ones(3)), b=nnx.Param(jnp.ones(3)))
    clean(kinds.plan(both, optimizers={"rest": optax.sgd(1.0)}))
    empty = nnx.Dict(w=nnx.Param(jnp.ones(3), on_set_value=()))  # no hook at all
    clean(sw.plan(empty, optimizers={"params": optax.sgd(1.0)}))


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_the_hint_runs_the_hooks_and_equals_flax(make: Any) -> None:
    model = Model(make)
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.9)})
    optimizer = nnx.Optimizer(model, optax.sgd(0.9), wrt=nnx.Param)
    (ours,), (own,) = sw.lint(plan), sw.lint(model, optimizer)
    scope: dict[str, Any] = {"sw": sw, "nnx": nnx, "Bounded": Bounded, "Overloads": Overloads, "model": model}
    exec(ours.hint, scope)
    state, train = plan.take(model), sw.train_step(lambda model, x: model(x))
    for _ in range(3):
        state, _ = train(state, X)
        state, _ = scope["run_hooks"](state)
        grads = nnx.grad(lambda model: model(X))(model)
        optimizer.update(model, grads)
        exec(own.hint, scope)
        assert_same(state, model)
        assert 0 <= float(raw_value(model.w).min()) <= float(raw_value(model.w).max()) <= 1


@pytest.mark.parametrize("ref", [False, True])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_the_hint_for_flaxs_own_optimizer_gives_hooks_arrays(make: Any, ref: bool) -> None:
    with nnx.var_defaults(ref=ref):
        model = nnx.Dict(w=make(jnp.ones(3)))
        (found,) = sw.lint(model, nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param))
    nnx.update(model, jax.tree.map(lambda _: jnp.full(3, 7.0), {"w": 0}))
    exec(found.hint, {"nnx": nnx, "Bounded": Bounded, "Overloads": Overloads, "model": model})
    assert raw_value(model.w).tolist() == [1.0, 1.0, 1.0]


def test_what_a_state_holds_is_raw() -> None:
    """What the page says of states, restarts and averages: raw values, through which no hook was."""
    model = nnx.Dict(w=nnx.Param(jnp.ones(3), on_get_value=doubled), c=nnx.Cache(jnp.ones(3), on_set_value=doubled))
    plan = sw.plan(model)
    state = plan.take(model)
    np.testing.assert_array_equal(state["params"]["w"], jnp.ones(3))
    fresh = nnx.Dict(w=nnx.Param(jnp.zeros(3), on_get_value=doubled), c=nnx.Cache(jnp.ones(3), on_set_value=doubled))
    plan.put(state, fresh)
    np.testing.assert_array_equal(raw_value(fresh.w), jnp.ones(3))
    np.testing.assert_array_equal(fresh.w[...], 2 * jnp.ones(3))
    np.testing.assert_array_equal(state.restart("cache")["cache"]["c"], jnp.zeros(3))
    assert codes(plan) == []
