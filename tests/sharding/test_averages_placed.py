"""Averages on a mesh: they lie as what they are of, or as declared; per device where that is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from meshes import ResNet, images, loss_of, mesh_of
from refusals import refused

DATA = mesh_of(data=4)
STANDARD = sw.Kinds.standard()
EACH = STANDARD.replace(stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")))
BOTH = {("params", "stats"): sw.EMA(lambda count: jnp.minimum(0.5, (1 + count) / (4 + count)))}
train = sw.train_step(loss_of)


def batch(number: int) -> tuple[Any, Any]:
    x, labels = images()
    return x + number, labels


def assert_close(one: Any, other: Any) -> None:
    for ours, theirs in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class Plain(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
        self.last = nnx.Linear(8, 4, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.tanh(self.first(x)))


def sharded() -> sw.Kinds:
    return sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))


def plain_plan(kinds: sw.Kinds) -> tuple[Plain, sw.Plan]:
    model = Plain(nnx.Rngs(0))
    return model, kinds.plan(model, optimizers={"params": optax.adam(1e-2)}, averages={"params": sw.EMA(0.5)})


square = sw.train_step(lambda model, x: (model(x) ** 2).mean())


def test_averages_lie_as_what_they_are_of() -> None:
    model, plan = plain_plan(sharded())
    state = plan.take(model, mesh=DATA)
    for _ in range(2):
        split = jax.NamedSharding(DATA, jax.P("data"))
        assert state["ema"]["params"]["first"]["kernel"].sharding == split
        assert state.with_averages("ema")["params"]["first"]["kernel"].sharding == split
        assert state.restart("ema")["ema"]["params"]["first"]["kernel"].sharding == split
        state, _ = square(state, jnp.ones((8, 4)))
    assert plan.abstract(DATA)["ema"]["params"]["first"]["kernel"].sharding == split
    made = plan.init(lambda: Plain(nnx.Rngs(0)), DATA)
    assert made["ema"]["params"]["first"]["kernel"].sharding == split


def test_on_a_mesh_averages_are_those_of_one_device() -> None:
    model, plan = plain_plan(sharded())
    one, many = plan.take(model), plan.take(model, mesh=DATA)
    for number in range(3):
        x = jax.random.normal(jax.random.key(number), (8, 4))
        one, _ = square(one, x)
        many, _ = square(many, x)
    assert_close(many["ema"], one["ema"])
    assert_close(many.with_averages("ema")["params"], one.with_averages("ema")["params"])


def test_averages_may_be_placed_otherwise() -> None:
    model, plan = plain_plan(
        sw.Kinds(params=sw.Kind(nnx.Param), ema=sw.Kind(sw.EMA, placement=sw.Sharded(None, "data")))
    )
    state = plan.take(model, mesh=DATA)
    state, _ = square(state, jnp.ones((8, 4)))
    assert state["ema"]["params"]["first"]["kernel"].sharding.spec == jax.P(None, "data")
    assert state.with_averages("ema")["params"]["first"]["kernel"].sharding.spec == jax.P()


def test_a_leaf_called_as_its_kind_does_not_mislead_them() -> None:
    model = nnx.Dict(kernel=nnx.Param(jnp.ones((4, 4))), params=nnx.Dict(kernel=nnx.Param(jnp.ones((4, 4)))))
    split = {("kernel",): sw.Sharded("data"), ("params", "kernel"): sw.Sharded(None, "data")}
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=lambda path, shape: split[tuple(path)]))
    plan = kinds.plan(model, averages={"params": sw.EMA(0.5)})
    shardings = plan.shardings(DATA)["ema"]["params"]
    assert shardings["kernel"].spec == jax.P("data")
    assert shardings["params"]["kernel"].spec == jax.P(None, "data")


def test_annotated_averages_follow_the_annotation() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones((4, 4)), eager_sharding=False, out_sharding=("rows", None)))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), ema=sw.Kind(sw.EMA, placement=sw.FromMetadata((("rows", "data"),))))
    plan = kinds.plan(model, averages={"params": sw.EMA(0.5)})
    assert plan.shardings(DATA)["ema"]["params"]["w"].spec == jax.P("data")
    assert plan.shardings(DATA)["params"]["w"].spec == jax.P()


def test_memory_counts_averages() -> None:
    _, plan = plain_plan(sharded())
    memory = sw.memory(plan, {"data": 4})
    assert memory["ema"].nbytes == memory["params"].nbytes
    assert memory["ema"].per_device == memory["params"].per_device


# --- per device ------------------------------------------------------------------------------------------------------


def resnet(kinds: sw.Kinds) -> tuple[ResNet, sw.Plan]:
    model = ResNet(nnx.Rngs(0), None)
    return model, kinds.plan(model, optimizers={"params": optax.sgd(0.1)}, averages=BOTH)


def test_averages_of_what_lies_per_device_lie_per_device() -> None:
    model, plan = resnet(EACH)
    state = plan.take(model, mesh=DATA)
    shadows = {kind: jax.tree.map(np.asarray, state[kind]) for kind in ("params", "stats")}
    for number in range(3):
        state, _ = train(state, *batch(number))
        decay = min(0.5, (1 + number) / (4 + number))
        for kind in shadows:
            shadows[kind] = jax.tree.map(
                lambda old, new, decay=decay: decay * old + (1 - decay) * np.asarray(new), shadows[kind], state[kind]
            )
    assert_close(state["ema"]["stats"], shadows["stats"])
    assert_close(state["ema"]["params"], shadows["params"])
    var = state["ema"]["stats"]["norm"]["var"]
    assert var.shape == (4, 8)
    assert var.sharding == jax.NamedSharding(DATA, jax.P("data"))
    assert_close(state.with_averages("ema")["stats"], state["ema"]["stats"])
    made = plan.init(lambda: ResNet(nnx.Rngs(0), None), DATA)
    assert made["ema"]["stats"]["norm"]["var"].shape == (4, 8)


def test_a_fold_folds_averages_with_what_they_are_of() -> None:
    model, plan = resnet(EACH)
    state, _ = train(plan.take(model, mesh=DATA), *batch(0))
    mean = np.asarray(state["ema"]["stats"]["norm"]["mean"]).mean(0)
    for folded in (
        state.reduce_devices("stats"),
        state.reduce_devices("ema"),
        state.reduce_devices("stats", "ema"),
        state.reduce_devices(),
    ):
        np.testing.assert_allclose(folded["ema"]["stats"]["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)
        assert folded.with_averages("ema")["stats"]["norm"]["mean"].shape == (8,)
        assert folded.plan.kinds["stats"].placement == sw.Replicated()
    with refused(
        sw.StructureError,
        "This state has per-device values in stats, ema, but a model holds one value of each leaf; "
        "plan.build would have to choose.",
        leaves=[
            f"{path}: {type_}(8,) float32  kind={kind}"
            for kind, start, type_ in (("stats", "", "BatchStat"), ("ema", "ema/stats/", "Array"))
            for path in (f"{start}{norm}/{stat}" for norm in ("again", "norm") for stat in ("mean", "var"))
        ],
        kind="stats",
        hint="one = state.reduce_devices('stats', 'ema', how='mean')  # or how='first'\none.plan.build(one)",
    ):
        plan.build(state)


def test_averages_of_what_lies_per_device_may_not_be_placed_otherwise() -> None:
    _, plan = resnet(EACH | sw.Kinds(ema=sw.Kind(sw.EMA, placement=sw.Replicated())))
    with pytest.raises(sw.PlacementError) as caught:
        plan.shardings(DATA)
    assert {leaf.note for leaf in caught.value.leaves} == {"an average of a PerDevice leaf, with another placement"}
    assert {leaf.kind for leaf in caught.value.leaves} == {"ema"}
    assert caught.value.hint == "ema=sw.Kind(sw.EMA)  # without a placement, averages are placed like their leaves"


def test_a_transfer_moves_averages_and_fills_parameters_with_them() -> None:
    model, plan = plain_plan(sharded())
    state, _ = square(plan.take(model, mesh=DATA), jnp.ones((8, 4)))
    actor = sw.transfer(state.with_averages("ema"), sw.Kinds(params=sw.Kind(nnx.Param)).plan(model), cast=jnp.bfloat16)
    assert actor["params"]["first"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(actor["params"]["first"]["kernel"], np.float32), state["ema"]["params"]["first"]["kernel"], rtol=1e-2
    )
    twin = sw.transfer(state, plan.take(model), kinds=("params", "ema"))
    assert_close(twin["ema"], state["ema"])


def test_a_transfer_moves_averages_of_what_lies_per_device() -> None:
    model, plan = resnet(EACH)
    state, _ = train(plan.take(model, mesh=DATA), *batch(0))
    twin = sw.transfer(state, plan, mesh=DATA)
    assert_close(twin["ema"], state["ema"])
    spread = sw.transfer(plan.take(model), plan, mesh=DATA)
    assert spread["ema"]["stats"]["norm"]["var"].shape == (4, 8)


def test_a_running_state_gets_averages_by_a_transfer_into_a_plan_that_has_them() -> None:
    model = Plain(nnx.Rngs(0))
    before = sharded().plan(model, optimizers={"params": optax.adam(1e-2)})
    state, _ = square(before.take(model), jnp.ones((8, 4)))
    _, plan = plain_plan(sharded())
    after: Any = sw.transfer(state, plan.take(before.build(state)), kinds=("params", "optimizer"))
    assert_close(after["ema"]["params"], state["params"])
    assert_close(after["optimizer"], state["optimizer"])
    after, _ = square(after, jnp.ones((8, 4)))
    assert after.plan is plan
