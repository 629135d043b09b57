"""What an ensemble refuses: each with its leaves, and a hint that helps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw
from refusals import refused
from stacked_models import KINDS, PLAN, X, Y, close, keys, make, same, states_of, train, trained

SMALL = sw.plan(nnx.Dict(w=nnx.Param(jnp.ones(2)), n=nnx.Variable(jnp.array(0))))


def small(value: float = 1.0, count: int = 0) -> sw.State:
    return SMALL.take(nnx.Dict(w=nnx.Param(jnp.full(2, value)), n=nnx.Variable(jnp.array(count))))


@functools.cache
def batch() -> sw.State:
    axes = PLAN.axes(params=0, stats=0, rng=0, cache=0, variables=0)
    made: sw.State = jax.vmap(lambda key: PLAN.take(make(key)), out_axes=axes)(keys(3))
    return made


# --- a batch of states, at each door -----------------------------------------------------------------------------

DOORS: dict[str, Callable[[Path, sw.State], Any]] = {
    "save": lambda path, states: sw.save(path / "new", states),
    "restore": lambda path, states: sw.restore(path / "one", states),
    "preview": lambda path, states: sw.preview(path / "one", states),
    "diff": lambda path, states: sw.diff(states, PLAN),
    "census": lambda path, states: sw.census(states),
    "lint": lambda path, states: sw.lint(states),
    "report": lambda path, states: sw.report(states),
    "memory": lambda path, states: sw.memory(states, {"data": 2}),
    "build": lambda path, states: PLAN.build(states),
    "put": lambda path, states: PLAN.put(states, make(keys(1)[0])),
    "transfer from": lambda path, states: sw.transfer(states, PLAN),
    "transfer into": lambda path, states: sw.transfer(states_of(1)[0], states, kinds="params"),
    "checkpointable": lambda path, states: sw.checkpointable(states),
    "Checkpoints": lambda path, states: sw.Checkpoints(path / "run").save(0, states),
    "convert": lambda path, states: sw.convert(path / "one", path / "x.safetensors", to="safetensors", target=states),
    "member": lambda path, states: states.member(0),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_batch_of_states_is_told_the_plan_that_fits_it(tmp_path: Path, door: str) -> None:
    sw.save(tmp_path / "one", states_of(1)[0])
    states = batch()
    with pytest.raises(sw.StructureError) as caught:
        DOORS[door](tmp_path, states)
    assert caught.value.message == "The state's arrays do not have the shapes and dtypes of its plan."
    assert "dense/kernel: Param(3, 4) float32  kind=params  (is (3, 3, 4) in the state)" in map(
        str, caught.value.leaves
    )
    first, *_ = (caught.value.hint or "").splitlines()
    assert first == "all of them as one ensemble: state = plan.stacked(3, optimizer=0).stack(states)"
    scope: dict[str, Any] = {"plan": PLAN, "states": states}
    exec(first.partition(": ")[2], scope)
    close(scope["state"], PLAN.stacked(3).stack(states_of(3)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"params": 0, "variables": 0}, "plan.stacked(5)"),
        ({"params": 1, "variables": None}, "plan.stacked(5, params=1, variables=None)"),
        ({"params": None, "variables": 0}, "plan.stacked(5, params=None)"),
    ],
)
def test_the_hint_has_the_axes_of_the_batch(axes: dict[str, Any], said: str) -> None:
    states = SMALL.stacked(5, **axes).stack([small() for _ in range(5)])
    states = jax.tree.unflatten(jax.tree.structure(small()), jax.tree.leaves(states))
    with pytest.raises(sw.StructureError) as caught:
        sw.census(states)
    assert f"state = {said}.stack(states)\n" in (caught.value.hint or "")


def test_one_member_under_the_plan_of_all() -> None:
    one = jax.tree.map(lambda array: array[0], PLAN.stacked(3).stack(states_of(3)))
    with pytest.raises(sw.StructureError) as caught:
        sw.census(one)
    assert (caught.value.hint or "").startswith("one member of an ensemble: one = ensemble.member(0)")


# --- a step without its map --------------------------------------------------------------------------------------


def test_a_step_on_a_state_of_all_says_how_it_is_mapped() -> None:
    states = PLAN.stacked(4).stack(states_of(4))
    hint = (
        "axes = state.plan.axes()\n"
        "jax.vmap(train, in_axes=(axes, 0, None), out_axes=(axes, 0))(state, x, y)\n"
        "if an argument has an axis of 4, one entry for each member: 0 instead of its None"
    )
    with refused(
        sw.StructureError,
        "loss_of is a step of one model, but this state is an ensemble of 4.",
        hint=hint.replace("(train,", "(loss_of,"),
    ):
        train(states, X, Y[0])
    scope = {"jax": jax, "state": states, "train": train, "x": X, "y": Y[0]}
    lines = hint.splitlines()
    exec(f"{lines[0]}\nafter, losses = {lines[1]}", scope)
    assert scope["losses"].shape == (4,)  # type: ignore[attr-defined]
    forward = sw.step(lambda model, *, x: model.out.bias[...].sum() + x)
    with pytest.raises(sw.StructureError) as caught:
        forward.lower(PLAN.stacked(4).abstract())
    assert "jax.jit(jax.vmap(step, in_axes=(axes,), out_axes=0)).lower(state)" in (caught.value.hint or "")


# --- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, True, 2.5, "8", None])
def test_a_number_of_members_that_is_none(count: Any) -> None:
    shown = repr(count) if count is not None else "'NoneType'"
    with refused(sw.DeclarationError, f"{shown} is not a number of members.", hint="plan.stacked(8)"):
        SMALL.stacked(count)


def test_axes_that_are_none() -> None:
    with refused(sw.DeclarationError, "params='0' is not an axis.", kind="params", hint="plan.stacked(8, params=0)"):
        SMALL.stacked(3, params="0")
    with pytest.raises(sw.DeclarationError, match="There is no kind 'gates'"):
        SMALL.stacked(3, gates=0)
    with pytest.raises(sw.StructureError, match="1 leaf has too few dimensions for the axis") as caught:
        SMALL.stacked(3, params=1, variables=1)
    assert [leaf.path for leaf in caught.value.leaves] == [("n",)]
    with pytest.raises(
        sw.DeclarationError, match="Averages must have the axes of the values that they track"
    ) as refusal:
        PLAN.stacked(3, params=0, ema=None)
    assert refusal.value.hint == "plan.stacked(8, params=0)  # without ema="
    with pytest.raises(sw.DeclarationError, match="over=0 is not the name of a mesh axis"):
        SMALL.stacked(3, over=0)
    with pytest.raises(sw.DeclarationError, match="Nothing in this ensemble has an axis"):
        SMALL.stacked(3, params=None, variables=None)
    with pytest.raises(sw.StructureError, match="This plan is of an ensemble of 3 already"):
        SMALL.stacked(3).stacked(2)
    with pytest.raises(sw.DeclarationError, match="The axes of an ensemble's plan are those it was made with"):
        SMALL.stacked(3).axes(params=None)


def test_members_that_cannot_be_placed(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((4, 2), ("members", "model"), axis_types=(AxisType.Auto,) * 2)
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("model")))
    plan = kinds.plan(nnx.Dict(w=nnx.Param(jnp.ones(2))))
    with refused(
        sw.PlacementError,
        "The members should be split over 'x', but the mesh (members=4, model=2) has no such axis.",
        hint="plan.stacked(4, over='members')  # one of: members, model",
    ):
        plan.stacked(4, over="x").shardings(mesh)
    with refused(
        sw.PlacementError,
        "3 members cannot be split evenly over members=4 of the mesh (members=4, model=2).",
        hint="plan.stacked(3)  # without over=: each device then has all of them\n"
        "or a multiple: plan.stacked(4, over='members')",
    ):
        plan.stacked(3, over="members").shardings(mesh)
    with pytest.raises(sw.PlacementError, match="The members cannot be split over 'model'") as caught:
        plan.stacked(4, over="model").shardings(mesh)
    assert str(caught.value.leaves[0]).endswith("(already split over 'model' within each member)")


# --- stack -------------------------------------------------------------------------------------------------------


def test_states_that_do_not_stack() -> None:
    plan = SMALL.stacked(3)
    with refused(
        sw.StructureError,
        "The plan is of an ensemble of 3, and 2 states are given.",
        hint="plan.stacked(2).stack(states)  # plan: of one model, with the same axes",
    ):
        plan.stack([small(), small()])
    for given, shown in (([], "nothing"), ([small(), 1, small()], "int"), ("abc", "str"), (3, "int")):
        with pytest.raises(sw.StructureError, match=f"plan.stack takes a state for each member, not {shown}"):
            plan.stack(given)
    other = sw.plan(nnx.Dict(w=nnx.Param(jnp.ones(2))))
    with pytest.raises(sw.StructureError, match="State 1 is of another plan"):
        plan.stack([small(), other.take(nnx.Dict(w=nnx.Param(jnp.ones(2)))), small()])
    with pytest.raises(sw.StructureError, match="State 2 is of another plan"):
        plan.stack([small(), small(), plan.stack([small()] * 3)])
    with pytest.raises(sw.StructureError, match="State 1 is abstract"):
        plan.stack([small(), SMALL.abstract(), small()])
    with pytest.raises(sw.StructureError, match="and state 0 differ in packing, or in their per-device values"):
        PLAN.stack([states_of(1)[0], states_of(1, pack=True)[0]])
    donated = states_of(1)[0]
    train(donated, X[0], Y[0])
    with pytest.raises(sw.StructureError, match="This state was donated"):
        PLAN.stack([donated, states_of(1)[0]])
    with pytest.raises(sw.StructureError, match="or a batch of states if the plan is of an ensemble"):
        PLAN.stack(batch())
    with pytest.raises(sw.StructureError, match="The state's arrays do not have the shapes and dtypes of its plan"):
        PLAN.stacked(4).stack(batch())
    assert plan.stack([SMALL.abstract()] * 3)["params"]["w"].shape == plan.abstract()["params"]["w"].shape


def test_what_all_share_is_the_same_in_each() -> None:
    plan = SMALL.stacked(3, variables=None)
    with refused(
        sw.StructureError,
        "All members share the kind 'variables', but it is not the same in each state.",
        leaves=["n: Variable() int32  kind=variables  (differs between state 2 and state 0)"],
        kind="variables",
        hint="give each member its own: plan.stacked(3, variables=0)\n"
        "or make them the same first: state.replace(variables=states[0]['variables'])",
    ):
        plan.stack([small(1.0, 5), small(2.0, 5), small(3.0, 6)])
    states = [small(1.0, 5), small(2.0, 5), small(3.0, 6)]
    states = [state.replace(variables=jax.tree.map(jnp.copy, states[0]["variables"])) for state in states]
    ensemble = plan.stack(states)
    same(ensemble.member(2), states[2])
    # Nothing is shared with what was given: a step on the one would donate the other.
    given = {id(array) for state in states for array in jax.tree.leaves(state)}
    assert not given & {id(array) for array in jax.tree.leaves(ensemble)}
    assert not {id(array) for array in jax.tree.leaves(ensemble.member(0))} & {
        id(array) for array in jax.tree.leaves(ensemble)
    }
    with pytest.raises(sw.StructureError, match="its values in the states cannot be compared"):
        jax.jit(lambda *states: plan.stack(states))(*states)
    nan = sw.plan(nnx.Dict(w=nnx.Param(jnp.ones(2)), s=nnx.BatchStat(jnp.array(np.nan))))
    like = [nan.take(nnx.Dict(w=nnx.Param(jnp.ones(2)), s=nnx.BatchStat(jnp.array(np.nan)))) for _ in range(2)]
    assert np.isnan(nan.stacked(2, stats=None).stack(like)["stats"]["s"])


# --- member ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [3, -4])
def test_a_member_that_is_not_there(index: int) -> None:
    states = SMALL.stacked(3).stack([small()] * 3)
    with refused(
        sw.StructureError,
        f"There is no member {index}: the ensemble has 3.",
        hint="state.member(2)  # the last",
    ):
        states.member(index)


@pytest.mark.parametrize("index", [0.0, True, "0", None, jnp.arange(2), jnp.array(1.0), slice(0, 1)])
def test_an_index_that_is_none(index: Any) -> None:
    states = SMALL.stacked(3).stack([small()] * 3)
    with pytest.raises(sw.StructureError, match="is not the number of a member"):
        states.member(index)


def test_a_member_of_one_model() -> None:
    with pytest.raises(sw.StructureError, match="This state is of one model, not of an ensemble"):
        small().member(0)


def test_objects_of_one_model_are_not_an_ensemble() -> None:
    ensemble = PLAN.stacked(3)
    with pytest.raises(sw.StructureError, match="The model is not what was planned") as caught:
        ensemble.take(make(keys(1)[0]))
    assert "nnx.vmap(make_model)(keys)" in (caught.value.hint or "")
    states = ensemble.stack(states_of(3))
    with pytest.raises(sw.StructureError, match="The model is not what was planned"):
        ensemble.put(states, make(keys(1)[0]))
    with pytest.raises(sw.StructureError, match="This state is of another plan"):
        PLAN.build(states)


def test_slots_of_shared_kinds_are_the_same_for_all() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like, batch_axis=0))
    plan = kinds.plan(nnx.Dict(w=nnx.Param(jnp.ones(2)), hits=nnx.Cache(jnp.ones(3))))
    one = plan.take(nnx.Dict(w=nnx.Param(jnp.ones(2)), hits=nnx.Cache(jnp.ones(3))))
    states = plan.stacked(2, cache=None).stack([one, one])
    with pytest.raises(sw.StructureError, match="and the members share these leaves"):
        states.restart("cache", where=np.ones((2, 3), bool))
    np.testing.assert_array_equal(states.restart("cache", where=[1])["cache"]["hits"], [1, 0, 1])


def test_transfers_between_other_ensembles() -> None:
    states = PLAN.stacked(3).stack(states_of(3))
    plan = sw.plan(make(keys(1)[0]))
    for target, note, hint in (
        (plan, "of an ensemble of 3 in the source", "one of its members: sw.transfer(src.member(0), ...)"),
        (
            plan.stacked(2),
            "of an ensemble of 3 in the source",
            "sw.transfer(plan.stack([src.member(number) for number in (0, 1)]), ...)",
        ),
        (
            plan.stacked(3, params=1),
            "of members along axis 0 in the source",
            "plan.stacked(...) with the axes of the source's plan",
        ),
    ):
        with pytest.raises(sw.StructureError) as caught:
            sw.transfer(states, target)
        assert caught.value.leaves[0].note in (note, "of an ensemble of 3 in the source")
        assert note in {leaf.note for leaf in caught.value.leaves}
        assert hint in (caught.value.hint or "")
    with pytest.raises(sw.StructureError) as caught:
        sw.transfer(states.member(0), plan.stacked(3))
    assert {leaf.note for leaf in caught.value.leaves} == {"of one model in the source"}


def test_square_arrays_along_another_axis_are_not_taken_for_the_same(tmp_path: Path) -> None:
    plan = sw.plan(nnx.Dict(w=nnx.Param(jnp.ones(3))))
    states = plan.stack([plan.take(nnx.Dict(w=nnx.Param(jnp.full(3, float(i))))) for i in range(3)])
    other = plan.stacked(3, params=1)
    with pytest.raises(sw.StructureError, match="The source does not fit the target"):
        sw.transfer(states, other)
    sw.save(tmp_path / "a", states)
    with pytest.raises(sw.RestoreError):
        sw.restore(tmp_path / "a", other.abstract())
    (one,) = sw.diff(tmp_path / "a", other.abstract()).leaves
    assert (one.what, one.why) == (("shape",), "members along axis 0 to 1")


def test_optimizers_stay_those_of_one_member() -> None:
    # What Adafactor keeps of a matrix is told by its shape: that of a member, not of all.
    model = nnx.Dict(w=nnx.Param(jnp.ones((256, 128))))
    plan = sw.plan(model, optimizers={"params": optax.adafactor(1e-2)})
    states = plan.stack([plan.take(model) for _ in range(2)])
    step = sw.train_step(lambda model: (model.w[...] ** 2).mean())
    axes = states.plan.axes()
    after, _ = jax.vmap(step, in_axes=(axes,), out_axes=(axes, 0))(states)
    close(after.member(1), step(plan.take(model))[0])


def test_a_state_of_an_ensemble_in_words() -> None:
    assert KINDS.plan(make(keys(1)[0])).stacked(2).members == 2
    states, losses = trained(PLAN.stacked(4).stack(states_of(4)), X, Y)
    assert losses.shape == (4,)
    assert repr(states).startswith("State(an ensemble of 4: ")
