"""Averages read: `state.with_averages`, on one device, packed, under transforms; and begun again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from averaged import Net, batch, close, planned, train, warmup
from refusals import refused


@pytest.mark.parametrize("pack", [False, True])
def test_using_evaluates_the_averages_and_leaves_the_state_whole(pack: bool) -> None:
    model, plan = planned({("params", "stats"): sw.EMA(0.5)})
    state, _ = train(plan.take(model, pack=pack), batch(0))
    average = state.with_averages("ema")
    assert average.plan is state.plan
    evaluate = sw.step(lambda model, x: (model.eval(), model(x))[1])
    expected = plan.build(plan.take(model).replace(**{kind: state["ema"][kind] for kind in ("params", "stats")}))
    expected.eval()
    close(evaluate(average, batch(1)), expected(batch(1)))
    state, _ = train(state, batch(1))  # donates its parameters and averages: the other's are its own
    close(evaluate(average, batch(1)), expected(batch(1)))


def test_training_on_averages_starts_from_them_and_spends_what_is_shared() -> None:
    model, plan = planned({"params": sw.EMA(0.5)}, {"params": optax.sgd(0.1, momentum=0.9)})
    state, _ = train(plan.take(model), batch(0))
    after, _ = train(state.with_averages("ema"), batch(1))
    assert after["params"]["last"]["bias"].shape == (2,)
    assert state["params"]["last"]["bias"].shape == (2,)
    with refused(
        sw.StructureError,
        "This state was donated: loss_of has donated its stats, optimizer, ema.",
        kind="stats",
        hint="use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)",
    ):
        train(state, batch(1))


def test_using_works_under_jit_and_on_shapes() -> None:
    model, plan = planned({"params": sw.EMA(0.5)})
    state, _ = train(plan.take(model), batch(0))
    close(jax.jit(lambda state: state.with_averages("ema"))(state)["params"], state.with_averages("ema")["params"])
    assert jax.eval_shape(lambda state: state.with_averages("ema"), state).plan is plan
    assert plan.abstract().with_averages("ema")["params"]["last"]["bias"] == jax.ShapeDtypeStruct((2,), jnp.float32)


def test_using_an_ensemble_replaces_each_one() -> None:
    _, plan = planned({"params": sw.EMA(warmup)})
    axes = plan.axes(params=0, stats=0)
    assert axes["ema"]["params"]["last"]["bias"] == 0
    assert axes["ema"]["_counts"]["params"] is None
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.vmap(lambda key: plan.take(Net(nnx.Rngs(key))), out_axes=axes)(keys)
    states, _ = jax.vmap(train, in_axes=(axes, None), out_axes=(axes, 0))(states, batch(0))
    for number, key in enumerate(keys):
        one, _ = train(plan.take(Net(nnx.Rngs(key))), batch(0))
        mine = jax.tree.map(lambda array, number=number: array[number], states.with_averages("ema")["params"])
        close(mine, one.with_averages("ema")["params"])


def test_only_some_replicas_of_a_kind_are_mapped_with_their_averages() -> None:
    _, plan = planned({"params": sw.EMA(0.5)})
    axes = plan.axes(params=lambda path, shape: 0 if path[0] == "last" else None)
    assert axes["ema"]["params"]["last"]["kernel"] == 0
    assert axes["ema"]["params"]["first"]["kernel"] is None
    assert plan.axes(ema=lambda path, shape: 0 if path[2] == "last" else None)["ema"]["params"]["last"]["bias"] == 0


def test_a_restart_begins_averages_again() -> None:
    model, plan = planned({"params": sw.EMA(warmup)})
    state, _ = train(plan.take(model), batch(0))
    state = state.restart("ema")
    close(state["ema"]["params"], state["params"])
    assert state["ema"]["_counts"]["params"] == 0
    state, _ = train(state, batch(1))


def test_an_unknown_average_is_refused_with_the_known_ones() -> None:
    model, plan = planned({"params": [sw.EMA(0.5), sw.EMA(0.9, name="slow")]})
    with refused(sw.DeclarationError, "There are no averages 'fast'.", kind="fast", hint="one of: ema, slow"):
        plan.take(model).with_averages("fast")
    model, plan = planned(None)
    with refused(
        sw.DeclarationError,
        "There are no averages 'ema'.",
        kind="ema",
        hint="kinds.plan(model, ..., averages={'params': sw.EMA(0.999, name='ema')})",
    ):
        plan.take(model).with_averages("ema")
