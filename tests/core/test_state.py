"""A state as a pytree and as a mapping: whatever JAX does to a pytree it does to a state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given

import statewise as sw
from comparing import plannable, same
from refusals import refused
from strategies import Node, OwnStat


def model() -> Node:
    return Node(
        layer=nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
        drop=nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
        blocks=nnx.List([OwnStat(jnp.ones((), jnp.bfloat16)), nnx.Cache(jnp.ones((4, 2), jnp.int8))]),
    )


def taken(**options: Any) -> sw.State:
    return sw.plan(model(), **options).take(model())


# --- the pytree --------------------------------------------------------------------------------------------------


@given(plannable())
def test_flattening_and_back_is_the_identity(thing: Node) -> None:
    state = sw.plan(thing).take(thing)
    arrays, structure = jax.tree.flatten(state)
    again = jax.tree.unflatten(structure, arrays)
    assert type(again) is sw.State
    assert again.plan is state.plan
    assert all(one is two for one, two in zip(jax.tree.leaves(again), arrays, strict=True))
    keyed, other = jax.tree_util.tree_flatten_with_path(state)
    assert other == structure
    assert [array for _, array in keyed] == arrays or all(a is b for (_, a), b in zip(keyed, arrays, strict=True))
    assert hash(structure) == hash(jax.tree.structure(sw.plan(thing).abstract()))


@given(plannable())
def test_mapping_keeps_the_plan_and_takes_several_states(thing: Node) -> None:
    state = sw.plan(thing).take(thing)
    pairs = jax.tree.map(lambda one, two: (one, two), state, jax.tree.map(lambda x: x, state))
    one = jax.tree.map(lambda pair: pair[0], pairs, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert one.plan is state.plan
    assert same(one, state)


def test_states_of_different_plans_do_not_map_together() -> None:
    other = sw.plan(Node(a=nnx.Param(jnp.ones(1))))
    with pytest.raises(ValueError, match="pytree structure error"):
        jax.tree.map(lambda one, two: one, taken(), other.take(Node(a=nnx.Param(jnp.ones(1)))))


def test_keys_are_kind_and_path() -> None:
    keyed = jax.tree_util.tree_flatten_with_path(taken(optimizers={"params": optax.sgd(0.1, momentum=0.9)}))[0]
    assert [jax.tree_util.keystr(keys) for keys, _ in keyed] == [
        "['params/layer/bias']",
        "['params/layer/kernel']",
        "['params/norm/bias']",
        "['params/norm/scale']",
        "['stats/norm/mean']",
        "['stats/norm/var']",
        "['cache/blocks/1']",
        "['rng/drop/rngs/count']",
        "['rng/drop/rngs/key']",
        "['optimizer/params/0/trace/layer/bias']",
        "['optimizer/params/0/trace/layer/kernel']",
        "['optimizer/params/0/trace/norm/bias']",
        "['optimizer/params/0/trace/norm/scale']",
        "['variables/blocks/0']",
    ]


def test_jax_takes_a_state_as_it_is() -> None:
    state = taken()
    device = jax.devices()[3]
    moved = jax.device_put(state, device)
    assert {array.device for array in jax.tree.leaves(moved)} == {device}
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(spread))
    assert len(spread["params"]["layer"]["kernel"].devices()) == 8
    shapes = jax.eval_shape(lambda state: state.replace(stats=state["stats"]), state)
    assert type(shapes) is sw.State
    assert jax.tree.leaves(shapes) == jax.tree.leaves(state.plan.abstract())
    out = jax.jit(lambda state: jax.tree.map(lambda array: array, state))(state)
    assert out.plan is state.plan
    carried, _ = jax.lax.scan(lambda state, _: (state, None), state, None, length=2)
    chosen = jax.lax.cond(True, lambda state: state, lambda state: state, state)
    stacked = jax.tree.map(lambda array: jnp.stack([array, array]), state)
    mapped = jax.vmap(lambda state: state)(stacked)
    for other in (moved, spread, out, carried, chosen, jax.tree.map(lambda array: array[1], mapped)):
        assert same(state, other)
    assert jax.block_until_ready(state) is state
    assert jax.device_get(state).plan is state.plan


def test_deep_copies_hold_arrays_of_their_own() -> None:
    state = taken()
    other = copy.deepcopy(state)
    assert other.plan is state.plan
    assert same(other, state)
    assert {id(array) for array in jax.tree.leaves(other)}.isdisjoint(map(id, jax.tree.leaves(state)))


def test_orbax_keeps_a_state_as_it_is(tmp_path: Path) -> None:
    thing = Node(a=nnx.Param(jnp.arange(3.0)), b=nnx.data({3: nnx.BatchStat(jnp.ones((2, 2), jnp.bfloat16))}))
    plan = sw.plan(thing, optimizers={"params": optax.adam(0.1)})
    state = plan.take(thing)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", plan.abstract())
    assert type(restored) is sw.State
    assert restored.plan is plan
    assert same(restored, state)


# --- the mapping -------------------------------------------------------------------------------------------------


def test_a_state_is_made_by_a_plan() -> None:
    with refused(sw.StructureError, "A state is made by a plan.", hint="state = plan.take(model)"):
        sw.State()


def test_a_state_maps_kinds_to_their_parts() -> None:
    state = taken()
    assert list(state) == list(state.keys()) == list(state.plan.kinds)
    assert len(state) == len(state.plan.kinds)
    assert "cache" in state
    assert "nobody" not in state
    assert (
        repr(state) == "State(params: 4 arrays, stats: 2 arrays, cache: 1 arrays, rng: 2 arrays, variables: 1 arrays)"
    )
    assert nnx.to_pure_dict(state["cache"]).keys() == {"blocks"}
    assert state["cache"]["blocks"][1].shape == (4, 2)
    assert state["params"]["layer"]["kernel"] is state["params"]["layer"]["kernel"]
    assert state["lora"] == nnx.State({})
    assert jax.tree.leaves(state["lora"]) == []


def test_a_spent_kind_is_seen() -> None:
    state = taken()
    sw.step(writes="stats")(lambda model, x: model.norm(x))(state, jnp.ones((2, 3)))
    assert "stats: 2 arrays (donated)" in repr(state)
    assert "params: 4 arrays," in repr(state)


# --- replace -----------------------------------------------------------------------------------------------------


@given(plannable())
def test_replacing_a_part_by_itself_changes_nothing(thing: Node) -> None:
    state = sw.plan(thing).take(thing)
    for kind in state:
        assert same(state.replace(**{kind: state[kind]}), state)
    assert same(state.replace(**{kind: state[kind] for kind in state}), state)
    assert same(state.replace(), state)


@given(plannable())
def test_a_model_s_own_state_is_as_good_as_a_part(thing: Node) -> None:
    state = sw.plan(thing).take(thing)
    plan = state.plan
    paths = {kind: {leaf.path for leaf in plan[kind]} for kind in plan}
    for kind in plan:
        live = nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(nnx.state(thing)) if tuple(p) in paths[kind]])
        if len(nnx.to_flat_state(live)) == len(plan[kind]):
            assert same(state.replace(**{kind: live}), state)


def test_one_set_of_weights_serves_several_caches() -> None:
    first = taken()
    second = first.replace(cache=jax.tree.map(jnp.zeros_like, first["cache"]))
    assert second.part("params") is first.part("params")
    assert not second["cache"]["blocks"][1].any()
    assert first["cache"]["blocks"][1].all()

    @sw.step(writes="cache")
    def bump(model: Any) -> Any:
        model.blocks[1][...] += 1
        return model.layer.kernel[...].sum()

    for _ in range(2):
        first, one = bump(first)
        second, two = bump(second)
        assert float(one) == float(two)
    assert int(first["cache"]["blocks"][1][0, 0]) == 3
    assert int(second["cache"]["blocks"][1][0, 0]) == 2


def test_plain_dicts_numbers_and_numpy_arrays_are_taken() -> None:
    thing = Node(a=nnx.Variable(jnp.zeros(2)), deep=Node(n=nnx.Variable(jnp.array(1))))
    state = sw.plan(thing).take(thing)
    mine = np.ones(2, np.float32)
    after = state.replace(variables={"a": mine, "deep": {"n": 7}})
    mine[:] = 5
    assert np.array_equal(after["variables"]["a"], [1, 1])
    assert after["variables"]["deep"]["n"].dtype == jnp.int32
    assert int(after["variables"]["deep"]["n"]) == 7
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), state["variables"])
    assert isinstance(state.replace(variables=shapes)["variables"]["a"], jax.ShapeDtypeStruct)


def test_every_misfit_is_listed() -> None:
    state = taken()
    part = nnx.to_pure_dict(state["params"])
    part["layer"]["kernel"] = jnp.ones((9, 9))
    part["layer"]["bias"] = "text"
    part["norm"]["bias"] = jnp.ones(3, jnp.bfloat16)
    del part["norm"]["scale"]
    part["extra"] = {"w": jnp.ones(1)}
    before = jax.tree.leaves(state)
    with refused(
        sw.StructureError,
        "The replacement of kind 'params' does not fit the plan.",
        kind="params",
        leaves=[
            "layer/bias: Param(3,) float32  kind=params  (is a str in the replacement)",
            "layer/kernel: Param(2, 3) float32  kind=params  (is (9, 9) in the replacement)",
            "norm/bias: Param(3,) float32  kind=params  (is bfloat16 in the replacement)",
            "norm/scale: Param(3,) float32  kind=params  (missing from the replacement)",
            "extra/w: Array(1,) float32  kind=params  (not in the plan)",
        ],
        hint="jax.tree.map(function, state['params']) keeps the structure",
    ):
        state.replace(params=part)
    assert all(one is two for one, two in zip(before, jax.tree.leaves(state), strict=True))


def test_a_part_that_was_donated() -> None:
    first, second = taken(), taken()
    part = first["stats"]
    sw.step(writes="stats")(lambda model, x: model.norm(x))(first, jnp.ones((2, 3)))
    with refused(
        sw.StructureError,
        "The replacement of kind 'stats' does not fit the plan.",
        kind="stats",
        leaves=[
            "norm/mean: BatchStat(3,) float32  kind=stats  (donated by an earlier step)",
            "norm/var: BatchStat(3,) float32  kind=stats  (donated by an earlier step)",
        ],
        hint="jax.tree.map(function, state['stats']) keeps the structure",
    ):
        second.replace(stats=part)


def test_one_array_in_two_leaves() -> None:
    state = taken()
    bias = state["params"]["layer"]["bias"]
    part = nnx.to_pure_dict(state["params"])
    part["norm"]["bias"] = bias
    hint = "give one of them a copy: jax.tree.map(jnp.copy, part)"
    with refused(
        sw.StructureError,
        "layer/bias and norm/bias share one array, so a step could not write them separately.",
        kind="params",
        leaves=["layer/bias: Param(3,) float32  kind=params", "norm/bias: Param(3,) float32  kind=params"],
        hint=hint,
    ):
        state.replace(params=part)
    with refused(
        sw.StructureError,
        "layer/bias and norm/mean share one array, so a step could not write them separately.",
        kind="stats",
        leaves=["layer/bias: Param(3,) float32  kind=params", "norm/mean: BatchStat(3,) float32  kind=stats"],
        hint=hint,
    ):
        state.replace(stats={"norm": {"mean": bias, "var": jnp.ones(3)}})


# --- cast --------------------------------------------------------------------------------------------------------


def test_a_cast_state_is_of_a_plan_of_its_own() -> None:
    state = taken(optimizers={"params": optax.adam(0.1)})
    half = state.cast(params="bfloat16", stats=jnp.float16)
    assert half.plan is not state.plan
    assert {leaf.dtype for leaf in half.plan["params"]} == {jnp.dtype("bfloat16")}
    assert {array.dtype for array in jax.tree.leaves(half["stats"])} == {jnp.dtype("float16")}
    assert half.part("rng") is state.part("rng")
    assert half["optimizer"]["params"][0].mu["layer"]["kernel"].dtype == jnp.float32
    assert half.cast(params="float32", stats="float32").plan is state.plan
    assert half.plan is state.cast(params="bfloat16", stats="float16").plan
    assert half.plan.build(half).layer.kernel[...].dtype == jnp.bfloat16
    assert same(state, taken(optimizers=dict.fromkeys(["params"], state.plan.optimizers[("params",)])))


def test_what_is_no_float_stays_as_it_is() -> None:
    thing = Node(
        a=nnx.Variable(jnp.ones(2)),
        b=nnx.Variable(jnp.arange(2)),
        c=nnx.Variable(jnp.array(True)),
        d=nnx.Variable(jax.random.key(0)),
        e=nnx.Variable(jnp.array(1 + 2j)),
        f=nnx.Variable(jnp.ones(2, "float8_e4m3fn")),
    )
    state = sw.plan(thing).take(thing).cast(variables="float16")
    dtypes = [str(leaf.dtype) for leaf in state.plan["variables"]]
    assert dtypes == ["float16", "int32", "bool", "key<fry>", "complex64", "float16"]
    assert dtypes == [str(array.dtype) for array in jax.tree.leaves(state)]


def test_moments_can_be_cast_and_train_on() -> None:
    state = taken(optimizers={"params": optax.sgd(0.5, momentum=0.9)}).cast(optimizer="bfloat16")
    assert {str(leaf.dtype) for leaf in state.plan["optimizer"]} == {"bfloat16"}
    assert {str(array.dtype) for array in jax.tree.leaves(state["optimizer"])} == {"bfloat16"}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("int32", "'int32'"),
        (jnp.int8, None),
        (bool, "<class 'bool'>"),
        ("complex64", "'complex64'"),
        ("fnord", "'fnord'"),
        (None, "None"),
        (3, "a int"),
    ],
)
def test_a_cast_to_what_is_no_float(given: Any, shown: str | None) -> None:
    state = taken()
    with refused(
        sw.DeclarationError,
        f"Kind 'params' cannot be cast to {shown or repr(given)}: it is not a floating-point dtype.",
        kind="params",
        hint="cast(params='bfloat16')",
    ):
        state.cast(params=given)
    assert same(state, taken())


def test_a_cast_to_what_this_process_does_not_have() -> None:
    with refused(
        sw.DeclarationError,
        "Kind 'params' cannot be cast to float64: this process has no 64-bit numbers.",
        kind="params",
        hint="jax.config.update('jax_enable_x64', True)  # before any array is made",
    ):
        taken().cast(params="float64")


def test_a_cast_of_what_is_donated() -> None:
    state = taken()
    sw.step(writes="stats")(lambda model, x: model.norm(x))(state, jnp.ones((2, 3)))
    with pytest.raises(sw.StructureError, match=r"^This state was donated: <lambda> has donated its stats\."):
        state.cast(stats="bfloat16")
    state.cast(params="bfloat16")


def test_an_abstract_state_is_cast_like_any_other() -> None:
    plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    half = plan.abstract().cast(params="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half["params"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(half["stats"])} == {jnp.dtype("float32")}
    assert half.plan is plan.take(nnx.BatchNorm(3, rngs=nnx.Rngs(0))).cast(params="bfloat16").plan


def test_the_parts_of_a_donated_state_cannot_be_read() -> None:
    model = nnx.Dict(hits=nnx.Cache(jnp.ones(3)), w=nnx.Param(jnp.ones(2)))
    state = sw.plan(model).take(model)
    state.restart("cache")
    assert state["params"]["w"].shape == (2,)
    with pytest.raises(sw.StructureError) as caught:
        state["cache"]
    assert caught.value.message == "This state was donated: restart('cache') has donated its cache."
