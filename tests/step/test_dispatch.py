"""How a call finds its compiled function: one trace for each signature, from any thread, under any setting of JAX.

What is counted is how often the user's function is called; `jax.jit` is the measure of what a signature is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), int))


with nnx.var_defaults(ref=False):  # what is in a reference is committed to its devices
    MODEL = Net(nnx.Rngs(0))
PLAN = sw.plan(MODEL, optimizers={"params": optax.sgd(0.1)})
X = jnp.ones((4, 3))
AUTO = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))


def fresh() -> sw.State:
    return PLAN.take(MODEL)


def counted(
    decorator: Callable[..., Any], fn: Callable[..., Any], **options: Any
) -> tuple[sw.results.Step, list[None]]:
    """A new step, and a list that grows by one with each trace of it."""
    traces: list[None] = []

    def body(model: Net, *args: Any, **kwargs: Any) -> Any:
        traces.append(None)
        return fn(model, *args, **kwargs)

    return decorator(body, **options), traces


def dense(model: Net, x: Any, by: Any = 1.0) -> jax.Array:
    return model.dense(x) * by


def count(model: Net, x: Any) -> jax.Array:
    model.calls[...] += 1
    return jnp.log(x)


# --- signatures ------------------------------------------------------------------------------------------------------


def test_one_trace_for_each_signature() -> None:
    step, traces = counted(sw.step, dense)
    state = fresh()
    for turn in range(8):
        assert step(state, X[: 1 + turn % 2]).shape == (1 + turn % 2, 3)
    assert len(traces) == 2
    other = sw.plan(MODEL).take(MODEL)  # another plan: it has no optimizer
    for _ in range(2):
        step(other, X)
        step(state, X)
    assert len(traces) == 4


def test_training_traces_once() -> None:
    step, traces = counted(sw.train_step, lambda model, x: (model.dense(x) ** 2).mean())
    state = fresh()
    for _ in range(3):
        state, _ = step(state, X)
    state, _ = jax.jit(step.__call__)(state, X)
    jax.lax.scan(lambda state, x: step(state, x), state, jnp.stack([X] * 2))
    jax.vmap(step, in_axes=(None, 0), out_axes=0)(state, jnp.stack([X] * 2))
    assert len(traces) == 1


SCALARS = [1.0, 2.0, jnp.array(2.0), 3, jnp.array(3), True, False]
NUMPY = [np.float32(2), np.array(2, np.float32), np.float64(2), np.array(2.0), np.int32(3), np.int64(3), np.bool_(True)]


def test_numbers_and_weak_types_are_told_apart_as_jax_does() -> None:
    step, traces = counted(sw.step, dense)
    jitted: list[None] = []
    function = jax.jit(lambda x, by: (jitted.append(None), x * by)[1])
    state = fresh()
    for _ in range(2):
        for by in (*SCALARS, *NUMPY):
            out = step(state, X, by)
            function(X, by)
            assert len(traces) == len(jitted), by
            assert out.dtype == function(X, by).dtype
            np.testing.assert_allclose(out, dense(MODEL, X, by), rtol=1e-6)


def test_numpy_arguments() -> None:
    step, traces = counted(sw.step, dense)
    for x in (np.ones((4, 3), np.float32), np.ones((4, 3)), X):
        step(fresh(), x)
    assert len(traces) == 1
    with pytest.raises(TypeError, match="str"):
        step(fresh(), X, "twice")


def test_keys_as_arguments() -> None:
    step, traces = counted(sw.step, lambda model, key: model.dense(jax.random.normal(key, (1, 3))))
    for key in (jax.random.key(0), jax.random.key(1), jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0)) * 2:
        assert step(fresh(), key).shape == (1, 3)
    assert len(traces) == 3


def test_structures_and_names_of_arguments() -> None:
    step, traces = counted(sw.step, lambda model, batch, *, scale=1.0: model.dense(batch["x"]) * scale)
    state = fresh()
    for _ in range(2):
        step(state, {"x": X})
        step(state, {"x": X, "unused": X})
        step(state, {"x": X}, scale=2.0)
    assert len(traces) == 3


def test_a_leaf_that_stops_being_weak_settles() -> None:
    """As under `jax.jit`: a weak type takes part in promotion, so a state keeps it until a step writes another."""
    model = nnx.Dict(total=nnx.Variable(jnp.asarray(0.0), ref=False))  # a reference has no weak type
    state = sw.plan(model).take(model)
    step, traces = counted(sw.step, lambda model, x: model.total.set_value(model.total[...] + x), writes="variables")
    for _ in range(4):
        state, _ = step(state, jnp.ones(()))
    assert len(traces) == 2


# --- jax.jit's options -----------------------------------------------------------------------------------------------


def scaled(model: Net, x: jax.Array, mode: Any = "keep", by: Any = 2.0) -> jax.Array:
    return model.dense(x) * (by if mode == "scale" else 1.0)


@pytest.mark.parametrize("options", [{"static_argnames": "mode"}, {"static_argnums": 2}, {"static_argnums": (-2,)}])
def test_static_arguments(options: dict[str, Any]) -> None:
    traces: list[None] = []

    @functools.wraps(scaled)
    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(None)
        return scaled(*args, **kwargs)

    step = sw.step(counted, **options)
    state = fresh()
    for _ in range(2):
        kept, twice = step(state, X, "keep"), step(state, X, "scale")
        np.testing.assert_allclose(twice, 2 * kept)
        np.testing.assert_allclose(step(state, X, mode="scale", by=3.0), 3 * kept, rtol=1e-6)
        step(state, X)
    assert len(traces) == 4
    with pytest.raises(sw.StructureError) as caught:
        step(state, X, ["scale"])
    assert caught.value.message == "The static argument mode is a list, which cannot be hashed."


def test_donated_arguments() -> None:
    step = sw.step(dense, donate_argnames=("x",))
    x = jnp.ones((4, 3))
    out = step(fresh(), x)
    assert x.is_deleted()
    np.testing.assert_allclose(out, MODEL.dense(X), rtol=1e-6)
    with pytest.raises(sw.StructureError, match="was donated by an earlier step"):
        step(fresh(), x)
    by_number = sw.step(dense, donate_argnums=1)
    x = jnp.ones((4, 3))
    by_number(fresh(), x=x)
    assert x.is_deleted()


def test_sharded_outputs() -> None:
    sharding = jax.NamedSharding(AUTO, jax.P("d"))
    assert sw.step(dense, out_shardings=sharding)(fresh(), X).sharding == sharding


@pytest.mark.parametrize(
    "options, text",
    [
        ({"static_argname": "x"}, "A step does not take the option 'static_argname'."),
        ({"static_argnames": "y"}, "static: dense has no parameter y."),
        ({"donate_argnums": 7}, "donate: dense has no parameter 7."),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], text: str) -> None:
    with pytest.raises(sw.DeclarationError) as caught:
        sw.step(dense, **options)
    assert caught.value.message == text


# --- ahead of time ---------------------------------------------------------------------------------------------------


def test_lowered_and_compiled_ahead_of_time() -> None:
    step, traces = counted(sw.train_step, lambda model, x: (model.dense(x) ** 2).mean())
    lowered = step.lower(PLAN.abstract(), jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert "stablehlo" in lowered.as_text()
    compiled = lowered.compile()
    state, first = compiled(fresh(), X)
    state, second = compiled(state, X)
    assert second < first
    again, loss = step(fresh(), X)  # finds the same trace
    assert float(loss) == float(first)
    assert len(traces) == 1
    with pytest.raises(TypeError, match="compiled"):
        compiled(again, X[:1])
    with pytest.raises(sw.StructureError, match="was compiled for a plan other than"):
        compiled(sw.plan(MODEL).take(MODEL), X)


# --- settings --------------------------------------------------------------------------------------------------------


def test_going_back_and_forth_between_settings() -> None:
    step, traces = counted(sw.step, dense)
    state = fresh()
    for _ in range(3):
        step(state, X)
        with jax.default_matmul_precision("highest"):
            step(state, X)
        with jax.set_mesh(AUTO):
            step(state, X)
        with jax.enable_x64(True):
            assert step(state, np.ones((4, 3))).dtype == jnp.float64
    assert len(traces) == 4


def test_shardings_that_are_part_of_the_type() -> None:
    step, traces = counted(sw.step, dense)
    with jax.set_mesh(EXPLICIT):
        state = jax.device_put(fresh(), jax.P())
        split, whole = jax.device_put(X, jax.P("d")), jax.device_put(X, jax.P())
        for _ in range(2):
            assert jax.typeof(step(state, split)).sharding.spec == jax.P("d", None)
            assert jax.typeof(step(state, whole)).sharding.spec == jax.P(None, None)
    assert len(traces) == 2


def test_moving_to_other_devices(devices: list[jax.Device]) -> None:
    step, traces = counted(sw.step, dense)
    jitted: list[None] = []
    function = jax.jit(lambda x: jitted.append(None))
    for place in (devices[0], devices[3], jax.NamedSharding(AUTO, jax.P()), jax.NamedSharding(AUTO, jax.P("d"))) * 2:
        x = jax.device_put(X, place)
        out = step(jax.device_put(fresh(), devices[3] if place is devices[3] else None), x)
        np.testing.assert_allclose(out, MODEL.dense(X), rtol=1e-6)
        function(x)
        assert len(traces) == len(jitted)


# --- NaNs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["compiled without", "compiled with"])
@pytest.mark.parametrize("debug, bad", [(jax.debug_nans, -X), (jax.debug_infs, 0 * X)], ids=["nan", "inf"])
def test_a_nan_is_found_where_it_arises_and_the_state_is_whole(debug: Any, bad: jax.Array, before: bool) -> None:
    step, _ = counted(sw.step, count, writes="variables")
    state = fresh()
    with debug(before):
        state, _ = step(state, X)
    with debug(True):
        with pytest.raises(FloatingPointError, match="encountered in log"):
            step(state, bad)
        assert not any(array.is_deleted() for array in jax.tree.leaves(state))
        after, _ = step(state, X)
        assert step(state, X[:1])[1].shape == (1, 3)
    after, _ = step(after, X)
    assert int(after["variables"]["calls"]) == 3


def test_a_nan_in_training_leaves_the_state_whole() -> None:
    step, _ = counted(sw.train_step, lambda model, x: jnp.log(model.dense(x)).mean())
    state = fresh()
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError):
            step(state, -1e9 * X)
        assert all(np.all(np.isfinite(array)) for array in jax.tree.leaves(state["params"]))


def test_a_step_that_fails_midway_says_what_is_lost() -> None:
    def fail(value: Any) -> None:
        raise ValueError("the disk is full")

    def report(model: Net, x: jax.Array) -> None:
        model.calls[...] += 1
        jax.experimental.io_callback(fail, None, x, ordered=True)

    step, _ = counted(sw.step, report, writes="variables")
    state = fresh()
    with pytest.raises(Exception, match="the disk is full") as caught:  # each version of JAX has its own class
        jax.block_until_ready(step(state, X))
    assert "body had already donated the state's variables: this state is lost." in caught.value.__notes__
    with pytest.raises(sw.StructureError, match="This state was donated"):
        step(state, X)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_eight_threads_trace_once() -> None:
    step, traces = counted(sw.step, dense)
    trained, training = counted(sw.train_step, lambda model, x: (model.dense(x) ** 2).mean())
    state = fresh()

    def work(number: int) -> tuple[np.ndarray, float]:
        mine, loss = fresh(), jnp.zeros(())
        for _ in range(3):
            mine, loss = trained(mine, X)
        return np.array(step(state, X)), float(loss)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(16)))
    assert len(traces) == len(training) == 1
    for out, loss in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        assert loss == results[0][1]


def test_threads_with_signatures_of_their_own() -> None:
    step, traces = counted(sw.step, dense)
    state = fresh()

    def work(number: int) -> tuple[int, ...]:
        with jax.default_matmul_precision("highest" if number % 2 else "default"):
            return step(state, X[: 1 + number % 4]).shape

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(32))) == [(1 + number % 4, 3) for number in range(32)]
    assert len(traces) == 4  # an even number of rows always meets the same setting


# --- what a function closes over -------------------------------------------------------------------------------------


def test_closing_over_a_tracer_of_the_caller() -> None:
    box: list[Any] = []
    step, traces = counted(sw.step, lambda model, x: model.dense(x) * box[0])
    state = fresh()

    def by(scale: Any) -> jax.Array:
        box[:] = [scale]
        return (step(state, X) ** 2).sum()

    square = float((MODEL.dense(X) ** 2).sum())
    for scale in (1.0, 3.0):
        np.testing.assert_allclose(jax.grad(by)(scale), 2 * scale * square, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(by)(scale), scale**2 * square, rtol=1e-5)
    assert len(traces) == 3  # each for a trace of the caller's: jax.jit traces once for both numbers


# --- the cost of a call ----------------------------------------------------------------------------------------------


def test_a_second_call_does_not_look_at_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nnx.Dict(
        layers=nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(1000)]), hits=nnx.Cache(jnp.zeros(()))
    )
    state = sw.plan(model).take(model)
    assert len(jax.tree.leaves(state)) == 2001

    @sw.step(writes="cache")
    def hit(model: Any, by: jax.Array) -> jax.Array:
        model.hits[...] += by
        return model.layers[7].kernel[...]

    by = jnp.ones(())
    state, _ = hit(state, by)
    calls: list[str] = []
    watched = [(nnx, name) for name in ("flatten", "unflatten", "split", "state", "merge")] + [(jax, "make_jaxpr")]
    for module, name in watched:
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: calls.append(name))
    flatten = jax.tree.flatten

    def small(tree: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = flatten(tree, *args, **kwargs)
        assert len(leaves) < 10
        return leaves, structure

    monkeypatch.setattr(jax.tree, "flatten", small)
    state, kernel = hit(state, by)
    assert calls == []
    monkeypatch.undo()
    assert float(state["cache"]["hits"]) == 2.0
    assert kernel.shape == (1, 1)
