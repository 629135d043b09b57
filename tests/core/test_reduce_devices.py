"""Folding: the values of all devices into one, by mean, by the first, or by a function."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from meshes import by_key, mesh_of, number
from refusals import refused

MESH = mesh_of(data=4)


class Own(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones(2))
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.half = nnx.BatchStat(jnp.zeros(2, jnp.bfloat16))
        self.count = nnx.Cache(jnp.zeros((), int))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))


EACH = sw.PerDevice("data", resize="mean")
KINDS = sw.Kinds.standard().replace(
    stats=sw.Kind(nnx.BatchStat, placement=EACH),
    cache=sw.Kind(nnx.Cache, placement=EACH),
    rng=sw.Kind(nnx.RngState, placement=EACH),
)
PLAN = KINDS.plan(Own())


def different() -> sw.State:
    """A state with another value on each device."""
    state = PLAN.take(Own(), mesh=MESH)

    @sw.step(writes=("stats", "cache"))
    def step(model: Own) -> Any:
        device = jax.lax.axis_index("data")
        model.mean[...] = jnp.array([1.0, 10.0]) * device
        model.half[...] = jnp.full(2, device, jnp.bfloat16)
        model.count[...] += device

    return step(state)[0]


def test_the_mean_is_that_of_numpy_and_lies_on_every_device() -> None:
    state = different()
    held = np.asarray(state["stats"]["mean"])
    one = state.reduce_devices("stats")
    np.testing.assert_allclose(one["stats"]["mean"], held.mean(axis=0))
    assert one["stats"]["mean"].sharding == jax.NamedSharding(MESH, jax.P())
    assert (one["stats"]["half"].dtype, float(one["stats"]["half"][0])) == (jnp.bfloat16, 1.5)
    assert one.plan.kinds["stats"].placement == sw.Replicated()
    assert one["cache"]["count"].shape == (4,)


def test_the_first_is_the_first_of_anything() -> None:
    state = different()
    one = state.reduce_devices(how="first")
    for key, array in by_key(one).items():
        held = number(by_key(state)[key])
        np.testing.assert_array_equal(number(array), held if key.startswith("params") else held[0])
    assert one.plan is KINDS.replace(**{kind: _replicated(KINDS[kind]) for kind in ("stats", "cache", "rng")}).plan(
        Own()
    )
    model = Own()
    one.plan.put(one, model)
    np.testing.assert_array_equal(model.mean[...], [0, 0])


def _replicated(kind: sw.Kind) -> sw.Kind:
    return sw.Kind(kind.of, placement=sw.Replicated())


def test_a_function_folds_what_has_the_leading_axis() -> None:
    state = different()
    one = state.reduce_devices("cache", how=functools.partial(jnp.max, axis=0))
    assert int(one["cache"]["count"]) == 3
    assert one["stats"]["mean"] is state["stats"]["mean"]
    np.testing.assert_array_equal(one["params"]["weight"], state["params"]["weight"])


@pytest.mark.parametrize("how", ["mean", "first", lambda array: array[0]], ids=["mean", "first", "function"])
def test_a_mesh_of_explicit_axes_folds_too(how: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=EACH))
    one = kinds.plan(Own()).take(Own(), mesh=mesh).reduce_devices("stats", how=how)
    assert one["stats"]["mean"].sharding.is_fully_replicated
    np.testing.assert_array_equal(one["stats"]["mean"], np.zeros(2))


def test_folding_equal_values_is_the_identity() -> None:
    state = PLAN.take(Own(), mesh=MESH)
    alone = PLAN.take(Own())
    for how in ("mean", "first"):
        one = state.reduce_devices("stats", how=how)
        np.testing.assert_array_equal(one["stats"]["mean"], alone["stats"]["mean"])


def test_folding_by_kind_and_all_at_once_are_the_same() -> None:
    state = different()
    together, apart = state.reduce_devices(how="first"), state
    for kind in ("stats", "rng", "cache"):
        apart = apart.reduce_devices(kind, how="first")
    assert together.plan is apart.plan
    for key, array in by_key(together).items():
        np.testing.assert_array_equal(number(array), number(by_key(apart)[key]))


def test_a_folded_state_goes_on_training_on_the_mesh_and_off_it() -> None:
    one = different().reduce_devices(how="first")
    out = sw.step(lambda model, x: x + model.mean[...][None])(one, jnp.ones((8, 2)))
    assert out.shape == (8, 2)
    one.plan.build(one)


def test_a_placement_that_is_a_function_is_folded_leaf_by_leaf() -> None:
    def some(path: Any, shape: Any) -> Any:
        return EACH if path == ("mean",) else sw.Replicated()

    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=some))
    plan = kinds.plan(Own())
    state = plan.take(Own(), mesh=MESH)
    assert (state["stats"]["mean"].shape, state["stats"]["half"].shape) == ((4, 2), (2,))
    one = state.reduce_devices("stats")
    assert (one["stats"]["mean"].shape, one["stats"]["half"].shape) == ((2,), (2,))
    assert one.plan.kinds["stats"].handling() == "placement=some, reduced"
    assert one.plan.take(Own(), mesh=MESH).plan is one.plan


def test_folding_works_while_it_is_traced() -> None:
    state = different()
    one = jax.jit(lambda state: state.reduce_devices("stats")["stats"]["mean"])(state)
    np.testing.assert_allclose(one, state.reduce_devices("stats")["stats"]["mean"])


# --- refused ---------------------------------------------------------------------------------------------------------


def test_whole_numbers_and_keys_have_no_mean() -> None:
    with refused(
        sw.StructureError,
        "Integers, booleans and keys do not have a mean.",
        leaves=[
            "count: Cache() int32  kind=cache  (does not have a mean)",
            "drop/rngs/count: RngCount() uint32  kind=rng  (does not have a mean)",
            "drop/rngs/key: RngKey() key<fry>  kind=rng  (does not have a mean)",
        ],
        hint="state.reduce_devices('cache', 'rng', how='first')",
    ):
        different().reduce_devices("cache", "rng")


def test_a_function_that_keeps_the_axis_is_refused() -> None:
    with refused(
        sw.StructureError,
        "The function in how= changes the shape or dtype of a leaf.",
        leaves=["count: Cache() int32  kind=cache  (would become (4,) int32)"],
        kind="cache",
        hint="a function that removes the leading axis: how=lambda array: array.max(axis=0)",
    ):
        different().reduce_devices("cache", how=lambda array: array)


@pytest.mark.parametrize(
    "kinds, how, message, kind, hint",
    [
        (
            ("params",),
            "mean",
            "Kind 'params' has one value of each leaf: there is nothing to reduce.",
            "params",
            "state.reduce_devices('stats', 'cache', 'rng')",
        ),
        (
            ("stats",),
            "median",
            "how='median' does not say how several values become one.",
            None,
            "how='mean', how='first', or a function of the stacked values: how=lambda array: array.max(axis=0)",
        ),
        (
            ("stat",),
            "mean",
            "There is no kind 'stat'.",
            "stat",
            "one of: params, lora, stats, cache, rng, intermediates, metrics, optimizer, variables",
        ),
    ],
)
def test_what_cannot_be_folded_is_said(kinds: Any, how: Any, message: str, kind: Any, hint: str) -> None:
    with refused(sw.DeclarationError, message, kind=kind, hint=hint):
        PLAN.take(Own(), mesh=MESH).reduce_devices(*kinds, how=how)


def test_a_state_with_one_value_of_everything_has_nothing_to_fold() -> None:
    message = "This state has one value of each leaf: there is nothing to reduce."
    with refused(sw.DeclarationError, message, hint="use it as it is"):
        PLAN.take(Own()).reduce_devices()


def test_an_abstract_state_has_nothing_to_fold() -> None:
    message = "This state is abstract: it has shapes but no values to reduce."
    hint = "state, report = sw.restore(path, state)  # then reduce the restored state"
    with refused(sw.StructureError, message, kind="stats", hint=hint):
        PLAN.abstract(MESH).reduce_devices("stats", how="mean")
