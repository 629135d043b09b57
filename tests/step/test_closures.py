"""What a step's function brings along: an object that it writes is named, a model or its method is no function."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import statewise as sw
from refusals import refused

X = jnp.ones((2, 3))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


def state_of(model: Any) -> sw.State:
    return sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)


# --- what the function writes, and was not given ---------------------------------------------------------------------


def written_by_closure(metric: Any) -> Callable[..., Any]:
    def f(m: Any, x: Any) -> Any:
        metric.update(values=x)
        return m(x).mean()

    return f


def test_a_closed_over_object_that_is_written_is_named() -> None:
    metric = plain(nnx.metrics.Average)
    for make in (sw.step, sw.train_step):
        check_named(make, metric)


def check_named(make: Any, metric: Any) -> None:
    """A step that writes a metric of its closure says so, and leaves it alone."""
    with refused(
        sw.StructureError,
        "f writes to `metric`, a variable of its closure: a step writes only the objects that it receives.",
        leaves=["metric/total: MetricState() float32  (written)"],
        hint="plan = kinds.plan(m, metric, optimizers=optimizers)\nstate = plan.take(m, metric)\n"
        "def f(m, metric, x): ...",
    ):
        make(written_by_closure(metric))(state_of(Net()), X)
    assert float(metric.total[...]) == 0.0


def plain(make: Callable[[], Any]) -> Any:
    """What flax refuses to write from another trace: an object without references."""
    with nnx.var_defaults(ref=False):
        return make()


@pytest.mark.parametrize("trains", [False, True], ids=["step", "train_step"])
def test_closed_over_references_are_read_and_written_as_under_nnx_jit(trains: bool) -> None:
    """A reference is read at each call, and what is written into it stays: nothing is lost, nothing is refused."""
    with nnx.var_defaults(ref=True, hijax=False):
        count = nnx.Variable(jnp.zeros(()))

    def f(m: Any, x: Any) -> Any:
        count[...] += 1
        return m(x).mean() + 100 * count[...]

    net = Net()
    state, step, out = state_of(net), sw.train_step(f) if trains else sw.step(f), []
    for calls in (1, 2, 3):
        result = step(state, X)
        state, loss = result if trains else (state, result)
        out.append(round(float(loss), -2))
        assert float(count[...]) == calls
    count[...] = count[...] + 50
    assert round(float(jax.tree.leaves(step(state, X))[-1]), -2) == 5400
    assert out == [100, 200, 300]


def test_a_reference_is_not_returned() -> None:
    with nnx.var_defaults(ref=True, hijax=False):
        rngs = nnx.Rngs(noise=0)
    state = state_of(Net())
    returned = "returns a reference, which JAX does not return from a compiled function."
    for out in (lambda rngs: rngs, lambda rngs: {"count": rngs.noise.count}, lambda rngs: [rngs.noise.key]):
        for make in (sw.step, functools.partial(sw.train_step, has_aux=True)):

            def f(model: Any, x: Any, rngs: Any, out: Any = out) -> Any:
                return model(x).mean(), out(rngs)

            with refused(
                sw.StructureError,
                f"f {returned}",
                hint="return variable[...]  # what it holds; what is written into a reference is in it after the call",
            ):
                make(f)(state, X, rngs)
    layers = nnx.Dict(w=nnx.Param(jnp.ones((4, 1, 3)), ref=False))
    with pytest.raises(sw.StructureError, match=returned):
        sw.scan_layers(lambda layer, x: (x[0] * layer.w[...], x[1]), layers, (X, rngs))


def test_its_hint_goes_through() -> None:
    kinds, m, metric = sw.Kinds.standard(), Net(), nnx.metrics.Average()
    plan = kinds.plan(m, metric, optimizers={"params": optax.sgd(0.1)})
    state = plan.take(m, metric)

    @sw.train_step
    def f(m: Any, metric: Any, x: Any) -> Any:
        metric.update(values=x)
        return m(x).mean()

    state, _ = f(state, X)
    state, _ = f(state, X)
    _, metric = plan.build(state)
    assert float(metric.compute()) == 1.0
    assert int(metric.count[...]) == 12


def test_the_model_itself_written_by_closure_is_told_from_the_parameter() -> None:
    model = plain(lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(sw.StructureError) as caught:
        sw.train_step(lambda m, x: model(x).mean())(state_of(model), X)
    assert "writes to `model`, a variable of its closure" in caught.value.message
    assert str(caught.value.hint).startswith("use `m`, the step's argument, instead of `model`")


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, jax.vmap], ids=lambda one: one.__name__)
def test_the_planned_model_written_under_a_transform_by_closure(transform: Any) -> None:
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with refused(
        sw.StructureError,
        "f writes to the model inside a function that JAX traces (under jax.jit, jax.checkpoint, jax.grad, "
        "jax.vmap, jax.lax.scan ...) and that reaches the model by its closure.",
        leaves=["mean: BatchStat(3,) float32  (written)"],
        hint="nnx.jit, nnx.remat, nnx.grad, nnx.vmap, nnx.scan ..., passing it to the function as an argument",
    ):

        def f(m: Any, x: Any) -> Any:
            return transform(lambda x: m(x))(x).mean()

        sw.train_step(f)(state_of(model), X)


@pytest.mark.parametrize("make", [sw.step, sw.train_step])
def test_hijax_variables_from_outside_that_are_written_are_named(make: Any) -> None:
    """Flax refuses the write of a hijax Variable with another error than that of a plain one, and 0.12.8 runs it."""
    with nnx.var_defaults(hijax=True, ref=False):
        metric, norm = nnx.metrics.Average(), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    check_named(make, metric)
    with pytest.raises(sw.StructureError, match="writes to `norm`, a variable of its closure") as caught:
        make(lambda m, x: jax.jit(lambda x: norm(x))(x).mean() + m(x).mean())(state_of(Net()), X)
    assert list(map(str, caught.value.leaves)) == ["norm/mean: BatchStat(3,) float32  (written)"]
    hidden = weakref.ref(metric)  # which no search follows
    errors = (sw.StructureError, flax.errors.ImmutableVariableError)
    with pytest.raises(errors, match=r"writes to a hijax Variable from outside: a step|inside JAX transformations"):
        make(lambda m, x: hidden().update(values=x) or m(x).mean())(state_of(Net()), X)
    assert float(metric.total[...]) == 0.0


def test_an_error_of_linen_passes_as_it_is() -> None:
    """Linen's error about an immutable variable has the type of Flax's about hijax Variables."""

    class Writes(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            count = self.variable("counts", "n", lambda: jnp.zeros(()))
            count.value = count.value + 1
            return x

    module = Writes()
    variables = module.init(jax.random.key(0), X)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        sw.step(lambda m, x: module.apply(variables, m(x)))(state_of(Net()), X)
    frozen = flax.errors.ImmutableVariableError("because")

    def raises(m: Any, x: Any) -> Any:
        raise frozen

    with pytest.raises(flax.errors.ImmutableVariableError, match="because"):
        sw.step(raises)(state_of(Net()), X)


@pytest.mark.parametrize("hijax", [False, True])
def test_a_step_that_evaluates_another_model_than_its_own_is_warned_of(hijax: bool) -> None:
    with nnx.var_defaults(hijax=hijax, ref=False):
        model = Net()
    step = sw.step(lambda m, x: model(x))
    with pytest.warns(sw.StatewiseWarning, match="reads nothing of its state; it reads `model`"):
        step(state_of(model), X)
    audit = sw.audit(step, state_of(model), X)
    assert len(audit.warnings) == 1
    assert "reads nothing of its state" in str(audit)


# --- refused where they are written ----------------------------------------------------------------------------------


def test_a_model_and_its_methods_are_no_steps() -> None:
    model = Net()
    given_: list[Any] = [
        model,
        model.__call__,
        functools.partial(model.__call__),
        functools.partial(model),
        jax.jit(model),
        jax.jit(model.__call__),
        nnx.jit(model),
        functools.partial(jax.jit(model.__call__)),
    ]
    for make, form in ((sw.step, "def f(model, x):\n    return model(x)"), (sw.train_step, "return loss(model(x), y)")):
        for fn in given_:
            with pytest.raises(sw.StructureError, match="which brings its own arrays") as caught:
                make(fn)
            assert form in str(caught.value.hint)
            with pytest.raises(sw.StructureError, match="which brings its own arrays"):
                make()(fn)


def test_a_method_is_written_with_its_name() -> None:
    class Coder(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

        def encode(self, x: Any) -> Any:
            return x * self.w[...]

    model = Coder()
    with refused(
        sw.StructureError,
        "sw.step received a method of a model, Coder, which brings its own arrays; a step's function must take "
        "the planned objects as arguments.",
        hint="@sw.step\ndef f(model, x):\n    return model.encode(x)",
    ):
        sw.step(model.encode)
    assert sw.step(Coder.encode)(sw.plan(model).take(model), jnp.ones(2)).tolist() == [1.0, 1.0]


def test_an_object_without_arrays_may_be_the_function() -> None:
    class Squared(nnx.Module):
        def __call__(self, model: Any, x: Any) -> Any:
            return (model(x) ** 2).mean()

        def loss(self, model: Any, x: Any) -> Any:
            return self(model, x)

    for fn in (Squared(), Squared().loss):
        _, loss = sw.train_step(fn)(state_of(Net()), X)
        assert loss.shape == ()
