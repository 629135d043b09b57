"""Kinds from one state into another: what arrives, where it lies, what is kept, and what the source keeps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from jax.sharding import AxisType

import statewise as sw
from comparing import plannable, same
from refusals import refused
from strategies import Node


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.embed = nnx.Embed(8, 4, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Cache(jnp.zeros((2, 4)))
        self.out = nnx.Linear(4, 8, param_dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        self.seen[...] += x.sum(1).astype(jnp.float32)
        return self.out(self.drop(self.norm(x) + self.seen[...][:, None]))


TOKENS = jnp.arange(6).reshape(2, 3)
BIG = ("params", "stats", "rng")


def learner() -> sw.State:
    model = Model(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model)
    return train(state, TOKENS)[0]


@sw.train_step(writes="cache")
def train(model: Model, tokens: jax.Array) -> jax.Array:
    return (model(tokens) ** 2).mean()


@sw.step(writes="cache")
def act(model: Model, tokens: jax.Array) -> jax.Array:
    model.eval()
    return model(tokens)


def mesh_of(numbers: slice, **axes: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[numbers]).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def pointers(state: sw.State) -> set[int]:
    words = [
        jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
        for array in jax.tree.leaves(state)
    ]
    return {shard.data.unsafe_buffer_pointer() for array in words for shard in array.addressable_shards if array.size}


# --- what arrives ----------------------------------------------------------------------------------------------------


@given(plannable())
def test_into_the_same_plan_it_is_the_identity(thing: Node) -> None:
    src = sw.plan(thing).take(thing)
    found = sw.transfer(src, src.plan)
    assert found.plan is src.plan
    assert same(found, src)
    assert not pointers(found) & pointers(src)


def test_an_optimizer_stays_behind() -> None:
    src = learner()
    actor = sw.transfer(src, sw.plan(Model(nnx.Rngs(1))))
    assert not jax.tree.leaves(actor["optimizer"])
    assert all(same({"it": actor[kind]}, {"it": src[kind]}) for kind in (*BIG, "cache"))


def test_an_optimizer_goes_along_where_the_target_has_it() -> None:
    src = learner()
    found = sw.transfer(src, src.plan, mesh=mesh_of(slice(8), data=8))
    assert same(found, src)
    assert {len(array.sharding.device_set) for array in jax.tree.leaves(found)} == {8}
    assert np.allclose(train(found, TOKENS)[1], train(src, TOKENS)[1])


def test_the_target_keeps_its_other_kinds() -> None:
    src, plan = learner(), sw.plan(Model(nnx.Rngs(1)))
    target = plan.take(Model(nnx.Rngs(1)))
    found = sw.transfer(src, target, kinds=BIG)
    assert found.part("cache") is target.part("cache")
    assert found["params"]["out"]["kernel"].tolist() == src["params"]["out"]["kernel"].tolist()
    assert not np.array_equal(target["params"]["out"]["kernel"], src["params"]["out"]["kernel"])
    only = sw.transfer(src, target, kinds="stats")
    assert only.part("params") is target.part("params")
    assert same({"it": only["stats"]}, {"it": src["stats"]})


def test_a_source_goes_on_and_so_does_what_came_of_it() -> None:
    """Steps donate what their state holds: neither side may feel the other's."""
    src = learner()
    kept = jax.tree.map(jnp.copy, src)
    actor = sw.transfer(src, sw.plan(Model(nnx.Rngs(1))))
    src, _ = train(src, TOKENS)
    again = sw.transfer(kept, actor.plan)
    actor, out = act(actor, TOKENS)
    again, expected = act(again, TOKENS)
    assert np.array_equal(out, expected)
    actor = sw.transfer(src, actor, kinds=BIG)
    act(actor, TOKENS)
    train(src, TOKENS)


def test_from_several_objects_into_the_one_and_back() -> None:
    model = Model(nnx.Rngs(0))
    several = sw.plan(nnx.Dict(clock=nnx.Variable(jnp.array(0))), model).take(
        nnx.Dict(clock=nnx.Variable(jnp.array(7))), model
    )
    one = sw.plan(Model(nnx.Rngs(1))).take(Model(nnx.Rngs(1)))
    found = sw.transfer(several, one, kinds=("params", "stats", "cache", "rng"))
    assert same(found, sw.plan(model).take(model))
    back = sw.transfer(train(learner(), TOKENS)[0], several, kinds="params")
    assert int(back["variables"][0]["clock"]) == 7
    assert not np.array_equal(back["params"][1]["out"]["kernel"], several["params"][1]["out"]["kernel"])


def test_inside_of_the_callers_jit() -> None:
    src, plan = learner(), sw.plan(Model(nnx.Rngs(1), jnp.bfloat16))
    found = jax.jit(lambda src: sw.transfer(src, plan, cast=True))(src)
    assert same(found, sw.transfer(src, plan, cast=True))


# --- ties ------------------------------------------------------------------------------------------------------------


def tied() -> Node:
    weight = nnx.Param(jnp.arange(3.0))
    return Node(a=weight, b=weight)


def apart() -> Node:
    return Node(a=nnx.Param(jnp.zeros(3)), b=nnx.Param(jnp.ones(3)))


def test_tied_leaves() -> None:
    src = sw.plan(tied()).take(tied())
    assert same(sw.transfer(src, src.plan), src)
    found = sw.transfer(src, sw.plan(apart()))
    assert found["params"]["a"].tolist() == found["params"]["b"].tolist() == [0.0, 1.0, 2.0]
    one, other = (found["params"][name].unsafe_buffer_pointer() for name in "ab")
    assert one != other
    with refused(
        sw.StructureError,
        "The source does not fit the target: 1 leaf differs.",
        leaves=["a: Param(3,) float32  kind=params  (tied here, apart in the source as a and b)"],
        kind="params",
        hint="tie them in the target as they are in the source: assign the same nnx.Variable, or two",
    ):
        sw.transfer(found, src.plan)


def test_a_tied_leaf_is_found_by_its_other_path() -> None:
    src = sw.plan(Node(b=nnx.Param(jnp.ones(3)))).take(Node(b=nnx.Param(jnp.ones(3))))
    assert sw.transfer(src, sw.plan(tied()))["params"]["a"].tolist() == [1.0, 1.0, 1.0]


# --- meshes ----------------------------------------------------------------------------------------------------------


def split(path: Any, shape: tuple[int, ...]) -> Any:
    return sw.Sharded("model") if shape and shape[0] % 4 == 0 else sw.Replicated()


def test_from_mesh_to_mesh_without_the_host() -> None:
    """A learner on four devices, its parameters split over two axes; an actor on the four others, split otherwise."""
    model = Model(nnx.Rngs(0))
    here = sw.Kinds.standard().replace(
        params=sw.Kind(
            nnx.Param, placement=lambda path, shape: sw.Sharded("a") if len(shape) < 2 else sw.Sharded("a", "b")
        )
    )
    there = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=split))
    src = here.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model, mesh=mesh_of(slice(4), a=2, b=2))
    src, _ = train(src, TOKENS)
    plan, mesh = there.plan(model), mesh_of(slice(4, 8), model=4)
    places = plan.shardings(mesh)
    with (
        jax.transfer_guard_device_to_host("disallow_explicit"),
        jax.transfer_guard_host_to_device("disallow_explicit"),
    ):
        found = jax.block_until_ready(sw.transfer(src, plan, mesh=mesh))
    for array, place in zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True):
        assert array.sharding.is_equivalent_to(place, array.ndim)
    expected = jax.device_put({kind: src[kind] for kind in BIG}, jax.devices()[0])
    assert same({kind: found[kind] for kind in BIG}, expected)
    # The next time the actor's own arrays say where.
    src, _ = train(src, TOKENS)
    again = sw.transfer(src, found, kinds=BIG)
    for array, place in zip(jax.tree.leaves(again), jax.tree.leaves(places), strict=True):
        assert array.sharding.is_equivalent_to(place, array.ndim)
    act(again, TOKENS)


def test_what_cannot_be_placed_is_refused() -> None:
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=sw.Sharded("model")))
    model = Model(nnx.Rngs(0))
    with pytest.raises(sw.PlacementError, match=r"cannot be placed on the mesh \(model=3\)"):
        sw.transfer(sw.plan(model).take(model), kinds.plan(model), mesh=mesh_of(slice(3), model=3))


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_another_dtype_wants_to_be_allowed() -> None:
    src, half = learner(), sw.plan(Model(nnx.Rngs(1), jnp.bfloat16))
    with refused(
        sw.StructureError,
        "The source does not fit the target: 3 leaves differ.",
        leaves=[
            "embed/embedding: Param(8, 4) bfloat16  kind=params  (is float32 in the source)",
            "out/bias: Param(8,) bfloat16  kind=params  (is float32 in the source)",
            "out/kernel: Param(4, 8) bfloat16  kind=params  (is float32 in the source)",
        ],
        kind="params",
        hint="sw.transfer(src, target, cast=True)  # or a dtype",
    ):
        sw.transfer(src, half)
    found = sw.transfer(src, half, cast=True)
    assert same(found, sw.transfer(found, half))
    for mine, theirs in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(src["params"]), strict=True):
        assert np.array_equal(mine, theirs.astype(mine.dtype))
    back = sw.transfer(found, sw.plan(Model(nnx.Rngs(1))), cast=True)
    assert back["params"]["out"]["kernel"].dtype == jnp.float32


def test_a_dtype_makes_the_targets_numbers_so() -> None:
    src, plan = learner(), sw.plan(Model(nnx.Rngs(1)))
    found = sw.transfer(src, plan.take(Model(nnx.Rngs(1))), kinds="params", cast="bfloat16")
    assert found.plan is plan.abstract().cast(params="bfloat16").plan
    assert {array.dtype for array in jax.tree.leaves(found["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert {array.dtype for array in jax.tree.leaves(found["stats"])} == {jnp.dtype(jnp.float32)}
    with refused(
        sw.DeclarationError,
        "Kind 'params' cannot be cast to 'int32': it is not a floating-point dtype.",
        kind="params",
        hint="cast(params='bfloat16')",
    ):
        sw.transfer(src, plan, cast="int32")


def test_a_cast_that_shrinks_comes_before_the_way_and_one_that_grows_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (sw.plan(nnx.Dict(a=nnx.Param(jnp.ones(3, dtype)))) for dtype in (jnp.float32, jnp.bfloat16))
    mesh = mesh_of(slice(1, 2), data=1)
    src = wide.take(nnx.Dict(a=nnx.Param(jnp.ones(3))))
    moved = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda array, *rest: moved.append(array.dtype) or put(array, *rest))
    small = sw.transfer(src, narrow, cast=True, mesh=mesh)
    sw.transfer(small, wide, cast=True, mesh=mesh_of(slice(2, 3), data=1))
    assert moved == [jnp.bfloat16, jnp.bfloat16]


def test_floats_become_no_integers() -> None:
    plan = sw.plan(nnx.Dict(a=nnx.Variable(jnp.ones(3, int))))
    src = sw.plan(nnx.Dict(a=nnx.Variable(jnp.ones(3)))).take(nnx.Dict(a=nnx.Variable(jnp.ones(3))))
    with refused(
        sw.StructureError,
        "The source does not fit the target: 1 leaf differs.",
        leaves=["a: Variable(3,) int32  kind=variables  (is float32 in the source, which does not become int32)"],
        kind="variables",
        hint="the models differ: plan the target's model as the source's was made",
    ):
        sw.transfer(src, plan, cast=True)


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_packed_states(of: bool, into: bool) -> None:
    model = nnx.List([nnx.Param(jnp.full(2, float(at))) for at in range(5)])
    plan = sw.plan(model)
    src = plan.take(model, pack=of)
    target = plan.take(nnx.List([nnx.Param(jnp.zeros(2)) for _ in range(5)]), pack=into)
    with (
        jax.transfer_guard_device_to_host("disallow_explicit"),
        jax.transfer_guard_host_to_device("disallow_explicit"),
    ):
        found = jax.block_until_ready([sw.transfer(src, target), sw.transfer(src, target, cast="bfloat16")])
    for state, dtype in zip(found, (jnp.float32, jnp.bfloat16), strict=True):
        assert (len(jax.tree.leaves(state)) == 1) == into
        for at in range(5):
            assert np.array_equal(state["params"][at], jnp.full(2, at, dtype))


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_everything_that_differs_is_listed() -> None:
    src = sw.plan(Node(a=nnx.Param(jnp.ones(2)), b=nnx.Param(jnp.ones(2)), c=nnx.Param((jnp.ones(2), jnp.ones(2)))))
    wanted = Node(
        a=nnx.Param(jnp.ones(3)),
        b=nnx.Variable(jnp.ones(2)),
        c=nnx.Param((jnp.ones(2),)),
        d=nnx.BatchStat(jnp.ones(2)),
    )
    with refused(
        sw.StructureError,
        "The source does not fit the target: 4 leaves differ.",
        leaves=[
            "a: Param(3,) float32  kind=params  (is (2,) in the source)",
            "b: Variable(2,) float32  kind=variables  (is a Param in the source)",
            "c: Param- -  kind=params  (is a value of another structure in the source)",
            "d: BatchStat(2,) float32  kind=stats  (missing from the source)",
        ],
        hint="the models differ: plan the target's model as the source's was made",
    ):
        sw.transfer(src.abstract(), sw.plan(wanted))


def test_a_plan_has_no_values_of_its_own() -> None:
    with refused(
        sw.StructureError,
        "A plan has no values of its own, so there are none for cache.",
        leaves=["seen: Cache(2, 4) float32  kind=cache"],
        kind="cache",
        hint="sw.transfer(src, plan.take(model), kinds=('params', 'stats', 'rng'))  # keeps the state's other kinds",
    ):
        sw.transfer(learner(), sw.plan(Model(nnx.Rngs(0))), kinds=BIG)


def test_a_kind_that_is_not_there() -> None:
    with pytest.raises(sw.DeclarationError, match="There is no kind 'weights'"):
        sw.transfer(learner(), sw.plan(Model(nnx.Rngs(0))), kinds="weights")


def test_a_source_without_values() -> None:
    src = learner()
    plan = sw.plan(Model(nnx.Rngs(0)))
    with refused(
        sw.StructureError,
        "The source is abstract: it has shapes but no values to transfer.",
        kind="params",
        hint="src = plan.take(model)  # or restore into it: src, report = sw.restore(path, src)",
    ):
        sw.transfer(src.plan.abstract(), plan)
    train(src, TOKENS)
    with pytest.raises(sw.StructureError, match="state was donated: train has donated its params, stats, cache, rng"):
        sw.transfer(src, plan)


def test_what_is_no_state_and_no_plan() -> None:
    src = learner()
    with refused(
        sw.StructureError,
        "sw.transfer copies from a state, not Model.",
        hint="sw.transfer(plan.take(model), target)",
    ):
        sw.transfer(Model(nnx.Rngs(0)), src.plan)
    with refused(
        sw.StructureError,
        "sw.transfer copies into a plan or a state, not Model.",
        hint="sw.transfer(src, plan), or sw.transfer(src, plan.take(model), kinds='params')",
    ):
        sw.transfer(src, Model(nnx.Rngs(0)))


def test_a_spent_target_and_an_abstract_one_tell_where() -> None:
    src, plan = learner(), sw.plan(Model(nnx.Rngs(1)))
    mesh = mesh_of(slice(2, 4), data=2)
    target = plan.take(Model(nnx.Rngs(1)), mesh=mesh)
    sw.step(lambda model: model.out.bias.set_value(model.out.bias[...] + 1), writes="params")(target)
    for found in (sw.transfer(src, target, kinds=BIG), sw.transfer(src, plan.abstract(mesh))):
        assert all(array.sharding.device_set == set(jax.devices()[2:4]) for array in jax.tree.leaves(found))
        assert same({"it": found["params"]}, {"it": src["params"]})


def test_one_of_many_has_to_be_taken_out_first() -> None:
    src = learner()
    many = jax.tree.map(lambda array: jnp.stack([array] * 2), src)
    with pytest.raises(sw.StructureError, match="do not have the shapes and dtypes of its plan") as caught:
        sw.transfer(many, sw.plan(Model(nnx.Rngs(1))))
    assert "jax.tree.map(lambda array: array[0], states)" in (caught.value.hint or "")
    assert same(sw.transfer(jax.tree.map(lambda array: array[0], many), src.plan), src)


def test_numpy_arrays_in_a_state_are_as_good() -> None:
    src = sw.plan(tied()).take(tied())
    assert same(sw.transfer(jax.tree.map(np.asarray, src), src.plan), src)
