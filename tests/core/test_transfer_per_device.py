"""Kinds that lie per device, from state to state: as they are, one into many, and many into one by folding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from comparing import data, same
from meshes import mesh_of
from refusals import refused

KINDS = sw.Kinds.standard().replace(
    stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")),
    rng=sw.Kind(nnx.RngState, placement=sw.PerDevice("data")),
)
MESH = mesh_of(data=4)


class Model(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(x))


@sw.train_step
def train(model: Model, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def learner() -> sw.State:
    state = KINDS.plan(Model(), optimizers={"params": optax.sgd(0.1)}).take(Model(), mesh=MESH)
    return train(state, jax.random.normal(jax.random.key(0), (8, 3)))[0]


def test_what_lies_per_device_goes_as_it_is() -> None:
    src, plan = learner(), KINDS.plan(Model())
    found = sw.transfer(src, plan, mesh=MESH)
    assert found.plan is plan.take(Model(), mesh=MESH).plan
    assert found["stats"]["norm"]["mean"].shape == (4, 3)
    assert all(same({"it": found[kind]}, {"it": src[kind]}) for kind in ("params", "stats", "rng"))
    again = sw.transfer(src, found)
    assert same(again, found)
    assert again.plan is found.plan
    assert same(sw.transfer(src, found.plan), found)


def test_into_a_plan_it_stays_on_the_mesh_of_the_source() -> None:
    src, plan = learner(), KINDS.plan(Model())
    found = sw.transfer(src, plan)
    assert found.plan is sw.transfer(src, plan, mesh=MESH).plan
    assert same(found, sw.transfer(src, plan, mesh=MESH))
    forward = sw.step(lambda model, x: model(x), writes=("stats", "rng"))
    assert forward(found, jnp.ones((8, 3)))[1].shape == (8, 3)


def test_one_value_becomes_one_for_each_device() -> None:
    plan = KINDS.plan(Model())
    found, expected = sw.transfer(plan.take(Model()), plan, mesh=MESH), plan.take(Model(), mesh=MESH)
    assert same(found, expected)
    for array, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert array.sharding.is_equivalent_to(other.sharding, array.ndim)
    half = sw.transfer(plan.take(Model()), plan, mesh=MESH, cast="bfloat16")
    assert half["stats"]["norm"]["var"].shape == (4, 3)
    assert half["stats"]["norm"]["var"].dtype == jnp.bfloat16


def test_many_values_become_one_by_folding_alone() -> None:
    src, plan = learner(), sw.plan(Model())
    with refused(
        sw.StructureError,
        "The source does not fit the target: 2 leaves differ.",
        leaves=[
            "norm/mean: BatchStat(3,) float32  kind=stats  (has a value for each of 4 devices in the source)",
            "norm/var: BatchStat(3,) float32  kind=stats  (has a value for each of 4 devices in the source)",
        ],
        kind="stats",
        hint="sw.transfer(src.reduce_devices('stats', how='mean'), ...)  # or how='first'",
    ):
        sw.transfer(src, plan.take(Model()), kinds=("params", "stats"))
    many: Any = data(src["stats"]["norm"]["mean"])
    found = sw.transfer(src.reduce_devices("stats", how="mean"), plan.take(Model()), kinds=("params", "stats"))
    np.testing.assert_allclose(found["stats"]["norm"]["mean"], many.mean(0), rtol=1e-6)


def test_keys_and_counts_have_no_mean_to_become_one_by() -> None:
    src, actor = learner(), sw.plan(Model()).take(Model())
    note = "has a value for each of 4 devices in the source"
    with refused(
        sw.StructureError,
        "The source does not fit the target: 2 leaves differ.",
        leaves=[
            f"drop/rngs/count: RngCount() uint32  kind=rng  ({note})",
            f"drop/rngs/key: RngKey() key<fry>  kind=rng  ({note})",
        ],
        kind="rng",
        hint="sw.transfer(src.reduce_devices('rng', how='first'), ...)",
    ):
        sw.transfer(src, actor, kinds="rng")
    assert same(
        sw.transfer(src.reduce_devices("rng", how="first"), actor, kinds="rng")["rng"],
        src.reduce_devices("rng", how="first")["rng"],
    )


def test_a_target_whose_kept_kinds_lie_per_device_takes_no_other_mesh() -> None:
    src = learner()
    with refused(
        sw.StructureError,
        "The target is a state with per-device values, or would have some on this mesh, so its other kinds cannot "
        "keep their arrays.",
        hint="sw.transfer(src, kinds.plan(model), mesh=mesh)  # all of it, into the plan",
    ):
        sw.transfer(src, KINDS.plan(Model()).take(Model()), kinds="params", mesh=MESH)
