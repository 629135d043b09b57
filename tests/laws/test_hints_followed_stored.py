"""Hints are followed, of what is stored, laid out, stacked, moved or watched (see test_hints_followed.py)."""

from __future__ import annotations

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
from following import hint_of, options, run, value
from hints import code_of

X = jnp.arange(8.0).reshape(4, 2) / 8


def linear(seed: int = 0) -> nnx.Linear:
    return nnx.Linear(2, 3, rngs=nnx.Rngs(seed))


PLAN = sw.plan(linear())


def state_of(seed: int = 0) -> sw.State:
    return PLAN.take(linear(seed))


def same(state: sw.State, seed: int = 0) -> None:
    np.testing.assert_array_equal(state["params"]["kernel"], linear(seed).kernel[...])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_model_is_saved(tmp_path: Path) -> None:
    model, path = linear(), tmp_path / "kept"
    code = hint_of(sw.StructureError, lambda: sw.save(path, model))  # type: ignore[arg-type]
    run(code, path=path, plan=PLAN, model=model)
    same(sw.restore(path, PLAN.abstract())[0])


def test_a_path_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").write_text("mine")
    code = hint_of(sw.SaveError, lambda: sw.save(tmp_path / "kept", state_of()))
    with value(code, directory=tmp_path / "steps") as checkpoints:
        checkpoints.save(1, state_of())
        same(checkpoints.restore(PLAN.abstract())[0])


def test_a_layout_of_another_name(tmp_path: Path) -> None:
    given: dict[str, Any] = {"layout": "flat"}
    given |= options(hint_of(sw.SaveError, lambda: sw.save(tmp_path / "kept", state_of(), **given)))
    sw.save(tmp_path / "kept", state_of(), **given)
    same(sw.restore(tmp_path / "kept", PLAN.abstract())[0])


def test_only_of_nothing(tmp_path: Path) -> None:
    given: dict[str, Any] = {"only": 3}
    given |= options(hint_of(sw.DeclarationError, lambda: sw.save(tmp_path / "kept", state_of(), **given)))
    sw.save(tmp_path / "kept", state_of(), **given)
    same(sw.restore(tmp_path / "kept", PLAN.abstract())[0])


def test_a_restore_into_a_model(tmp_path: Path) -> None:
    sw.save(path := tmp_path / "kept", state_of(1))
    code = hint_of(sw.StructureError, lambda: sw.restore(path, linear()))  # type: ignore[arg-type]
    state, _ = value(code, path=path, plan=PLAN, model=linear())
    same(state, 1)


def test_a_restore_that_would_narrow(tmp_path: Path) -> None:
    sw.save(path := tmp_path / "kept", state_of())
    target = PLAN.abstract().cast(params="bfloat16")
    code = hint_of(sw.RestoreError, lambda: sw.restore(path, target), "cast")
    state, _ = value(code, path=path, target=target)
    np.testing.assert_array_equal(state["params"]["kernel"], linear().kernel[...].astype(jnp.bfloat16))


def test_a_step_that_is_no_number(tmp_path: Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        code = hint_of(sw.SaveError, lambda: checkpoints.save("x", state_of()))  # type: ignore[arg-type]
        run(code, checkpoints=checkpoints, state=state_of())
        checkpoints.wait()
        assert checkpoints.latest == 100
        same(checkpoints.restore(PLAN.abstract())[0])


def test_a_directory_without_checkpoints(tmp_path: Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        code = hint_of(sw.RestoreError, lambda: checkpoints.restore(PLAN.abstract()))
        run(code, checkpoints=checkpoints, step=3, state=state_of())
        same(checkpoints.restore(PLAN.abstract())[0])


def test_a_conversion_into_a_model(tmp_path: Path) -> None:
    arrays = {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)}
    dst, model = tmp_path / "kept", linear()
    code = hint_of(sw.StructureError, lambda: sw.convert(arrays, dst, target=model))  # type: ignore[arg-type]
    run(code, src=arrays, dst=dst, plan=PLAN, model=model)
    np.testing.assert_array_equal(sw.restore(dst, PLAN.abstract())[0]["params"]["kernel"], arrays["kernel"])


def test_a_restore_into_a_plan(tmp_path: Path) -> None:
    sw.save(path := tmp_path / "kept", state_of(1))
    code = hint_of(sw.StructureError, lambda: sw.restore(path, PLAN), "abstract")  # type: ignore[arg-type]
    same(sw.restore(path, value(code, plan=PLAN))[0], 1)


# --- transfer --------------------------------------------------------------------------------------------------------


def test_a_model_is_transferred() -> None:
    model, target = linear(1), state_of()
    code = hint_of(sw.StructureError, lambda: sw.transfer(model, target))  # type: ignore[arg-type]
    found = value(code, plan=PLAN, model=model, target=target)
    same(found[0] if isinstance(found, tuple) else found, 1)


# --- placements ------------------------------------------------------------------------------------------------------


def test_a_mesh_that_is_a_dict() -> None:
    code = hint_of(sw.PlacementError, lambda: PLAN.take(linear(), mesh={"data": 8}))  # type: ignore[arg-type]
    mesh = run(code.replace("('data',)", "('data',), axis_types=(jax.sharding.AxisType.Auto,)"))["mesh"]
    assert len(PLAN.take(linear(), mesh=mesh)["params"]["kernel"].sharding.device_set) == 8


def test_an_axis_named_twice() -> None:
    code = hint_of(sw.PlacementError, lambda: sw.Sharded(3))  # type: ignore[arg-type]
    assert value(code) == sw.Sharded("data", None)


def test_a_resize_of_no_name() -> None:
    given: dict[str, Any] = {"resize": "sum"}
    given |= options(hint_of(sw.PlacementError, lambda: sw.PerDevice("data", **given)))
    assert sw.PerDevice("data", **given) == sw.PerDevice("data", resize="mean")


def test_an_axis_for_each_device() -> None:
    assert value(hint_of(sw.PlacementError, lambda: sw.PerDevice())) == sw.PerDevice("data")


def test_a_mesh_whose_axes_are_explicit() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded(None, "data")))
    model = nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(0))
    plan, forward = kinds.plan(model), sw.step(lambda model, x: model(x))

    def apply(mesh: jax.sharding.Mesh) -> Any:
        x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P("data")))
        return forward(plan.take(model, mesh=mesh), x)

    code = hint_of(sw.PlacementError, lambda: apply(mesh), "make_mesh")
    np.testing.assert_allclose(apply(run(code)["mesh"]), model(jnp.ones((8, 4))), rtol=1e-6)


# --- ensembles -------------------------------------------------------------------------------------------------------


def test_an_ensemble_of_a_text() -> None:
    code = hint_of(sw.DeclarationError, lambda: PLAN.stacked("8"))  # type: ignore[arg-type]
    assert value(code, plan=PLAN).abstract()["params"]["kernel"].shape == (8, 2, 3)


def test_an_ensemble_of_another_number() -> None:
    states = [state_of(0), state_of(1)]
    code = hint_of(sw.StructureError, lambda: PLAN.stacked(3).stack(states))
    same(value(code, plan=PLAN, states=states).member(1), 1)


def test_models_in_the_place_of_states() -> None:
    models = [linear(0), linear(1)]
    code = hint_of(sw.StructureError, lambda: PLAN.stacked(2).stack(models), "plan.take")  # type: ignore[arg-type]
    same(value(code, plan=PLAN, models=models).member(1), 1)


def test_a_member_that_is_not_there() -> None:
    states = PLAN.stacked(2).stack([state_of(0), state_of(1)])
    code = hint_of(sw.StatewiseError, lambda: states.member(2))
    same(value(code, state=states), 1)


def test_a_step_of_one_on_a_state_of_all() -> None:
    states = PLAN.stacked(2).stack([state_of(0), state_of(1)])
    forward = sw.step(lambda model, x: model(x))
    with pytest.raises(sw.StructureError) as caught:
        forward(states, X)
    axes, call = code_of(caught.value), code_of(caught.value, "vmap")
    scope = run(axes, state=states)
    out = value(call.rpartition("\n")[2], **scope, step=forward, x=X)
    np.testing.assert_allclose(out[1], linear(1)(X), rtol=1e-6)


# --- watch and lint --------------------------------------------------------------------------------------------------


def test_nothing_is_watched() -> None:
    head = hint_of(sw.StructureError, lambda: sw.watch().__enter__())
    model = linear()
    watch = run(f"{head}\n    model.kernel[...] += 1", model=model)["watch"]
    assert set(watch.changed) == {"params"}


def test_a_watch_that_is_printed_too_early() -> None:
    model = linear()

    def train(model: Any, x: Any) -> None:
        model.kernel[...] += x

    code = hint_of(sw.StructureError, lambda: sw.watch(model).changed, "with")
    assert set(run(code, model=model, train=train, x=1.0)["watch"].changed) == {"params"}


def test_expect_is_no_kind() -> None:
    given: dict[str, Any] = {"expect": 3}
    given |= options(hint_of(sw.DeclarationError, lambda: sw.watch(linear(), **given), "'params'"))
    model = linear()
    with sw.watch(model, **given):
        model.kernel[...] += 1


@pytest.mark.parametrize("kinds", [sw.Kinds(rest=sw.Kind(...)), sw.Kinds(cache=sw.Kind(nnx.Cache))])
def test_lint_of_a_cache_that_is_saved(kinds: sw.Kinds) -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), hits=nnx.Cache(jnp.zeros(2)))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param)) | kinds
    (found,) = [one for one in sw.lint(model, kinds=kinds) if one.code == "cache-saved"]
    fixed = run(code_of(found), kinds=kinds)["kinds"]
    assert "cache-saved" not in {one.code for one in sw.lint(model, kinds=fixed)}
    assert not fixed["cache"].saved


def test_lint_of_statistics_that_start_at_zero() -> None:
    model = nnx.Dict(running_var=nnx.BatchStat(jnp.zeros(3)))
    (found,) = sw.lint(model)
    code = code_of(found)
    run(code.replace("...", "3"), model=model, BatchStat=nnx.BatchStat, self=model)
    assert not sw.lint(model)


def test_explain_of_a_class() -> None:
    code = hint_of(sw.StructureError, lambda: sw.explain(nnx.Linear, nnx.Param))
    model = run(code.replace("...", "2, 3"), Linear=nnx.Linear)["model"]
    assert "kernel" in str(sw.explain(model, nnx.Param))


def test_audit_of_a_function_that_is_given_an_optimizer() -> None:
    model = linear()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def train(model: Any, optimizer: Any, x: Any) -> None:
        grads = nnx.grad(lambda model: model(x).sum())(model)
        optimizer.update(model, grads)

    code = hint_of(sw.StructureError, lambda: sw.audit(train, model, optimizer, X))
    assert "params" in str(value(code.replace("...", "x"), train=train, model=model, optimizer=optimizer, x=X))
