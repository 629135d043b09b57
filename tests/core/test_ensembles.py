"""The plan of an ensemble: what goes into it comes out, and its steps are those of each member alone."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import statewise as sw
from comparing import plannable
from stacked_models import (
    AVERAGES,
    KINDS,
    OPTIMIZERS,
    PLAN,
    X,
    Y,
    close,
    keys,
    loss_of,
    make,
    remember,
    same,
    states_of,
    train,
    trained,
)
from statewise._src.core.plan import Plan, tables_of

# --- laws --------------------------------------------------------------------------------------------------------


AXES = st.lists(st.sampled_from((0, 0, -1, None)), min_size=9, max_size=9)


def drawn(model: Any, pack: bool, axes: list[int | None], members: int) -> tuple[sw.Plan, list[sw.State]]:
    """A plan of an ensemble, its kinds along drawn axes or shared, and a state for each member."""
    plan = sw.plan(model)
    first = plan.take(model, pack=pack)
    along = {kind: axis for kind, axis in zip(plan.kinds, axes, strict=True) if tables_of(plan).specs[kind]}
    if all(axis is None for axis in along.values()):
        along[next(iter(along))] = 0

    def other(number: int) -> sw.State:
        def changed(array: jax.Array) -> jax.Array:
            if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                return jax.random.fold_in(array, number)
            return jnp.asarray((np.asarray(array, float) * (number + 1)).astype(array.dtype))

        own = [kind for kind, axis in along.items() if axis is not None]
        return first.replace(**{kind: jax.tree.map(changed, first[kind]) for kind in own})

    return plan.stacked(members, **along), [other(number) for number in range(members)]


@given(plannable(max_leaves=4), st.booleans(), AXES, st.integers(1, 3))
@settings(max_examples=20)
def test_a_member_of_stacked_states_is_the_state(model: Any, pack: bool, axes: list[int | None], members: int) -> None:
    assume(any(tables_of(sw.plan(model)).specs.values()))  # a Variable may hold None
    plan, states = drawn(model, pack, axes, members)
    ensemble = plan.stack(states)
    assert ensemble.tables.plain is tables_of(plan)
    for number, state in enumerate(states):
        same(ensemble.member(number), state)
        same(ensemble.member(number - members), state)
    plain = plan.stack([Plan.of(state.tables.plain).take(state.plan.build(state)) for state in states])
    same(plan.take(plan.build(ensemble)), plain)
    other = plan.build(plan.stack(states[:1] * members))
    plan.put(ensemble, other)
    same(plan.take(other), plain)


def test_a_member_by_a_traced_number() -> None:
    states = states_of(3)
    ensemble = PLAN.stacked(3).stack(states)
    taken = jax.jit(lambda ensemble, number: ensemble.member(number))
    for number in (0, 2, -1):
        same(taken(ensemble, number), states[number])


# --- a plan like others ------------------------------------------------------------------------------------------


def test_equal_plans_of_ensembles_are_one_object() -> None:
    plan = PLAN.stacked(3, params=1, stats=lambda path, shape: 0 if path[-1] == "mean" else None)
    again = PLAN.stacked(3, stats=lambda path, shape: None if path[-1] == "var" else 0, params=1)
    assert plan is again
    assert hash(plan) == hash(again)
    assert copy.deepcopy(plan) is plan
    assert len({PLAN, PLAN.stacked(3), PLAN.stacked(4), PLAN.stacked(3, rng=None), PLAN.stacked(3, over="x")}) == 5
    assert (PLAN.members, plan.members) == (None, 3)


def test_a_plan_of_an_ensemble_shows_itself() -> None:
    plan = PLAN.stacked(8, stats=None)
    assert repr(plan).startswith("Plan(an ensemble of 8: params=")
    assert str(plan).startswith("plan of an ensemble of 8\n")
    assert repr(plan.abstract()).startswith("State(an ensemble of 8: params: ")
    assert [leaf.shape for leaf in plan["stats"]] == [(4,), (4,)]
    assert str(sw.census(plan)).startswith("census of an ensemble of 8\n")
    assert sw.census(plan).to_dict()["members"] == 8
    assert "members" not in sw.census(PLAN).to_dict()
    assert sw.census(plan)["params"].nbytes == 8 * sw.census(PLAN)["params"].nbytes
    assert sw.report(plan).table().title.startswith("report of Plan: an ensemble of 8, ")


def test_unnamed_kinds_have_the_first_axis_and_what_is_derived_follows() -> None:
    axes = PLAN.stacked(2, params=-1).axes()
    assert set(axes.part("params").arrays) == {-1}
    assert set(axes.part("stats").arrays) == set(axes.part("rng").arrays) == {0}
    assert set(axes.part("ema").arrays) == {-1}
    assert set(axes.part("optimizer").arrays) == {-1}
    shared = PLAN.stacked(2, params=None).axes()
    for kind in ("params", "optimizer", "ema"):
        assert set(shared.part(kind).arrays) == {None}
    heads = PLAN.stacked(2, params=lambda path, shape: 0 if path[0] == "out" else None).axes()
    assert set(heads.part("params").arrays) == {0, None}
    assert set(heads.part("optimizer").arrays) == {0}


# --- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
def test_a_mapped_step_is_the_step_of_each_member(pack: bool, axis: int) -> None:
    alone = states_of(4, pack=pack)
    states = PLAN.stacked(4, params=axis, stats=axis).stack(alone)
    plan = states.plan
    for _ in range(3):
        states, losses = trained(states, X, Y)
        for number in range(4):
            alone[number], loss = train(alone[number], X[number], Y[number])
            close(losses[number], loss)
            close(states.member(number), alone[number])
    assert states.plan is plan


def test_it_is_what_nnx_vmap_does() -> None:
    @nnx.vmap
    def born(key: jax.Array) -> tuple[Any, nnx.Optimizer]:
        model = make(key)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.vmap
    def update(model: Any, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, grads)
        return loss

    model, optimizer = born(keys(4))
    ensemble = PLAN.stacked(4)
    states = ensemble.take(model)
    same(states, ensemble.take(nnx.vmap(make)(keys(4))))
    for _ in range(3):
        theirs = update(model, optimizer, X, Y)
        states, losses = trained(states, X, Y)
        close(losses, theirs)
    built = ensemble.build(states)
    for type_ in (nnx.Param, nnx.BatchStat, nnx.RngState):
        close(
            jax.tree.leaves(nnx.as_pure(nnx.state(built, type_))), jax.tree.leaves(nnx.as_pure(nnx.state(model, type_)))
        )


def test_states_are_made_inside_of_the_map_too() -> None:
    ensemble = PLAN.stacked(4)
    inside = jax.vmap(lambda key: ensemble.take(make(key)), out_axes=ensemble.axes())(keys(4))
    axes = PLAN.axes(params=0, stats=0, rng=0, cache=0, variables=0)
    batch = jax.vmap(lambda key: PLAN.take(make(key)), out_axes=axes)(keys(4))
    close(inside, ensemble.stack(states_of(4)))
    same(ensemble.stack(batch), inside)
    same(ensemble.stack(inside), inside)
    same(PLAN.stack(states_of(4)), ensemble.stack(states_of(4)))


def test_scan_jit_and_donation() -> None:
    ensemble = PLAN.stacked(4)
    axes = ensemble.axes()
    mapped = jax.vmap(train, in_axes=(axes, 0, 0), out_axes=(axes, 0))
    wanted = ensemble.stack(states_of(4))
    for _ in range(3):
        wanted, losses = mapped(wanted, X, Y)
    states, last = jax.lax.scan(lambda states, _: mapped(states, X, Y), ensemble.stack(states_of(4)), length=3)
    close(states, wanted)
    close(last[-1], losses)
    given_away = ensemble.stack(states_of(4))
    jitted = jax.jit(mapped, donate_argnums=0)
    states, _ = jitted(given_away, X, Y)
    for _ in range(2):
        states, _ = jitted(states, X, Y)
    close(states, wanted)
    assert all(array.is_deleted() for array in given_away.part("params").arrays)
    with pytest.raises(sw.StructureError, match="This state was donated"):
        given_away.member(0)


def test_shared_parameters_with_statistics_of_their_own() -> None:
    first = PLAN.take(make(jax.random.key(0)))
    forward = sw.step(lambda model, x: model(x), writes=("stats", "rng"))
    ensemble = PLAN.stacked(4, params=None)
    states = ensemble.stack([first.replace(rng=state["rng"]) for state in states_of(4)])
    axes = ensemble.axes()
    states, out = jax.vmap(forward, in_axes=(axes, 0), out_axes=(axes, 0))(states, X)
    assert states["params"]["dense"]["kernel"].shape == (3, 4)
    assert states["stats"]["norm"]["mean"].shape == (4, 4)
    alone, one = forward(first.replace(rng=states_of(4)[2]["rng"]), X[2])
    close(out[2], one)
    close(states.member(2), alone)


def test_layers_of_an_ensemble_are_scanned() -> None:
    class Block(nnx.Module):
        def __init__(self, key: jax.Array) -> None:
            self.dense = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(key))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + nnx.relu(self.norm(self.dense(x)))

    plan = sw.plan(Block(jax.random.key(0)))
    layers = [plan.take(Block(key)) for key in keys(3)]
    step = sw.step(lambda block, x: block(x), writes="stats")
    after, out = jax.jit(lambda layers, x: sw.scan_layers(step, layers, x))(plan.stack(layers), X[0])
    x = X[0]
    for number, layer in enumerate(layers):
        layer, x = step(layer, x)
        close(after.member(number), layer)
    close(out, x)


def test_audit_tells_what_a_step_does_to_a_member() -> None:
    states = PLAN.stacked(4).stack(states_of(4))
    assert str(sw.audit(train, states, X[0], Y[0])) == str(sw.audit(train, states.member(0), X[0], Y[0]))
    assert sw.audit(loss_of, states, X[0], Y[0]).table().title == "audit of loss_of"


# --- verbs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_verbs_do_to_each_member_what_they_do_to_one(pack: bool) -> None:
    ensemble = PLAN.stacked(4)
    axes = ensemble.stack(states_of(4, pack=pack)).plan.axes()

    def fresh() -> sw.State:
        states, _ = trained(ensemble.stack(states_of(4, pack=pack)), X, Y)
        return jax.vmap(remember, in_axes=(axes, 0), out_axes=(axes, 0))(states, X[:, :2])[0]

    before = [fresh().member(number) for number in range(4)]
    verbs: dict[str, Any] = {
        "using": lambda state: state.with_averages("ema"),
        "cast": lambda state: state.cast(params="bfloat16"),
        "restart": lambda state: state.restart("cache"),
        "averages": lambda state: state.restart("ema"),
        "slots": lambda state: state.restart("cache", where=[1]),
        "replace": lambda state: state.replace(params=jax.tree.map(lambda array: array * 2, state["params"])),
    }
    for name, verb in verbs.items():
        outside = verb(fresh())
        inside = jax.vmap(verb, in_axes=(axes,), out_axes=outside.plan.axes())(fresh())
        assert outside.plan is inside.plan, name
        for number in range(4):
            same(outside.member(number), verb(jax.tree.map(jnp.copy, before[number])))
            same(inside.member(number), outside.member(number))


def test_a_restart_makes_fresh_values_of_each_members_own() -> None:
    def normalised(array: jax.Array) -> jax.Array:
        return array / jnp.abs(array).sum()

    kinds = sw.Kinds(params=sw.Kind(nnx.Param, restart=normalised))
    models = [nnx.Dict(w=nnx.Param(jnp.arange(1.0, 4.0) * number)) for number in (1, 2)]
    plan = kinds.plan(models[0])
    states = plan.stack([plan.take(model) for model in models]).restart("params")
    np.testing.assert_allclose(states["params"]["w"].sum(1), 1.0, rtol=1e-6)


def test_slots_of_each_members_own() -> None:
    kinds = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like, batch_axis=0))
    plan = kinds.plan(nnx.Dict(hits=nnx.Cache(jnp.ones(3))))
    states = plan.stack([plan.take(nnx.Dict(hits=nnx.Cache(jnp.ones(3)))) for _ in range(2)])
    states = states.restart("cache", where=np.array([[True, False, False], [False, False, True]]))
    np.testing.assert_array_equal(states["cache"]["hits"], [[0, 1, 1], [1, 1, 0]])


def test_replace_takes_what_the_ensemble_shows() -> None:
    states = PLAN.stacked(2).stack(states_of(2))
    doubled = states.replace(params=jax.tree.map(lambda array: array * 2, states["params"]))
    same(doubled.member(1)["params"], jax.tree.map(lambda array: array * 2, states.member(1)["params"]))
    with pytest.raises(sw.StructureError, match="does not fit the plan"):
        states.replace(params=states.member(0)["params"])


def test_transfer_between_ensembles() -> None:
    states = PLAN.stacked(3).stack(states_of(3))
    actor = sw.transfer(states, sw.plan(make(keys(1)[0])).stacked(3), cast=jnp.bfloat16)
    assert actor["params"]["out"]["kernel"].dtype == jnp.bfloat16
    same(actor.member(2)["params"], states.member(2).cast(params="bfloat16")["params"])
    one = sw.transfer(states.member(1), PLAN.take(make(keys(1)[0])), kinds="params")
    same(one["params"], states.member(1)["params"])


# --- places ------------------------------------------------------------------------------------------------------


def _split(path: Any, shape: tuple[int, ...]) -> Any:
    return sw.Sharded(*[None] * (len(shape) - 1), "model") if shape and shape[-1] % 2 == 0 else sw.Replicated()


PLACED = KINDS.replace(
    params=sw.Kind(nnx.Param, placement=_split), stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("model"))
)


def test_members_over_a_mesh_axis_and_the_rest_as_the_kinds_say(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((4, 2), ("members", "model"), axis_types=(AxisType.Auto,) * 2)
    plan = PLACED.plan(make(keys(1)[0]), optimizers=OPTIMIZERS, averages=AVERAGES)
    ensemble = plan.stacked(4, over="members")
    alone = [plan.take(make(key), mesh=mesh) for key in keys(4)]
    states = ensemble.stack(alone)
    for made in (
        states,
        ensemble.take(nnx.vmap(make)(keys(4)), mesh=mesh),
        ensemble.init(lambda: nnx.vmap(make)(keys(4)), mesh),
    ):
        assert made.plan is states.plan
        assert tuple(made["params"]["dense"]["kernel"].sharding.spec) == ("members", None, "model")
        assert tuple(made["optimizer"]["params"][0].mu["dense"]["kernel"].sharding.spec) == ("members", None, "model")
        assert tuple(made["ema"]["params"]["dense"]["kernel"].sharding.spec) == ("members", None, "model")
        assert made["stats"]["norm"]["mean"].shape == (4, 2, 4)
        assert tuple(made["stats"]["norm"]["mean"].sharding.spec) == ("members", "model")
        assert tuple(made["rng"]["drop"]["rngs"]["key"].sharding.spec) == ("members",)
    for number, state in enumerate(alone):
        one = states.member(number)
        same(one, state)
        assert one["params"]["dense"]["kernel"].sharding == state["params"]["dense"]["kernel"].sharding
    forward = sw.step(lambda model, x: model(x), writes=("stats", "rng"))
    axes = states.plan.axes()
    mapped = jax.vmap(forward, in_axes=(axes, None), out_axes=(axes, 0))
    after, out = jax.jit(mapped, out_shardings=(states.plan.shardings(mesh), None))(states, X.reshape(20, 3))
    assert tuple(after["stats"]["norm"]["mean"].sharding.spec) == ("members", "model")
    folded = after.reduce_devices("stats")
    for number, state in enumerate(alone):
        state, one = forward(state, X.reshape(20, 3))
        close(out[number], one)
        close(after.member(number), state)
        close(folded.member(number), state.reduce_devices("stats"))
    fits = sw.memory(ensemble, {"members": 4, "model": 2})
    whole = sw.memory(plan, {"members": 4, "model": 2})
    assert fits["params"].per_device == whole["params"].per_device
    assert fits["params"].nbytes == 4 * whole["params"].nbytes


def test_without_a_mesh_axis_each_device_has_all_members(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
    plan = kinds.plan(nnx.Dict(w=nnx.Param(jnp.arange(8.0))))
    states = plan.stacked(3).take(nnx.Dict(w=nnx.Param(jnp.arange(24.0).reshape(3, 8))), mesh=mesh)
    assert tuple(states["params"]["w"].sharding.spec) == (None, "data")
    assert tuple(states.member(1)["params"]["w"].sharding.spec) == ("data",)
