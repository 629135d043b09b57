"""Averages: declared beside the optimizers, moved by every train step, used by `state.with_averages`.

What they should be is told by programs that we did not write (`optax.ema`, `optax.incremental_update`, `nnx.EMA`) and
by a loop in NumPy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw
from averaged import SGD, Net, batch, close, loss_of, planned, train, warmup

# --- step by step, against programs that we did not write ------------------------------------------------------------


def test_each_step_is_that_of_optax_ema() -> None:
    model, plan = planned({"params": sw.EMA(0.9)})
    state = plan.take(model)
    tx = optax.ema(0.9, debias=False)
    theirs = tx.init(state["params"])._replace(ema=jax.tree.map(jnp.copy, state["params"]))
    for number in range(4):
        state, _ = train(state, batch(number))
        _, theirs = tx.update(state["params"], theirs)
        close(state["ema"]["params"], theirs.ema)


def test_each_step_is_that_of_optax_incremental_update_under_a_schedule() -> None:
    model, plan = planned({"params": sw.EMA(warmup)})
    state = plan.take(model)
    theirs = jax.tree.map(jnp.copy, state["params"])
    for number in range(4):
        state, _ = train(state, batch(number))
        theirs = optax.incremental_update(state["params"], theirs, step_size=1 - warmup(jnp.int32(number)))
        close(state["ema"]["params"], theirs)
    assert state["ema"]["_counts"]["params"] == 4


def test_each_step_is_that_of_nnx_beside_an_nnx_optimizer() -> None:
    model, plan = planned({"params": sw.EMA(0.8)})
    state = plan.take(model)
    optimizer, ema = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), nnx.EMA(model, 0.8, only=nnx.Param)
    for number in range(3):
        grads = nnx.grad(loss_of)(model, batch(number))
        optimizer.update(model, grads)
        ema.update(nnx.state(model, nnx.Param))
        state, _ = train(state, batch(number))
        close(state["ema"]["params"], nnx.to_pure_dict(ema.params))


@pytest.mark.parametrize("pack", [False, True, ("params",), ("ema", "slow"), ("params", "ema", "stats")])
def test_several_averages_of_several_kinds_are_those_of_a_loop_in_numpy(pack: Any) -> None:
    averages = {("params", "stats"): [sw.EMA(0.9), sw.EMA(warmup, name="slow")]}
    model, plan = planned(averages, {"params": optax.adam(1e-2)})
    state = plan.take(model, pack=pack)
    start = {kind: jax.tree.map(np.asarray, state[kind]) for kind in ("params", "stats")}
    ours: dict[str, Any] = {"ema": dict(start), "slow": dict(start)}
    for number in range(3):
        state, _ = train(state, batch(number))
        for name, decay in (("ema", 0.9), ("slow", float(warmup(jnp.int32(number))))):
            for kind in ("params", "stats"):
                ours[name][kind] = jax.tree.map(
                    lambda old, new, decay=decay: decay * np.asarray(old) + (1 - decay) * np.asarray(new),
                    ours[name][kind],
                    state[kind],
                )
                close(state[name][kind], ours[name][kind])


def test_an_optimizer_that_is_not_elementwise_is_averaged_on_packed_buffers_too() -> None:
    class Deep(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(4)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Deep(nnx.Rngs(0))
    tx = optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.1))
    plan = sw.plan(model, optimizers={"params": tx}, averages={"params": sw.EMA(0.5)})
    plain, packed = plan.take(model), plan.take(model, pack=True)
    step = sw.train_step(lambda model, x: (model(x) ** 2).mean())
    for number in range(2):
        plain, _ = step(plain, batch(number))
        packed, _ = step(packed, batch(number))
    assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(plain))
    close(packed["ema"], plain["ema"])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 3))
def test_an_average_of_decay_0_is_the_parameters(seed: int, pack: bool, steps: int) -> None:
    model, plan = planned({("params", "stats"): sw.EMA(0)})
    state = plan.take(model, pack=pack)
    for number in range(steps):
        state, _ = train(state, batch(seed + number))
    for kind in ("params", "stats"):
        for ours, theirs in zip(*map(jax.tree.leaves, (state.with_averages("ema")[kind], state[kind])), strict=True):
            np.testing.assert_array_equal(ours, theirs)


# --- what is averaged, and when --------------------------------------------------------------------------------------


def test_a_train_step_leaves_the_averages_of_kinds_that_it_does_not_update() -> None:
    head = sw.Path("last/**")
    kinds = sw.Kinds(head=sw.Kind(head), body=sw.Kind(nnx.All(nnx.Param, nnx.Not(head))), rest=sw.Kind(...))
    optimizers = {"head": optax.sgd(0.1), "body": optax.sgd(0.1)}
    model, plan = planned({("head", "body"): sw.EMA(warmup)}, optimizers, kinds)
    state = plan.take(model)
    before = jax.tree.map(np.asarray, state["ema"])
    state, _ = sw.train_step(loss_of, wrt="head")(state, batch(0))
    assert state["ema"]["_counts"] == {"head": 1, "body": 0}
    for old, new in zip(*map(jax.tree.leaves, (before["body"], state["ema"]["body"])), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not np.array_equal(before["head"]["last"]["kernel"], state["ema"]["head"]["last"]["kernel"])


def test_a_plain_step_never_touches_averages() -> None:
    model, plan = planned({("params", "stats"): sw.EMA(0.5)})
    state = plan.take(model)
    kept = state["ema"]
    after, _ = sw.step(writes=("params", "stats"))(_doubled)(state, batch(0))
    assert after["ema"] is kept
    assert not np.array_equal(after["stats"]["norm"]["mean"], state.with_averages("ema")["stats"]["norm"]["mean"])


def _doubled(model: Net, x: jax.Array) -> jax.Array:
    model.last.bias[...] = model.last.bias[...] + 1
    return model(x)


def test_a_step_that_does_not_read_averages_does_not_pass_them() -> None:
    _, plan = planned({"params": sw.EMA(0.5)})
    lowered = sw.step(lambda model, x: model.last(x)).lower(plan.abstract(), jnp.ones((1, 4)))
    assert lowered.in_tree.num_leaves == 3  # a kernel, a bias, and x


def test_nothing_but_the_averages_crosses_besides() -> None:
    plain, averaged = (
        train.lower(planned(averages)[1].abstract(), batch(0)) for averages in (None, {"params": sw.EMA(0.5)})
    )
    assert averaged.in_tree.num_leaves == plain.in_tree.num_leaves + 5
    assert averaged.out_tree.num_leaves == plain.out_tree.num_leaves + 5


def test_a_scan_over_steps_is_the_steps_one_by_one() -> None:
    model, plan = planned({"params": sw.EMA(warmup)})
    xs = jnp.stack([batch(number) for number in range(3)])
    scanned, _ = jax.lax.scan(train, plan.take(model), xs)
    state = plan.take(model)
    for x in xs:
        state, _ = train(state, x)
    close(scanned["ema"], state["ema"])


def test_averages_are_traced_once() -> None:
    traces = []

    def decay(count: jax.Array) -> jax.Array:
        traces.append(count)
        return warmup(count)

    model, plan = planned({"params": sw.EMA(decay)})
    state = plan.take(model)
    traces.clear()
    for number in range(3):
        state, _ = train(state, batch(number))
    assert len(traces) == 1


# --- how they live ---------------------------------------------------------------------------------------------------


def test_averages_are_a_kind_of_arrays_and_no_parameters() -> None:
    _, plan = planned({("params", "stats"): [sw.EMA(0.9), sw.EMA(warmup, name="slow")]})
    assert list(plan.kinds)[-2:] == ["ema", "slow"]
    assert plan.kinds["ema"] == sw.Kind(sw.EMA)
    paths = [sw.format_path(leaf.path) for leaf in plan["slow"]]
    assert paths[0] == "slow/params/first/bias"
    assert paths[-4:] == ["slow/_counts/params", "slow/stats/norm/mean", "slow/stats/norm/var", "slow/_counts/stats"]
    assert {leaf.type for leaf in plan["slow"]} == {jax.Array}
    assert plan.averages == {("params", "stats"): (sw.EMA(0.9), sw.EMA(warmup, name="slow"))}


def test_equal_averages_make_equal_plans() -> None:
    averages = {"params": sw.EMA(0.9, dtype=jnp.float32)}
    plan = planned(averages)[1]
    assert planned(averages)[1] is plan
    assert planned({"params": sw.EMA(0.9, dtype="float32")})[1] is plan
    assert planned({"params": sw.EMA(0.8)})[1] is not plan
    again = plan.kinds.plan(Net(nnx.Rngs(0)), optimizers=SGD, averages=plan.averages)
    assert again is plan


def test_averages_start_as_copies() -> None:
    model, plan = planned({"params": sw.EMA(0.9)})
    state = plan.take(model, copy=False)
    close(state["ema"]["params"], state["params"])
    assert state["ema"]["params"]["last"]["bias"] is not state["params"]["last"]["bias"]
    state, _ = train(state, batch(0))  # which donates both


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        (jnp.bfloat16, None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, None, jnp.float32),
        (jnp.complex64, jnp.bfloat16, jnp.complex64),
    ],
)
def test_averages_have_a_dtype_of_their_own(dtype: Any, given: Any, expected: Any) -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(4, dtype)))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.5)}, averages={"params": sw.EMA(0.75, dtype=given)})
    state, _ = sw.train_step(lambda model: jnp.abs(model["w"][...]).astype(jnp.float32).sum())(plan.take(model))
    assert state["ema"]["params"]["w"].dtype == expected
    np.testing.assert_array_equal(np.asarray(state["ema"]["params"]["w"], np.complex64), np.full(4, 0.875))
    assert state.with_averages("ema")["params"]["w"].dtype == dtype
    assert state.with_averages("ema").plan is plan


def test_an_average_of_half_precision_parameters_moves() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(1, jnp.bfloat16)))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.0)}, averages={"params": sw.EMA(0.999)})
    state = plan.take(model).replace(params={"w": jnp.zeros(1, jnp.bfloat16)})
    step = sw.train_step(lambda model: model["w"][...].astype(jnp.float32).sum())
    for _ in range(3):
        state, _ = step(state)
    np.testing.assert_allclose(state["ema"]["params"]["w"], [0.999**3], rtol=1e-6)


def test_a_cast_of_the_parameters_leaves_the_averages() -> None:
    model, plan = planned({"params": sw.EMA(0.5)})
    state = plan.take(model).cast(params="bfloat16")
    assert state["ema"]["params"]["last"]["bias"].dtype == jnp.float32
    half = state.cast(ema="bfloat16")
    assert half["ema"]["params"]["last"]["bias"].dtype == jnp.bfloat16
    assert train(half, batch(0))[0].with_averages("ema")["params"]["last"]["bias"].dtype == jnp.bfloat16


def test_a_packed_state_that_is_cast_is_averaged_on() -> None:
    model, plan = planned({("params", "stats"): sw.EMA(0.5)})
    state = plan.take(model, pack=True).cast(params="bfloat16")
    start = jax.tree.map(np.asarray, state["ema"])
    state, _ = train(state, batch(0))
    assert state["ema"]["params"]["last"]["bias"].dtype == jnp.float32
    for kind in ("params", "stats"):
        halves = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * np.asarray(new, np.float32), start[kind], state[kind])
        close(state["ema"][kind], halves)


def test_averages_of_several_objects_are_of_each() -> None:
    models = Net(nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1))
    plan = sw.plan(*models, optimizers=SGD, averages={"params": sw.EMA(0.5)})
    step = sw.train_step(lambda net, head, x: head(net(x)).sum())
    state = plan.take(*models)
    start = jax.tree.map(np.asarray, state["params"])
    state, _ = step(state, batch(0))
    close(state["ema"]["params"], jax.tree.map(lambda a, b: (a + np.asarray(b)) / 2, start, state["params"]))
    assert sw.format_path(plan["ema"][-1].path) == "ema/params/1/kernel"


def test_a_variable_of_several_arrays_is_averaged_array_by_array() -> None:
    model = nnx.Dict(w=nnx.Param({"a": jnp.ones(2), "b": (jnp.ones(3), jnp.zeros(1))}))
    plan = sw.plan(model, optimizers={"params": optax.sgd(1.0)}, averages={"params": sw.EMA(0.5)})
    step = sw.train_step(lambda model: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model["w"].get_value())))
    state, _ = step(plan.take(model))
    used = state.with_averages("ema")["params"]["w"]
    np.testing.assert_array_equal(used["b"][0], np.full(3, 0.5))
    assert [sw.format_path(leaf.path) for leaf in plan["ema"]][-1] == "ema/params/w/b/1"


def test_a_census_and_an_audit_count_them() -> None:
    model, plan = planned({"params": sw.EMA(0.5)})
    state = plan.take(model)
    assert sw.census(state)["ema"].size == sw.census(state)["params"].size
    audit = sw.audit(train, state, batch(0))
    assert {row.kind for row in audit.leaves if row.written} == {"params", "stats", "ema"}
    quiet = sw.audit(sw.step(writes="stats")(lambda model, x: model(x)), state, batch(0))
    assert {row.kind for row in quiet.leaves if row.written} == {"stats"}
    assert sw.lint(model, plan.kinds) == []
