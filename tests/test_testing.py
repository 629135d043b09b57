"""The asserts for users' own tests: each passes where it should, and fails by name where it should."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from meshes import mesh_of
from statewise import testing


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.up(x)))


def state_of() -> sw.State:
    return sw.plan(Model(), optimizers={"params": optax.adam(1e-2)}).take(Model())


def loss(model: Model, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def test_a_sound_train_step_is_traced_once_and_leaves_the_state_alone() -> None:
    state, train = state_of(), sw.train_step(loss)
    testing.assert_no_retrace(train, state, jnp.ones((2, 4)))
    train(state, jnp.ones((2, 4)))  # it is not donated


def test_a_step_that_is_traced_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = sw.step(lambda model, x: model.up(x))
    entries = forward._entries
    plain = type(forward).__call__

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        for known in (entries, self._recent, self._only):
            known.clear()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(forward), "__call__", forgetful)
    with pytest.raises(AssertionError, match="was traced again in its second call"):
        testing.assert_no_retrace(forward, state_of(), jnp.ones((2, 4)))


def test_traces_are_counted_and_the_step_is_itself_again_after() -> None:
    train = sw.train_step(loss)
    state = state_of()
    with testing.count_traces(train) as traces:
        state, _ = train(state, jnp.ones((2, 4)))
        assert traces.count == 1
        state, _ = train(state, jnp.ones((2, 4)))
        assert traces.count == 1
        train(state, jnp.ones((3, 4)))
        assert traces.count == 2
    assert train.fn is loss


@pytest.mark.parametrize("layout", ["named", "packed"])
def test_a_state_makes_the_round_trip(layout: str) -> None:
    testing.assert_round_trip(state_of(), layout=layout)


def test_a_round_trip_that_loses_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = testing.restore

    def lossy(path: Any, target: sw.State) -> Any:
        state, report = plain(path, target)
        return jax.tree.map(lambda array: array * 2 if array.dtype == jnp.float32 else array, state), report

    monkeypatch.setattr(testing, "restore", lossy)
    with pytest.raises(AssertionError, match=r"up/kernel +params +value"):
        testing.assert_round_trip(state_of())


def test_what_differs_is_in_the_error() -> None:
    state = state_of()
    testing.assert_same(state, jax.tree.map(jnp.copy, state))
    with pytest.raises(AssertionError, match=r"norm/var +stats +value"):
        testing.assert_same(state, state.replace(stats=jax.tree.map(jnp.zeros_like, state["stats"])))


def test_what_lies_elsewhere_is_in_the_error() -> None:
    mesh = mesh_of(data=8)
    kinds = sw.Kinds.standard()
    split = dataclasses.replace(
        kinds["params"], placement=lambda path, shape: sw.Sharded(*[None] * (len(shape) - 1), "data")
    )
    placed = kinds.replace(params=split).plan(Model()).take(Model(), mesh=mesh)
    whole = kinds.plan(Model()).take(Model(), mesh=mesh)
    testing.assert_same_placement(placed, jax.tree.map(jnp.copy, placed))
    with pytest.raises(AssertionError) as caught:
        testing.assert_same_placement(placed, whole)
    said = str(caught.value)
    assert said.startswith("4 of 8 arrays have another sharding:")
    assert "params/up/kernel: NamedSharding" in said


def test_states_of_other_leaves_do_not_lie_alike() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(AssertionError, match="The states have different leaves"):
        testing.assert_same_placement(state_of(), sw.plan(model).take(model))


def test_a_state_per_device_makes_the_round_trip() -> None:
    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")))
    testing.assert_round_trip(kinds.plan(Model()).take(Model(), mesh=mesh_of(data=4)))
