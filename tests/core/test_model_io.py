"""`take`, `put` and `build`: exact both ways, by path, and everything is looked at before anything is touched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given

import statewise as sw
from comparing import data, leaves, plannable, same, zeros
from refusals import refused
from statewise._src.common.nnx_graph import raw_value
from strategies import Node, OwnStat


def model(fill: float = 1.0) -> Node:
    return Node(
        kernel=nnx.Param(jnp.full((2, 3), fill, jnp.float32)),
        stat=OwnStat(jnp.full(3, fill, jnp.bfloat16)),
        raw=nnx.data(jnp.full(2, int(fill))),
        two=nnx.Variable({"a": jnp.full(1, fill, jnp.float32), "b": jnp.full((), fill, jnp.float32)}),
    )


# --- laws --------------------------------------------------------------------------------------------------------


@given(plannable())
def test_putting_back_what_was_taken_changes_nothing(thing: Node) -> None:
    before = leaves(thing)
    identities = {path: id(leaf) for path, leaf in nnx.to_flat_state(nnx.state(thing))}
    plan = sw.plan(thing)
    plan.put(plan.take(thing), thing)
    assert same(before, leaves(thing))
    for path, leaf in nnx.to_flat_state(nnx.state(thing)):
        assert not isinstance(leaf, nnx.Variable) or id(leaf) == identities[path], "the same Variables, new values"


@given(plannable())
def test_building_gives_the_model_that_was_taken(thing: Node) -> None:
    plan = sw.plan(thing)
    state = plan.take(thing)
    built = plan.build(state)
    assert sw.plan(built) is plan
    planned = {leaf.path for leaf in plan.leaves}
    assert (
        same({path: value for path, value in leaves(thing).items() if path in planned}, leaves(built)) or plan.excluded
    )
    assert same(plan.take(built), state)


@given(plannable())
def test_what_is_put_is_what_is_taken(thing: Node) -> None:
    plan = sw.plan(thing)
    other = zeros(plan.take(thing))
    plan.put(other, thing)
    assert same(plan.take(thing), other)


@given(plannable())
def test_nothing_is_shared_unless_asked_for(thing: Node) -> None:
    plan = sw.plan(thing)
    state = plan.take(thing)
    theirs = {id(array) for array in jax.tree.leaves(leaves(thing))}
    assert theirs.isdisjoint(map(id, jax.tree.leaves(state)))
    assert {id(array) for array in jax.tree.leaves(leaves(plan.build(state)))}.isdisjoint(
        map(id, jax.tree.leaves(state))
    )
    shared = plan.take(thing, copy=False)
    assert len({id(array) for array in jax.tree.leaves(shared)}) == len(jax.tree.leaves(shared))
    assert same(shared, state)


# --- what is kept exactly ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        jnp.ones((2, 0)),
        jnp.ones(()),
        jnp.arange(4, dtype=jnp.bfloat16),
        jnp.arange(4, dtype="int4"),
        jnp.arange(4, dtype="uint4"),
        jnp.arange(4).astype("float8_e4m3fn"),
        jnp.array([1 + 2j]),
        jax.random.key(3),
        jax.random.key(3, impl="rbg"),
        jax.random.split(jax.random.key(3, impl="unsafe_rbg"), 4),
        {"a": jnp.ones(1), "b": (jnp.zeros(2), None)},
        None,
        jnp.array([jnp.nan, -0.0, jnp.inf]),
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_every_kind_of_value_goes_there_and_back(value: Any) -> None:
    thing = Node(a=nnx.Variable(value))
    plan = sw.plan(thing)
    for copy in (True, False):
        state = plan.take(thing, copy=copy)
        for back in (plan.build(state), plan.build(state, copy=False)):
            after = raw_value(back.a)
            assert jax.tree.structure(after) == jax.tree.structure(value)
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(value), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert data(a).tobytes() == data(b).tobytes()
        plan.put(state, thing)
        assert sw.plan(thing) is plan


def test_numbers_and_numpy_arrays_become_arrays_of_the_state_alone() -> None:
    mine = np.ones(3, np.float32)
    thing = Node(a=nnx.Variable(mine), n=nnx.Variable(3), raw=nnx.data(mine))
    plan = sw.plan(thing)
    state = plan.take(thing, copy=False)
    mine[:] = 7
    assert np.array_equal(state["variables"]["a"], [1, 1, 1])
    assert int(state["variables"]["n"]) == 3
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(state))
    plan.put(state, thing)
    assert np.array_equal(thing.a[...], [1, 1, 1])


def test_weak_types_stay_weak() -> None:
    thing = Node(weak=nnx.Variable(jnp.asarray(2.0)), strong=nnx.Variable(jnp.ones(())))
    assert raw_value(thing.weak).weak_type
    state = sw.plan(thing).take(thing)
    assert state["variables"]["weak"].weak_type
    assert not state["variables"]["strong"].weak_type


def test_a_state_mapped_to_numpy_is_put_as_arrays() -> None:
    thing = model()
    plan = sw.plan(thing)
    host = jax.device_get(plan.take(thing))
    plan.put(host, thing)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(leaves(thing)))
    assert same(plan.take(thing), jax.tree.map(jnp.asarray, host))


def test_without_copying_the_model_shares_until_a_step_donates() -> None:
    array = jnp.ones(2)
    thing = Node(a=nnx.Param(array), b=nnx.Param(array), c=nnx.Variable(jnp.zeros(())))
    plan = sw.plan(thing, optimizers={"params": optax.sgd(0.5)})
    state = plan.take(thing, copy=False)
    first, second = (state["params"][name] for name in "ab")
    assert first is array
    assert second is not array, "two leaves that share one array are told apart"
    train = sw.train_step(lambda model: (model.a[...] * model.b[...]).sum())
    state, _ = train(state)
    assert array.is_deleted()
    hint = "plan.put(state, model) gives it the current ones; without copy=False a model keeps its own arrays"
    message = "The model's arrays no longer exist: they were taken with copy=False, and a step has donated them."
    gone = ["a: Param(2,) float32  kind=params", "b: Param(2,) float32  kind=params"]
    with refused(sw.StructureError, message, leaves=gone, hint=hint):
        plan.take(thing)
    plan.put(state, thing)
    assert np.array_equal(thing.a[...], [0.5, 0.5])
    assert same(plan.take(thing)["params"], state["params"])


def test_two_arrays_of_one_memory_are_told_apart() -> None:
    array = jnp.ones(2)
    alias = jax.device_put(array, array.device)
    assert alias is not array
    thing = Node(a=nnx.Param(array), b=nnx.Param(alias), empty=nnx.Param(jnp.ones(0)), void=nnx.Param(jnp.ones(0)))

    @sw.step(writes="params")
    def both(model: Any) -> None:
        model.a[...] += 1
        model.b[...] += 2

    state, _ = both(sw.plan(thing).take(thing, copy=False))
    assert np.array_equal(state["params"]["a"], [2, 2])
    assert np.array_equal(state["params"]["b"], [3, 3])


def test_the_model_stays_usable_beside_its_state() -> None:
    thing = model()
    clone = nnx.clone(thing)
    plan = sw.plan(thing, optimizers={"params": optax.sgd(0.5)})
    state = plan.take(thing)
    state, _ = sw.train_step(lambda model: model.kernel[...].sum())(state)
    assert same(thing, clone)
    built = plan.build(state)
    plan.put(state, thing)
    state, _ = sw.train_step(lambda model: model.kernel[...].sum())(state)
    assert same(thing, built), "what was put or built survives the next step"
    assert not same(thing, clone)


def test_a_concrete_state_fills_an_abstract_model() -> None:
    plan = sw.plan(model())
    hollow = nnx.eval_shape(model)
    plan.put(plan.take(model(3)), hollow)
    assert same(hollow, model(3))
