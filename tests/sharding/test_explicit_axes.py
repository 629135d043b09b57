"""Meshes whose axes are Explicit, the default of the newest JAX: what works with them, and what says so where not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw
from comparing import same
from meshes import assert_close, number


def mesh_of(*types: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=types)


EXPLICIT, AUTO = (AxisType.Explicit,) * 2, (AxisType.Auto,) * 2


class Model(nnx.Module):
    """Two layers, statistics, noise and a counter."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


def columns(path: Any, shape: Any) -> Any:
    return sw.Sharded(None, "model") if len(shape) == 2 else sw.Replicated()


def rows(path: Any, shape: Any) -> Any:
    return sw.Sharded("data") if shape and shape[0] % 4 == 0 else sw.Replicated()


def plan_of(placement: Any, **options: Any) -> sw.Plan:
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement))
    return kinds.plan(Model(), optimizers={"params": optax.adam(1e-2)}, averages={"params": sw.EMA(0.9)}, **options)


@sw.train_step
def train(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


@sw.step
def evaluate(model: Any, x: Any) -> Any:
    model.eval()
    return model.down(nnx.relu(model.norm(model.up(x))))


def batch(mesh: Any = None) -> Any:
    x = jnp.arange(64.0).reshape(8, 8) / 64
    return x if mesh is None else jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))


@pytest.mark.parametrize("placement", [sw.Replicated(), columns, rows], ids=["whole", "columns", "rows"])
def test_whatever_places_keeps_and_moves_arrays_works(placement: Any, tmp_path: Any) -> None:
    mesh, plan, model = mesh_of(*EXPLICIT), plan_of(placement), Model()
    state = plan.take(model, mesh=mesh)
    assert same(state, plan.take(model))
    assert jax.tree.map(lambda array: array.sharding, state).plan is plan
    assert plan.abstract(mesh)["params"]["up"]["kernel"].sharding == state["params"]["up"]["kernel"].sharding
    assert_close(plan.init(Model, mesh), state, rtol=1e-6)
    assert sw.memory(plan, mesh) == sw.memory(plan, {"data": 4, "model": 2})
    sw.save(tmp_path / "kept", state)
    restored, _ = sw.restore(tmp_path / "kept", plan.abstract(mesh))
    assert same(restored, state)
    assert same(sw.transfer(plan.take(model), state, kinds="params"), state)
    assert same(sw.transfer(state, plan.take(model), kinds="params"), state)
    plan.put(state, model)
    assert same(plan.take(model, mesh=mesh), state)
    assert same(state.with_averages("ema")["params"], state["params"])
    assert state.cast(params="bfloat16")["params"]["up"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("placement", [sw.Replicated(), columns], ids=["whole", "columns"])
def test_a_step_that_is_not_ambiguous_runs_as_elsewhere(placement: Any, set_mesh: bool) -> None:
    mesh, plan = mesh_of(*EXPLICIT), plan_of(placement)
    expected, loss = train(plan.take(Model()), batch())
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        state, same_loss = train(plan.take(Model(), mesh=mesh), batch(mesh))
    np.testing.assert_allclose(loss, same_loss, rtol=1e-5)
    np.testing.assert_allclose(state["stats"]["norm"]["mean"], expected["stats"]["norm"]["mean"], rtol=1e-4, atol=1e-6)
    assert "ambiguous" not in str(sw.audit(train, state, batch(mesh)))


def test_what_a_step_writes_keeps_its_type_inside_a_loop_of_the_user_s() -> None:
    """Statistics come out split along "model": a scan would refuse a carry of another type."""
    mesh, plan = mesh_of(*EXPLICIT), plan_of(columns)
    x = batch(mesh)

    @jax.jit
    def steps(state: Any) -> Any:
        return jax.lax.scan(lambda state, _: train(state, x), state, length=2)

    looped, losses = steps(plan.take(Model(), mesh=mesh))
    state = plan.take(Model(), mesh=mesh)
    for loss in losses:
        state, one = train(state, x)
        np.testing.assert_allclose(loss, one, rtol=1e-4)
    mean = looped["stats"]["norm"]["mean"]
    assert mean.sharding.is_equivalent_to(plan.shardings(mesh)["stats"]["norm"]["mean"], mean.ndim)


FSDP = plan_of(rows)
STEP = "the mesh axes 'data' and 'model' are Explicit, and JAX needs the sharding of a result: "
HINT = "axis_types=(jax.sharding.AxisType.Auto,) * 2)"

DOORS: dict[str, Callable[[sw.State, Any], Any]] = {
    "step": lambda state, mesh: evaluate(state, batch()),
    "step, sharded batch": lambda state, mesh: evaluate(state, batch(mesh)),
    "train step": lambda state, mesh: train(state, batch(mesh)),
    "lower": lambda state, mesh: train.lower(FSDP.abstract(mesh), batch(mesh)),
    "audit": lambda state, mesh: sw.audit(train, state, batch(mesh)),
    "the user's own jit": lambda state, mesh: jax.jit(train)(state, batch(mesh)),
    "without jit": lambda state, mesh: _eagerly(state, mesh),
    "value_and_grad": lambda state, mesh: sw.value_and_grad(lambda model, x: (model(x) ** 2).mean())(
        FSDP.build(state), batch(mesh)
    ),
}


def _eagerly(state: sw.State, mesh: Any) -> Any:
    with jax.disable_jit():
        return evaluate(state, batch(mesh))


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_where_jax_cannot_tell_how_a_result_is_split_the_axes_are_named(door: str, set_mesh: bool) -> None:
    mesh = mesh_of(*EXPLICIT)
    state = FSDP.take(Model(), mesh=mesh)
    kept = [np.array(number(array)) for array in jax.tree.leaves(state)]
    with pytest.raises(sw.PlacementError) as caught, jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        DOORS[door](state, mesh)
    assert STEP in caught.value.message
    assert type(caught.value.__cause__).__name__ == "ShardingTypeError"
    lines = (caught.value.hint or "").splitlines()
    assert lines == [
        f"mesh = jax.make_mesh((4, 2), ('data', 'model'), {HINT}",
        "or, where JAX needs it: jnp.dot(x, w, out_sharding=jax.P(...)), jax.reshard(x, jax.P(...))",
    ]
    # Nothing was donated, and what the hint says works.
    for array, before in zip(jax.tree.leaves(state), kept, strict=True):
        assert np.array_equal(number(array), before)
    names: dict[str, Any] = {"jax": jax}
    exec(lines[0], names)
    moved = jax.device_put(state, FSDP.shardings(names["mesh"]))
    train(moved, batch())


def test_one_explicit_axis_beside_an_auto_one() -> None:
    mesh = mesh_of(AxisType.Explicit, AxisType.Auto)
    with pytest.raises(sw.PlacementError, match=r"the mesh axis 'data' is Explicit"):
        train(FSDP.take(Model(), mesh=mesh), batch(mesh))


def test_another_error_of_the_user_s_stays_what_it_is() -> None:
    mesh = mesh_of(*EXPLICIT)

    @sw.step
    def broken(model: Any, x: Any) -> Any:
        raise KeyError("nothing about a mesh")

    with pytest.raises(KeyError, match="nothing about a mesh"):
        broken(FSDP.take(Model(), mesh=mesh), batch(mesh))


def test_auto_axes_are_not_spoken_of() -> None:
    state, _ = train(FSDP.take(Model(), mesh=mesh_of(*AUTO)), batch(mesh_of(*AUTO)))
    assert state["params"]["up"]["kernel"].sharding.spec == jax.P("data")
