"""Steps that read a stale kind: what each does as declared, what is not known, and every way to another state."""

from __future__ import annotations

import copy
import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from stale_decoder import (
    CACHE,
    KINDS,
    OPTIMIZERS,
    PLAN,
    Decoder,
    X,
    declared,
    decode,
    decoded,
    evaluate,
    fill,
    forward,
    is_stale,
    moved,
    train,
)
from statewise._src.core import known_arrays
from statewise._src.core.plan import tables_of
from statewise._src.step.step import Step

# --- restart and keep --------------------------------------------------------------------------------------------


def test_a_stale_kind_may_restart_before_it_is_read() -> None:
    state = moved(decoded(declared(stale="restart")))
    np.testing.assert_array_equal(evaluate(state, X), np.zeros(2))
    np.testing.assert_array_equal(state["cache"]["sum"], X)  # a step that returns no state restarts for itself alone
    state, out = decode(state, X)
    np.testing.assert_array_equal(out, 2.0 * X)
    state, out = decode(state, X)
    np.testing.assert_array_equal(out, 4.0 * X)


def test_a_stale_kind_may_be_kept() -> None:
    _, out = decode(moved(decoded(declared(stale="keep"))), X)
    np.testing.assert_array_equal(out, 3.0 * X)


def test_a_kind_that_depends_on_one_that_restarts_is_stale_then() -> None:
    class Two(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.memo = nnx.Intermediate(jnp.zeros(2))
            self.free = nnx.Variable(jnp.zeros(()))

    kinds = KINDS.replace(
        cache=dataclasses.replace(CACHE, stale="restart"), intermediates=sw.Kind(nnx.Intermediate, depends_on="cache")
    )
    state = kinds.plan(Two(), optimizers=OPTIMIZERS).take(Two())
    assert tables_of(state.plan).sources["intermediates"] == ("params", "lora", "cache")
    read = sw.step(lambda two: two.memo[...] + two.sum[...])
    np.testing.assert_array_equal(read(state), np.zeros(2))
    with pytest.raises(sw.StaleError) as raised:
        read(moved(state))
    assert raised.value.message == "<lambda> reads intermediates, which is stale: params has changed since."
    assert raised.value.hint == (
        "state = state.replace(intermediates=...)  # made from the present params\n"
        "or declare it with restart=jnp.zeros_like, and: state = state.restart('intermediates')"
    )


def test_all_stale_kinds_of_a_step_are_one_error() -> None:
    class Two(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.noise = nnx.BatchStat(jnp.zeros(2))

    def drawn(array: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.normal(key, array.shape)

    kinds = KINDS.replace(stats=sw.Kind(nnx.BatchStat, restart=drawn, depends_on="lora"))
    state = kinds.plan(Two()).take(Two())
    read = sw.step(lambda two: two.noise[...] + two.sum[...])
    with pytest.raises(sw.StaleError) as raised:
        read(moved(state, "lora"))
    assert raised.value.message == (
        "<lambda> reads stats, which is stale: lora has changed since; and cache, which is stale: lora has changed "
        "since."
    )
    assert raised.value.kind is None
    assert {leaf.kind for leaf in raised.value.leaves} == {"cache", "stats"}
    assert raised.value.hint == "state = state.restart('stats', 'cache', key=jax.random.key(0))"


# --- what is not known -------------------------------------------------------------------------------------------


def test_inside_a_transform_nothing_is_claimed() -> None:
    state = moved(decoded())
    assert is_stale(state)
    expected = 3.0 * X
    np.testing.assert_array_equal(jax.jit(lambda state: decode(state, X)[1])(state), expected)
    np.testing.assert_array_equal(jax.jit(lambda x: decode(state, x)[1])(X), expected)  # the state closed over
    np.testing.assert_array_equal(jax.vmap(lambda x: decode(state, x)[1])(X[None])[0], expected)
    both = jax.jit(lambda state: decode(moved(state), X))
    both(decoded())
    scanned, _ = jax.lax.scan(lambda state, x: train(state, x), decoded(), X[None])
    assert not is_stale(scanned)
    assert not is_stale(jax.tree.map(lambda array: array, state))
    assert is_stale(state)  # none of it changed what is known of the state itself


def test_without_compilation_it_is_an_error_too() -> None:
    state = moved(decoded())
    with jax.disable_jit():
        assert is_stale(state)
        state, _ = train(state.restart("cache"), X)
        assert is_stale(state)
        state, _ = fill(state, X)
        assert not is_stale(state)


def test_a_step_compiled_ahead_of_time_is_an_error_too() -> None:
    compiled = decode.lower(PLAN.abstract(), X).compile()
    state, _ = compiled(PLAN.take(Decoder()), X)
    with pytest.raises(sw.StaleError, match="decode reads cache"):
        compiled(moved(state), X)


def test_copies_and_pickles_of_a_state_know_what_it_knows() -> None:
    state, fresh = moved(decoded()), decoded()
    for copied in (copy.copy, copy.deepcopy):
        assert is_stale(copied(state))
        assert not is_stale(copied(fresh))


def test_numpy_arrays_in_a_model_are_no_change() -> None:
    with nnx.var_defaults(ref=False):  # reading a reference gives a new array, of which nothing is known
        model = Decoder(np.float32(1.0))
    model.scale.set_value(np.ones((), np.float32))
    assert not is_stale(PLAN.take(model))
    assert not is_stale(PLAN.take(model))
    model.shift[...] = jnp.ones(())
    assert is_stale(PLAN.take(model))


def test_arrays_that_left_a_state_are_forgotten_with_them() -> None:
    gc.collect()
    before = len(known_arrays._facts)
    state = decoded()
    views = [state["cache"], state["params"]]
    PLAN.put(state, model := Decoder())
    assert len(known_arrays._facts) > before
    del views, model, state
    gc.collect()
    assert len(known_arrays._facts) == before


def test_a_cache_kept_aside_is_recognized() -> None:
    old = decoded()
    kept = old["cache"]
    new = moved(old).replace(cache=jax.tree.map(jnp.zeros_like, kept))
    assert not is_stale(new)  # arrays that were never in a state
    assert is_stale(new.replace(cache=kept))
    assert not is_stale(new.replace(cache=kept, params=old["params"]))


# --- other doors -------------------------------------------------------------------------------------------------


def test_a_transfer_carries_over_what_is_known() -> None:
    state = decoded()
    assert not is_stale(sw.transfer(state, PLAN))
    assert is_stale(sw.transfer(moved(state), PLAN))
    into = PLAN.take(Decoder(3.0))
    assert not is_stale(sw.transfer(state, into, kinds="cache"))  # made elsewhere: not known
    assert is_stale(sw.transfer(moved(state), into, kinds="cache"))
    assert not is_stale(sw.transfer(state, into, kinds=("cache", "params", "lora")))


def test_the_members_of_an_ensemble_are_stale_together() -> None:
    fresh, stale = decoded(), moved(decoded())
    assert not is_stale(PLAN.stack([fresh, fresh]).member(0))
    ensemble = PLAN.stack([fresh, stale])
    assert is_stale(ensemble.member(0))
    restarted = ensemble.restart("cache", where=[[True, False], [True, True]])
    assert is_stale(restarted.member(1))
    assert not is_stale(restarted.restart("cache", where=[1]).member(1))


def test_packed_states_and_states_on_meshes() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    for state in (decoded(pack=True), decoded(mesh=mesh)):
        assert not is_stale(state)
        trained, _ = train(state, X)
        assert is_stale(trained)
        assert not is_stale(trained.restart("cache"))


def test_values_per_device_that_become_one_are_a_change() -> None:
    kinds = KINDS.replace(params=dataclasses.replace(KINDS["params"], placement=sw.PerDevice("data")))
    state = kinds.plan(Decoder()).take(Decoder(), mesh=jax.make_mesh((8,), ("data",)))
    reduced = state.reduce_devices("params")
    assert is_stale(reduced)
    assert not is_stale(reduced.restart("cache"))


def test_several_objects() -> None:
    plan = KINDS.plan(policy=Decoder(), value=Decoder())
    state = plan.take(policy=Decoder(), value=Decoder())
    step = sw.step(lambda policy, value, x: policy(x) + value.sum[...], writes="cache")
    state, _ = step(state, X)
    with pytest.raises(sw.StaleError) as raised:
        step(moved(state), X)
    assert [leaf.path for leaf in raised.value.leaves] == [("policy", "sum"), ("value", "sum")]


def test_an_error_in_a_step_changes_nothing() -> None:
    failing: Step[Any, Any] = sw.step(lambda decoder, x: decoder(x) + jnp.zeros(3), writes="cache")
    state = moved(decoded(declared(stale="restart")))
    with pytest.raises(TypeError):
        failing(state, X)
    state, out = decode(state, X)
    np.testing.assert_array_equal(out, 2.0 * X)


def test_a_donated_state_is_that_first() -> None:
    state = moved(decoded())
    state.restart("cache")
    with pytest.raises(sw.StructureError, match="This state was donated"):
        decode(state, X)


def test_an_audit_reports_it() -> None:
    state = decoded()
    assert sw.audit(decode, state, X).error is None
    stale = moved(state)
    error = sw.audit(decode, stale, X).error
    assert isinstance(error, sw.StaleError)
    assert error.message == "decode reads cache, which is stale: params has changed since."
    assert sw.audit(forward, stale, X).error is None
    assert sw.audit(decode, PLAN.abstract(), X).error is None
    assert sw.audit(decode, stale, X).to_dict()["error"] == str(error)


def test_a_plan_without_dependence_pays_nothing() -> None:
    plan = sw.plan(Decoder())
    state, _ = decode(plan.take(Decoder()), X)
    assert all(part.origin is None and part.known_version is None for part in moved(state).parts)
    assert all(entry.staleness is None for entry in decode._entries[tables_of(plan)].values())
