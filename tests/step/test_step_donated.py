"""States and arrays that a step has donated, arrays given twice, and functions that raise on the way."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from comparing import same
from refusals import refused
from strategies import Node

SPENT = (
    "use the state that came back: state, out = step(state, ...)\n"
    "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)"
)


def model() -> Node:
    return Node(a=nnx.Param(jnp.ones(2)), b=nnx.Param(jnp.ones(2)), n=nnx.Variable(jnp.array(0)))


def taken(**options: Any) -> sw.State:
    return sw.plan(model(), **options).take(model())


@sw.step(writes="params")
def double(model: Any) -> Any:
    model.a[...] *= 2
    return model.b[...].sum()


@sw.step(writes="variables")
def count(model: Any) -> None:
    model.n[...] += 1


@sw.step
def read(model: Any) -> Any:
    return model.a[...].sum() + model.b[...].sum()


# --- donated states ------------------------------------------------------------------------------------------------


def by_a_step(state: sw.State) -> str:
    double(state)
    return "double has donated its params"


def by_a_step_compiled_ahead(state: sw.State) -> str:
    double.lower(state).compile()(state)
    return "double has donated its params"


def by_a_restart(state: sw.State) -> str:
    state.restart("params")
    return "restart('params') has donated its params"


def by_the_user_s_jit(state: sw.State) -> str:
    jax.jit(lambda state: double(state), donate_argnums=0)(state)
    return "a step has donated its params, variables"


def by_a_copy_of_the_tree(state: sw.State) -> str:
    double(jax.tree.map(lambda array: array, state))
    return "a step has donated its params"


def by_a_state_that_shares_the_part(state: sw.State) -> str:
    double(state.replace(variables=state["variables"]))
    return "double has donated its params"


@pytest.mark.parametrize(
    "donate",
    [
        by_a_step,
        by_a_step_compiled_ahead,
        by_a_restart,
        by_the_user_s_jit,
        by_a_copy_of_the_tree,
        by_a_state_that_shares_the_part,
    ],
)
@pytest.mark.parametrize("use", [double, read], ids=["writes", "reads"])
def test_a_step_on_a_spent_state(donate: Callable[[sw.State], str], use: Any) -> None:
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, restart=jnp.zeros_like))
    state = kinds.plan(model()).take(model())
    use(jax.tree.map(jnp.copy, state))  # compiled already
    message = f"This state was donated: {donate(state)}."
    for _ in range(2):
        with refused(sw.StructureError, message, kind="params", hint=SPENT):
            use(state)


@pytest.mark.parametrize("use", [double, read], ids=["writes", "reads"])
def test_a_spent_state_is_refused_by_a_step_not_seen_before(use: Any) -> None:
    fresh = sw.step(use.fn, writes="params" if use is double else ())
    state = taken()
    double(state)
    with refused(
        sw.StructureError, "This state was donated: double has donated its params.", kind="params", hint=SPENT
    ):
        fresh(state)


def test_what_was_not_donated_is_there() -> None:
    state = taken()
    after, _ = double(state)
    old, _ = count(state)
    assert int(old["variables"]["n"]) == 1
    after, _ = count(after.replace(variables={"n": jnp.array(5)}))
    assert int(after["variables"]["n"]) == 6


def test_a_step_that_writes_nothing_spends_nothing() -> None:
    state = taken()
    assert float(read(state)) == float(read(state)) == 4
    assert same(state, taken())


def test_a_part_taken_out_before_a_step() -> None:
    state = taken()
    old = state["params"]["a"]
    state, _ = double(state)
    assert old.is_deleted()
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(old)
    assert np.array_equal(state["params"]["a"], [2, 2])


def test_a_donated_array_as_an_argument() -> None:
    add = sw.step(lambda model, x: model.a[...] + x)
    state = taken()
    old = state["params"]["a"]
    state, _ = double(state)
    add(state, jnp.ones(2))
    for _ in range(2):
        with refused(
            sw.StructureError,
            "An argument of <lambda>, float32[2], was donated by an earlier step.",
            hint="copy it before that step: kept = jnp.copy(array)",
        ):
            add(state, old)
    assert np.array_equal(add(state, jnp.ones(2)), [3, 3])


def test_a_donated_argument_given_again() -> None:
    keep = sw.step(lambda model, x: x + model.a[...], donate_argnames="x")
    state, x = taken(), jnp.ones(2)
    assert np.array_equal(keep(state, x), [2, 2])
    assert x.is_deleted()
    with refused(
        sw.StructureError,
        "An argument of <lambda>, float32[2], was donated by an earlier step.",
        hint="copy it before that step: kept = jnp.copy(array)",
    ):
        keep(state, x)
    assert same(state, taken())


# --- one array in two places -------------------------------------------------------------------------------------


def test_an_argument_that_is_an_array_of_the_state() -> None:
    @sw.step(writes="params")
    def move(model: Any, x: Any) -> None:
        model.a[...] += x

    state = taken()
    for _ in range(2):
        with refused(
            sw.StructureError,
            "An argument of move is an array of the state, which the step donates.",
            leaves=["a: Param(2,) float32  kind=params"],
            kind="params",
            hint="pass a copy: jnp.copy(array)",
        ):
            move(state, state["params"]["a"])
        assert same(state, taken())
    after, _ = move(state, jnp.copy(state["params"]["a"]))
    assert np.array_equal(after["params"]["a"], [2, 2])


def test_an_argument_that_is_an_array_the_step_leaves_alone() -> None:
    state = taken()
    out = sw.step(lambda model, x: model.a[...] + x)(state, state["params"]["a"])
    assert np.array_equal(out, [2, 2])


def test_one_array_in_two_leaves_of_a_state_made_by_hand() -> None:
    @sw.step(writes="params")
    def both(model: Any) -> None:
        model.a[...] += 1
        model.b[...] += 2

    array = jnp.ones(2)
    state = jax.tree.map(lambda old: array if old.shape else old, taken())
    for _ in range(2):
        with refused(
            sw.StructureError,
            "a and b share one array, so a step could not write them separately.",
            leaves=["a: Param(2,) float32  kind=params", "b: Param(2,) float32  kind=params"],
            kind="params",
            hint="give one of them a copy: jax.tree.map(jnp.copy, part)",
        ):
            both(state)
        assert not array.is_deleted()
    after, _ = both(jax.tree.map(jnp.copy, state))
    assert np.array_equal(after["params"]["a"], [2, 2])
    assert np.array_equal(after["params"]["b"], [3, 3])


@pytest.mark.parametrize("copy", [True, False])
def test_variables_that_share_an_array_are_trained_apart(copy: bool) -> None:
    array = jnp.ones(2)
    thing = Node(a=nnx.Param(array), b=nnx.Param(array), n=nnx.Variable(jnp.array(0)))
    plan = sw.plan(thing, optimizers={"params": optax.sgd(1.0)})
    state, _ = sw.train_step(lambda model: model.a[...].sum() - model.b[...].sum())(plan.take(thing, copy=copy))
    assert np.array_equal(state["params"]["a"], [0, 0])
    assert np.array_equal(state["params"]["b"], [2, 2])


# --- functions that raise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, StopIteration, SystemExit, KeyError])
def test_an_exception_while_tracing(error: type[BaseException]) -> None:
    fail = [True]

    @sw.step(writes=("params", "variables"))
    def sometimes(model: Any) -> Any:
        model.a[...] *= 2
        model.n[...] += 1
        if fail[0]:
            raise error("on the way")
        return model.b[...].sum()

    state = taken()
    for _ in range(2):
        with pytest.raises(error, match="on the way"):
            sometimes(state)
    assert same(state, taken())
    count(jax.tree.map(jnp.copy, state))
    fail[0] = False
    state, _ = sometimes(state)
    assert np.array_equal(state["params"]["a"], [2, 2])
    assert int(state["variables"]["n"]) == 1


def test_an_exception_while_tracing_a_train_step() -> None:
    fail = [True]

    @sw.train_step
    def sometimes(model: Any) -> Any:
        model.n[...] += 1
        if fail[0]:
            raise ZeroDivisionError("on the way")
        return model.a[...].sum()

    tx = optax.adam(0.5)
    state = taken(optimizers={"params": tx})
    with pytest.raises(ZeroDivisionError, match="on the way"):
        sometimes(state)
    assert same(state, taken(optimizers={"params": tx}))
    fail[0] = False
    state, loss = sometimes(state)
    assert float(loss) == 2


def test_no_tracer_leaks_out_of_a_function_that_raises() -> None:
    kept: list[Any] = []

    @sw.step(writes="params")
    def leak(model: Any) -> None:
        kept.append(model)
        model.a[...] *= 2
        raise ValueError("on the way")

    state = taken()
    with pytest.raises(ValueError, match="on the way"):
        leak(state)
    kept.clear()
    gc.collect()
    assert not any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(state))
    assert float(read(state)) == 4


def test_an_exception_at_run_time_of_a_step_that_writes_nothing() -> None:
    fail = [True]

    def host(x: Any) -> Any:
        if fail[0]:
            raise ZeroDivisionError("on the way")
        return x

    @sw.step
    def call(model: Any) -> Any:
        return jax.pure_callback(host, jax.ShapeDtypeStruct((2,), jnp.float32), model.a[...])

    state = taken()
    with pytest.raises(Exception, match="on the way"):
        jax.block_until_ready(call(state))
    assert same(state, taken())
    fail[0] = False
    assert np.array_equal(call(state), [1, 1])


def test_an_exception_at_run_time_of_a_step_that_writes() -> None:
    """XLA has the buffers by then: the state says what it has lost, and what the step did not touch is there."""

    def host(x: Any) -> Any:
        raise ZeroDivisionError("on the way")

    @sw.step(writes="params")
    def call(model: Any) -> None:
        model.a[...] = jax.pure_callback(host, jax.ShapeDtypeStruct((2,), jnp.float32), model.a[...])

    state = taken()
    with pytest.raises(Exception, match="on the way"):
        jax.block_until_ready(call(state))
    if any(array.is_deleted() for array in state.part("params").arrays):
        with pytest.raises(sw.StructureError, match=r"^This state was donated: .* has donated its params\."):
            double(state)
    else:
        assert float(read(state)) == 4
    after, _ = count(state)
    assert int(after["variables"]["n"]) == 1


def test_nan_checking_keeps_a_state_that_is_only_read() -> None:
    state = taken()
    divide = sw.step(lambda model, x: model.a[...] / x)
    with jax.debug_nans(True):
        assert np.array_equal(divide(state, jnp.ones(2)), [1, 1])
        with pytest.raises(FloatingPointError):
            divide(state, jnp.full(2, jnp.nan))
        assert np.array_equal(divide(state, jnp.ones(2)), [1, 1])
    assert same(state, taken())


def test_nan_checking_of_a_step_that_writes_names_what_is_lost() -> None:
    @sw.step(writes="params")
    def divide(model: Any, x: Any) -> None:
        model.a[...] = model.a[...] / x

    state = taken()
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError):
            divide(state, jnp.full(2, jnp.nan))
        if state["params"]["a"].is_deleted():
            with pytest.raises(sw.StructureError, match=r"^This state was donated: .* has donated its params\."):
                divide(state, jnp.ones(2))
        else:
            divide(state, jnp.ones(2))
        count(state)


# --- states that never had values --------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1])
def test_an_abstract_state_is_no_state_to_run_on(before: int) -> None:
    plan = sw.plan(model())
    look = sw.step(lambda model: model.a[...].sum())
    for _ in range(before):
        look(plan.take(model()))
    with refused(
        sw.StructureError,
        "This state is abstract: it has shapes but no values to run <lambda> on.",
        hint="state = plan.take(model)  # or restore into it: state, report = sw.restore(path, state)\n"
        "ahead of time: step.lower(state, ...).compile()",
    ):
        look(plan.abstract())
    assert look(plan.take(model())) == 2


def test_a_type_error_of_the_function_is_the_functions() -> None:
    add = sw.step(lambda model, x: model.a[...] + x)
    with pytest.raises(TypeError, match="str"):
        add(taken(), "one")
