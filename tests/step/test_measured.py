"""What a step measures: under transforms, on meshes, as a dict, and as a table."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw
from measuring import Net, X, checked, close, flat, loss_of, plan_of
from statewise.errors import StructureError

# --- transforms --------------------------------------------------------------------------------------------------


def test_two_steps_of_one_function_share_a_state() -> None:
    model = Net(nnx.Rngs(0))
    plain, measuring = sw.train_step(loss_of), sw.train_step(loss_of, measure=True)
    state, other = plan_of(model).take(model), plan_of(model).take(model)
    for number in range(4):
        other, _ = plain(other, X)
        if number % 2:
            state, (_, measured) = measuring(state, X)
        else:
            state, _ = plain(state, X)
    for one, same in zip(flat(state, "params").values(), flat(other, "params").values(), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-6)
    assert measured.to_dict(depth=0)["written_norm/variables"] == 4


def test_scan_stacks_the_figures() -> None:
    model = Net(nnx.Rngs(0))
    step = sw.train_step(loss_of, measure=True)
    single, expected_ = plan_of(model).take(model), []
    for shift in range(3):
        single, (_, measured) = step(single, X + shift)
        expected_.append(measured)
    batches = jnp.stack([X + shift for shift in range(3)])
    scan = jax.jit(lambda state, batches: jax.lax.scan(lambda state, x: step(state, x), state, batches))
    _, (losses, stacked) = scan(plan_of(model).take(model), batches)
    assert losses.shape == (3,)
    for index, wanted in enumerate(expected_):
        one = jax.tree.map(lambda array, index=index: array[index], stacked)
        close(one.to_dict(), wanted.to_dict(), rtol=1e-4)
    mean = jax.tree.map(lambda *arrays: sum(arrays) / 3, *expected_)
    assert mean.to_dict(depth=0)["written_norm/variables"] == pytest.approx(2)
    for use in (stacked.to_dict, stacked.table, lambda: stacked.nonfinite, stacked.to_json):
        with pytest.raises(StructureError, match=r"is not of one step: its figures have the shape \(3, 2, 18\)") as e:
            use()
    hint = e.value.hint.partition("  #")[0]
    namespace: dict[str, Any] = {"jax": jax, "measured": stacked}
    exec(hint, namespace)
    close(namespace["one"].to_dict(), expected_[-1].to_dict(), rtol=1e-4)


def test_an_ensemble() -> None:
    models = [nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(2)]
    plan = plan_of(models[0])
    ensemble = plan.stack([plan.take(model) for model in models])
    step = sw.train_step(loss_of, measure=("params", "grads"))
    axes = ensemble.plan.axes()
    _, (_, stacked) = jax.vmap(step, in_axes=(axes, None), out_axes=(axes, 0))(ensemble, X)
    for index, model in enumerate(models):
        _, (_, wanted) = step(plan.take(model), X)
        one = jax.tree.map(lambda array, index=index: array[index], stacked)
        close(one.to_dict(), wanted.to_dict(), rtol=1e-4)


def test_device_get_eval_shape_and_ahead_of_time() -> None:
    model = Net(nnx.Rngs(0))
    step = sw.train_step(loss_of, measure=True)
    plan = plan_of(model)
    state = plan.take(model)
    abstract = jax.eval_shape(step, state, X)[1][1]
    with pytest.raises(StructureError, match="What is measured is abstract: it has shapes but no values to read"):
        abstract.to_dict()
    compiled = step.lower(state, X).compile()
    _, (_, measured) = step(plan.take(model), X)
    _, (_, same) = compiled(state, X)
    close(same.to_dict(), measured.to_dict(), rtol=1e-5)
    assert jax.device_get(measured).to_dict() == measured.to_dict()
    assert jax.tree.structure(same) == jax.tree.structure(measured)


def test_without_compilation() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    step = sw.train_step(loss_of, measure=True)
    _, (_, wanted) = step(plan_of(model).take(model), X)
    with jax.disable_jit():
        _, (_, measured) = step(plan_of(model).take(model), X)
    close(measured.to_dict(), wanted.to_dict(), rtol=1e-4)


def test_inside_a_jit_there_is_nothing_to_read() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    step = sw.train_step(loss_of, measure=True)

    @jax.jit
    def run(state: sw.State) -> Any:
        return step(state, X)[1][1].to_dict()

    with pytest.raises(StructureError, match="What is measured is being traced") as raised:
        run(plan_of(model).take(model))
    assert raised.value.hint == "return measured from the function under jax.jit, and read it outside"


def test_a_step_that_measures_can_be_differentiated() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)})
    state = plan.take(model)

    def after(x: jax.Array, measure: Any) -> jax.Array:
        new, _ = sw.train_step(loss_of, measure=measure)(state, x)
        return new["params"]["kernel"].sum()

    np.testing.assert_allclose(jax.grad(after)(X, True), jax.grad(after)(X, False), rtol=1e-5)


# --- meshes ------------------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_norms_are_those_of_the_whole_array_on_a_mesh(axis_type: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    model = nnx.Dict(
        small=nnx.Param(jnp.arange(16.0).reshape(8, 2)),
        large=nnx.Param(jnp.linspace(-1.0, 1.0, 160 * 160).reshape(160, 160)),
        bias=nnx.Param(jnp.ones(2)),
        seen=nnx.BatchStat(jnp.zeros(8)),
    )
    kinds = sw.Kinds(
        params=sw.Kind(
            nnx.Param, placement=lambda path, shape: sw.Sharded("data") if len(shape) > 1 else sw.Replicated()
        ),
        stats=sw.Kind(nnx.BatchStat, placement=sw.Sharded("data")),
    )
    plan = kinds.plan(model, optimizers={"params": optax.adam(1e-2)})

    @sw.train_step(measure=True)
    def train(model: Any, x: jax.Array) -> jax.Array:
        model.seen[...] = model.seen[...] + 1
        return ((x * model.small[...]).sum() + model.bias[...].sum()) ** 2 + (model.large[...] ** 2).sum()

    x = jnp.ones((8, 2))
    _, (_, wanted) = checked(train, plan.take(model), x, written=("stats",))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    _, (_, measured) = checked(train, plan.take(model, mesh=mesh), sharded, written=("stats",))
    close(measured.to_dict(), wanted.to_dict(), rtol=1e-5)
    assert measured.figures.sharding.is_fully_replicated
    assert measured.counts.sharding.is_fully_replicated


@pytest.mark.optimized
@pytest.mark.parametrize("large", [False, True])
def test_values_per_device_are_measured_over_all_devices(large: bool) -> None:
    """As the state has them: with an axis for the devices.  A value that is bad on one device is counted once."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    size = 20000 if large else 3
    model = nnx.Dict(w=nnx.Param(jnp.ones(4)), seen=nnx.BatchStat(jnp.zeros(size)), calls=nnx.Variable(jnp.array(0)))

    @sw.train_step(measure=True)
    def train(model: Any, x: jax.Array) -> jax.Array:
        model.seen[...] += x.sum()
        model.calls[...] += 1
        return ((x @ model.w[...]) ** 2).mean()

    kinds = sw.Kinds(
        params=sw.Kind(nnx.Param),
        stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")),
        calls=sw.Kind(...),
    )
    state = kinds.plan(model, optimizers={"params": optax.adam(0.1)}).take(model, mesh=mesh)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    grads = {("w",): jax.grad(lambda w: ((X @ w) ** 2).mean())(jnp.ones(4))}
    x = jax.device_put(X, rows)
    state, (_, measured) = checked(train, state, x, grads=grads, written=("stats", "calls"))
    _, (_, measured) = train(state, jax.device_put(X.at[3, 1].set(jnp.inf), rows))
    found = measured.to_dict(depth=0)
    assert found["written_nonfinite/stats"] == size
    assert measured.nonfinite[0].note == f"written: {size:,} of {8 * size:,} not finite"
    assert found["written_norm/calls"] == 2


# --- tables and dicts --------------------------------------------------------------------------------------------


def test_layers_are_taken_together() -> None:
    model = Net(nnx.Rngs(0))
    _, (_, measured) = sw.train_step(loss_of, measure=True)(plan_of(model).take(model), X)
    leaves, layers, kinds = measured.to_dict(), measured.to_dict(depth=2), measured.to_dict(depth=0)
    pair = [leaves[f"grad_norm/params/blocks/0/{name}"] for name in ("bias", "kernel")]
    assert layers["grad_norm/params/blocks/0"] == pytest.approx(math.hypot(*pair))
    pair = [leaves[f"grad_max/params/blocks/0/{name}"] for name in ("bias", "kernel")]
    assert layers["grad_max/params/blocks/0"] == max(pair)
    assert set(layers) >= {
        "param_norm/params/norm/scale",
        "update_norm/params/blocks/1",
        "written_norm/stats/norm/mean",
    }
    assert set(kinds) == {
        f"{name}_{figure}/{kind}"
        for name in ("param", "grad", "update", "written")
        for figure in ("norm", "max", "nonfinite")
        for kind in (("stats", "variables") if name == "written" else ("params",))
    }
    total = math.hypot(*(value for key, value in leaves.items() if key.startswith("grad_norm")))
    assert kinds["grad_norm/params"] == pytest.approx(total)
    assert all(type(value) is (int if "nonfinite" in key else float) for key, value in leaves.items())


def test_leaves_whose_paths_are_printed_alike_are_taken_together() -> None:
    model = nnx.Dict({"a/b": nnx.Param(jnp.ones(2)), "a": nnx.Dict({"b": nnx.Param(jnp.full(2, 3.0))})})
    step = sw.train_step(lambda model, x: (model["a/b"][...] * model["a"]["b"][...]).sum() * x, measure="grads")
    _, (_, measured) = step(plan_of(model).take(model), 1.0)
    for depth in (None, 2):
        figures = measured.to_dict(depth=depth)
        assert set(figures) == {f"grad_{figure}/params/a/b" for figure in ("norm", "max", "nonfinite")}
        assert figures["grad_norm/params/a/b"] == pytest.approx(math.sqrt(20))
        assert figures["grad_max/params/a/b"] == 3


def test_a_table_names_the_first_leaves_that_are_not_finite() -> None:
    model = Net(nnx.Rngs(0))
    state = plan_of(model).take(model)
    step = sw.train_step(loss_of, measure=("grads", "written"))
    state, (_, measured) = step(state, X)
    text = str(measured)
    assert "blocks/0" in text
    assert "not finite" not in text
    assert [line.split()[:2] for line in text.splitlines()[3:5]] == [["params", "blocks/0"], ["params", "blocks/1"]]
    state, (_, measured) = step(state, X.at[0, 0].set(jnp.nan))
    text = str(measured)
    assert "written 4" in text
    assert "the first of 7 that are not finite" in text
    assert "<table>" in measured._repr_html_()
    assert measured.table(depth=0).rows[0][:2] == ("params", "")
    data = json.loads(measured.to_json(depth=0))
    assert data["grad_norm/params"] == "nan"
    assert data["written_norm/variables"] == 2.0
