"""What a step on each device is given and gives back, how often it is compiled, and everything that it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from meshes import assert_close, by_key, compilations, mesh_of
from refusals import refused

MESH = mesh_of(data=4)
BOTH = mesh_of(data=4, model=2)


class Net(nnx.Module):
    """A layer, and the sum of all that each device has seen."""

    def __init__(self) -> None:
        self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.seen = nnx.BatchStat(jnp.zeros(()))
        self.calls = nnx.Variable(jnp.zeros((), int))
        self.total = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        self.seen[...] += x.sum()
        return self.dense(x)


KINDS = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")))
PLAN = KINDS.plan(Net(), optimizers={"params": optax.sgd(0.1)})
X = jnp.arange(24.0).reshape(8, 3)


def fresh(mesh: Any = MESH, **options: Any) -> sw.State:
    return PLAN.take(Net(), mesh=mesh, **options)


def on_mesh(array: Any, *axes: Any, mesh: Any = MESH) -> Any:
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*axes)))


@sw.train_step
def train(model: Net, x: Any) -> Any:
    return (model(x) ** 2).mean()


shape_of = sw.step(lambda model, x: jnp.array(x.shape))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, shape",
    [
        (np.ones((8, 3)), (2, 3)),
        (jnp.ones((8, 3)), (2, 3)),
        (on_mesh(jnp.ones((8, 4)), "data"), (2, 4)),
        (on_mesh(jnp.ones((8, 4)), None, "data"), (8, 1)),
        (on_mesh(jnp.ones((8, 4))), (8, 4)),
        (on_mesh(jnp.ones((8, 4)), "model", mesh=BOTH), (8, 4)),
        (on_mesh(jnp.ones((8, 4)), ("data", "model"), mesh=BOTH), (2, 4)),
    ],
)
def test_an_array_is_split_along_its_first_axis_or_as_it_lies_on_the_mesh(x: Any, shape: Any) -> None:
    state = fresh(x.sharding.mesh if isinstance(getattr(x, "sharding", None), jax.NamedSharding) else MESH)
    np.testing.assert_array_equal(shape_of(state, x), shape)


def test_where_an_array_lies_is_part_of_the_signature() -> None:
    state, x = fresh(), jnp.ones((8, 4))
    whole, split = on_mesh(x), on_mesh(x, "data")
    for _ in range(2):
        assert [int(shape_of(state, one)[0]) for one in (whole, split, x, whole)] == [8, 2, 2, 8]
    with compilations() as compiled:
        shape_of(state, whole), shape_of(state, split)
    assert compiled == []


def test_numbers_static_arguments_and_arguments_by_name_go_to_every_device() -> None:
    step = sw.step(
        lambda model, x, by, power, *, bias: x.sum() * by**power + bias["bias"].sum(), static_argnames="power"
    )
    out = step(fresh(), X, 2, power=2, bias={"bias": jnp.arange(4.0)})
    np.testing.assert_allclose(out, X.reshape(4, 6).sum(axis=1) * 4 + jnp.arange(4.0))


def test_a_donated_argument_is_split_and_given() -> None:
    step = sw.step(lambda model, x: x + model.seen[...], donate_argnames="x")
    x = on_mesh(jnp.ones((8, 3)), "data")
    np.testing.assert_array_equal(step(fresh(), x), np.ones((8, 3)))
    assert x.is_deleted()


def test_an_array_that_does_not_divide_is_named() -> None:
    step = sw.step(lambda model, x, batch: None)
    with refused(
        sw.PlacementError,
        "<lambda> runs on 4 devices along 'data', and cannot split among them "
        "x: axis 0 of (6, 3); batch['mask']: axis 0 of (7,).",
        hint="make the axis a multiple of 4\n"
        "or replicate the array: jax.device_put(x, jax.NamedSharding(mesh, jax.P()))",
    ):
        step(fresh(), jnp.ones((6, 3)), {"mask": jnp.ones(7), "number": 3, "good": jnp.ones(4)})


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs_that_differ_are_joined_or_stacked_and_others_come_as_they_are() -> None:
    @sw.step
    def step(model: Net, x: Any) -> Any:
        mean = jax.lax.pmean(x.mean(axis=0), "data")
        return {
            "rows": x * 2,
            "sums": x.sum(),
            "mean": mean,
            "kernel": model.dense.kernel[...],
            "device": jax.lax.axis_index("data"),
            "one": 1,
        }

    out = step(fresh(), X)
    np.testing.assert_array_equal(out["rows"], X * 2)
    np.testing.assert_array_equal(out["sums"], X.reshape(4, 6).sum(axis=1))
    np.testing.assert_allclose(out["mean"], X.mean(axis=0))
    assert out["kernel"].shape == (3, 2)
    np.testing.assert_array_equal(out["device"], range(4))
    assert int(out["one"]) == 1
    assert out["rows"].sharding.spec == jax.P("data")
    assert out["mean"].sharding.spec == jax.P()


def test_the_loss_is_averaged_and_aux_is_not() -> None:
    step = sw.train_step(lambda model, x: ((model(x) ** 2).mean(), {"max": x.max(), "out": x}), has_aux=True)
    state, (loss, aux) = step(fresh(), X)
    expected, (loss_of_one, _) = step(fresh(None), X)
    np.testing.assert_allclose(loss, loss_of_one, rtol=1e-6)
    np.testing.assert_array_equal(aux["max"], [5, 11, 17, 23])
    np.testing.assert_array_equal(aux["out"], X)
    np.testing.assert_allclose(state["params"]["dense"]["kernel"], expected["params"]["dense"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(state["stats"]["seen"], X.reshape(4, 6).sum(axis=1))


def test_what_is_sown_is_joined_too() -> None:
    def body(model: Net, x: Any) -> Any:
        model.sow(nnx.Intermediate, "rows", x)
        return model(x).sum()

    _, captured = sw.step(body, writes="stats", capture="intermediates")(fresh(), X)[1]
    np.testing.assert_array_equal(jax.tree.leaves(captured)[0], X)


# --- compiled once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_the_second_step_traces_and_compiles_nothing(pack: bool) -> None:
    traces: list[None] = []

    def body(model: Net, x: Any) -> Any:
        traces.append(None)
        return (model(x) ** 2).mean()

    step = sw.train_step(body)
    state, _ = step(fresh(pack=pack), X)
    with compilations() as compiled:
        for _ in range(2):
            state, _ = step(state, X)
    assert (len(traces), compiled) == (1, [])


def test_a_scan_a_jit_and_a_step_ahead_of_time_do_the_same() -> None:
    xs = jnp.stack([X, X * 0.5, X + 1]) / 10
    state, losses = fresh(), []
    for x in xs:
        state, loss = train(state, x)
        losses.append(loss)
    scanned, scanned_losses = jax.lax.scan(train, fresh(), xs)
    np.testing.assert_allclose(scanned_losses, losses, rtol=1e-5)
    assert_close(scanned, state)
    compiled = train.lower(PLAN.abstract(MESH), jax.ShapeDtypeStruct((8, 3), jnp.float32)).compile()
    jitted, ahead, eager = fresh(), fresh(), fresh()
    for x in xs:
        jitted, _ = jax.jit(lambda state, x: train(state, x))(jitted, x)
        ahead, _ = compiled(ahead, x)
        with jax.disable_jit():
            eager, _ = train(eager, x)
    for other in (jitted, ahead, eager):
        assert_close(other, state)
        assert other.plan is state.plan


def test_a_state_off_the_mesh_runs_the_same_step_on_one_device() -> None:
    state, loss = train(fresh(None), X)
    again, loss_on_mesh = train(fresh(), X)
    np.testing.assert_allclose(loss, loss_on_mesh, rtol=1e-6)
    assert (state["stats"]["seen"].shape, again["stats"]["seen"].shape) == ((), (4,))


# --- the state -------------------------------------------------------------------------------------------------------


def test_a_kind_is_replaced_and_cast_with_its_leading_axis() -> None:
    state = fresh().replace(stats={"seen": on_mesh(jnp.arange(4.0), "data")})
    state = state.cast(stats="bfloat16")
    assert (state["stats"]["seen"].shape, state["stats"]["seen"].dtype) == ((4,), jnp.bfloat16)
    assert state.plan["stats"][0].shape == ()
    out = sw.step(lambda model, x: (model.seen[...], x))(state, X)
    np.testing.assert_array_equal(out[0].astype(float), range(4))
    with refused(
        sw.StructureError,
        "The replacement of kind 'stats' does not fit the plan.",
        leaves=["seen: BatchStat() float32  kind=stats  (is () in the replacement)"],
        kind="stats",
        hint="jax.tree.map(function, state['stats']) keeps the structure",
    ):
        fresh().replace(stats={"seen": jnp.zeros(())})


def test_a_packed_state_leaves_what_lies_per_device_as_it_is() -> None:
    layers = [nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(3)]
    model = nnx.Dict(dense=nnx.List(layers), own=nnx.List([nnx.BatchStat(jnp.zeros(3)) for _ in range(5)]))
    state = KINDS.plan(model).take(model, mesh=MESH, pack=True)
    assert [key for key in by_key(state) if key.startswith("stats")] == [f"stats/own/{at}" for at in range(5)]
    assert len([key for key in by_key(state) if key.startswith("params")]) == 1


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_write_that_differs_to_what_all_hold_alike_is_refused() -> None:
    @sw.step(writes="variables")
    def step(model: Net, x: Any) -> Any:
        model.calls[...] += 1
        model.total[...] += x.sum()

    with refused(
        sw.PlacementError,
        "`step` would write a different value on each device to 'variables', which is replicated.",
        leaves=["total: Variable() float32  kind=variables  (differs from device to device)"],
        kind="variables",
        hint="keep a value for each device: variables=sw.Kind(..., placement=sw.PerDevice('data'))\n"
        "or average before writing: jax.lax.pmean(value, 'data')",
    ):
        step(fresh(), X)


def test_a_write_that_is_synchronised_goes_through() -> None:
    @sw.step(writes="variables")
    def step(model: Net, x: Any) -> Any:
        model.calls[...] += 1
        model.total[...] += jax.lax.psum(x.sum(), "data")

    state, _ = step(fresh(), X)
    assert (int(state["variables"]["calls"]), float(state["variables"]["total"])) == (1, float(X.sum()))


@pytest.mark.parametrize("verb", ["put", "build"])
def test_a_model_cannot_take_the_values_of_all_devices(verb: str) -> None:
    state = fresh()
    with refused(
        sw.StructureError,
        "This state has per-device values in stats, but a model holds one value of each leaf; "
        f"plan.{verb} would have to choose.",
        leaves=["seen: BatchStat() float32  kind=stats"],
        kind="stats",
        hint="one = state.reduce_devices('stats', how='mean')  # or how='first'\none.plan.build(one)",
    ):
        PLAN.put(state, Net()) if verb == "put" else PLAN.build(state)


def test_what_an_optimizer_updates_cannot_lie_per_device() -> None:
    alike = "placement=sw.Replicated() for kinds with an optimizer; for an ensemble: jax.vmap over plan.axes(params=0)"
    note = "PerDevice, but updated by gradients that are averaged over the devices"
    plan = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=sw.PerDevice("data")))
    with refused(
        sw.PlacementError,
        "2 leaves cannot be placed on the mesh (data=4).",
        leaves=[
            f"dense/bias: Param(2,) float32  kind=params  ({note})",
            f"dense/kernel: Param(3, 2) float32  kind=params  ({note})",
        ],
        kind="params",
        hint=alike,
    ):
        plan.plan(Net(), optimizers={"params": optax.sgd(0.1)}).take(Net(), mesh=MESH)
    assert plan.plan(Net()).take(Net(), mesh=MESH)["params"]["dense"]["bias"].shape == (4, 2)


def test_all_that_lies_per_device_does_so_over_the_same_axes() -> None:
    def place(path: Any, shape: Any) -> Any:
        return sw.PerDevice("pipe") if path == ("total",) else sw.PerDevice("model")

    kinds = KINDS.replace(variables=sw.Kind(..., placement=place))
    with refused(
        sw.PlacementError,
        "2 leaves cannot be placed on the mesh (data=4, model=2).",
        leaves=[
            "seen: BatchStat() float32  kind=stats  (PerDevice('data'), but others have PerDevice('model'))",
            "total: Variable() float32  kind=variables  (the mesh has no axis 'pipe')",
        ],
        hint="use the same axes for every PerDevice kind\nuse an axis of the mesh: data, model",
    ):
        kinds.plan(Net()).shardings(BOTH)


def test_memory_counts_one_value_on_each_device() -> None:
    model = nnx.Dict(own=nnx.BatchStat(jnp.zeros(256)))
    counted = sw.memory(KINDS.plan(model), {"data": 4, "model": 2})["stats"]
    assert (counted.nbytes, counted.per_device, counted.saving_if_sharded) == (4096, 1024, 0)
