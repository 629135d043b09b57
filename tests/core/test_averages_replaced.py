"""What is derived from a kind follows where a restore or a transfer replaces the kind; `replace` and `put` keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
WARM = sw.EMA(lambda n: jnp.minimum(0.999, (1 + n) / (10 + n)))


class Model(nnx.Module):
    def __init__(self, seed: int = 0) -> None:
        self.hidden = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(seed))

    def __call__(self, x: Any) -> Any:
        return self.norm(self.hidden(x))


@sw.train_step
def train(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean() + model.hidden.kernel[...].sum()


@sw.step
def evaluate(model: Any, x: Any) -> Any:
    model.eval()
    return model(x)


def planned(seed: int = 0, kinds: Any = None, averages: Any = WARM, of: Any = ("params",)) -> sw.Plan:
    kinds = kinds or sw.Kinds.standard()
    return kinds.plan(Model(seed), optimizers={"params": optax.adam(0.1)}, averages=averages and {of: averages})


def trained(plan: sw.Plan, seed: int = 0, steps: int = 2, **options: Any) -> sw.State:
    state = plan.take(Model(seed), **options)
    for _ in range(steps):
        state, _ = train(state, X)
    return state


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def with_ema(**handling: Any) -> sw.Kinds:
    return sw.Kinds.standard() | sw.Kinds(ema=sw.Kind(sw.EMA, **handling))


@pytest.fixture
def pretrained(tmp_path: Path) -> tuple[Path, sw.State]:
    """A checkpoint without averages."""
    state = trained(planned(averages=None), seed=7, steps=3)
    sw.save(tmp_path / "pretrained", state)
    return tmp_path / "pretrained", state


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_evaluation_by_the_averages_is_that_of_what_was_restored(pretrained: Any, steps: int, pack: bool) -> None:
    path, old = pretrained
    target = trained(planned(), steps=steps, pack=pack)
    before = jax.tree.map(jnp.copy, target["params"])
    state, report = sw.restore(path, target, only=("params", "stats"))
    same(evaluate(state.with_averages("ema"), X), evaluate(old, X))
    same(state["ema"]["params"], old["params"])
    assert state["ema"]["_counts"]["params"] == 0
    assert {(one.outcome, one.why) for one in report["ema"]} == {
        ("restarted", "not asked for, and of params, which is restored")
    }
    assert report == sw.preview(path, target, only=("params", "stats"))
    after, _ = train(state, X)  # no buffer stands in two places
    assert after["ema"]["_counts"]["params"] == 1
    same(target["params"], before)


def test_optimizer_state_is_kept_and_the_report_says_of_what_it_is(pretrained: Any) -> None:
    path, _ = pretrained
    target = trained(planned())
    state, report = sw.restore(path, target, only="params")
    same(state["optimizer"], target["optimizer"])
    assert {(one.outcome, one.why) for one in report["optimizer"]} == {
        ("kept", "not asked for, though of params, which is restored")
    }
    same(sw.transfer(trained(planned(), 7), target, kinds="params")["optimizer"], target["optimizer"])


@pytest.mark.parametrize("handling", [{"saved": False}, {"missing": "keep"}, {"missing": "restart"}])
def test_averages_that_the_checkpoint_lacks_follow_however_they_are_declared(
    pretrained: Any, handling: dict[str, Any]
) -> None:
    path, old = pretrained
    state, report = sw.restore(path, trained(planned(kinds=with_ema(**handling))))
    same(state["ema"]["params"], old["params"])
    assert report.counts["ema"] == {"restarted": 5}


@pytest.mark.parametrize("handling", [{"saved": False}, {"missing": "keep"}, {}])
def test_averages_of_what_keeps_its_values_are_kept(pretrained: Any, handling: dict[str, Any]) -> None:
    target = trained(planned(kinds=with_ema(**handling)))
    state, report = sw.restore(pretrained[0], target, only="stats")
    same(state["ema"], target["ema"])
    assert report.counts["ema"] == {"kept": 5}


def test_averages_that_are_restored_themselves_are_as_they_were_saved(tmp_path: Path) -> None:
    saved = trained(planned(), seed=7)
    sw.save(tmp_path / "run", saved)
    for only in (None, ("params", "ema"), "ema"):
        state, report = sw.restore(tmp_path / "run", trained(planned(), steps=1), only=only)
        same(state["ema"], saved["ema"])
        assert report.counts["ema"] == {"restored": 5}


def test_into_an_abstract_target_averages_need_no_values(pretrained: Any) -> None:
    path, old = pretrained
    model = Model()
    plan = sw.Kinds.standard().plan(model, averages={"params": WARM})
    state, report = sw.restore(path, plan.abstract(), only=("params", "stats"))
    same(state["ema"]["params"], old["params"])
    assert report.ok


def test_only_the_averages_of_the_kind_that_is_replaced_begin_again(pretrained: Any) -> None:
    path, old = pretrained
    target = trained(planned(of=("params", "stats")))
    state, _ = sw.restore(path, target, only="params")
    same(state["ema"]["params"], old["params"])
    same(state["ema"]["stats"], target["ema"]["stats"])
    moved = sw.transfer(old, target, kinds="params")
    same(moved["ema"], state["ema"])


def test_a_leaf_that_keeps_its_value_is_averaged_from_it(tmp_path: Path) -> None:
    part = nnx.Dict(a=nnx.Param(jnp.full(2, 5.0)))
    sw.save(tmp_path / "part", sw.plan(part).take(part))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, missing="keep"))
    whole = nnx.Dict(a=nnx.Param(jnp.ones(2)), b=nnx.Param(jnp.full(2, 3.0)))
    plan = kinds.plan(whole, averages={"params": sw.EMA(0.9)})
    state, report = sw.restore(tmp_path / "part", plan.take(whole), only="params")
    same(state["ema"]["params"], state["params"])
    assert state["params"]["b"][0] == 3
    assert report.counts == {"params": {"restored": 1, "kept": 1}, "ema": {"restarted": 2}}


def test_averages_follow_a_base(tmp_path: Path) -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat))
    model = nnx.Dict(w=nnx.Param(jnp.full(2, 5.0)), s=nnx.BatchStat(jnp.ones(2)))
    state = kinds.plan(model).take(model)
    sw.save(tmp_path / "base", state)
    sw.save(tmp_path / "adapter", state, only="stats", base=tmp_path / "base")
    fresh = nnx.Dict(w=nnx.Param(jnp.zeros(2)), s=nnx.BatchStat(jnp.zeros(2)))
    plan = kinds.plan(fresh, averages={"params": sw.EMA(0.9)})
    restored, _ = sw.restore(tmp_path / "adapter", plan.take(fresh), only=("params", "stats"))
    same(restored["ema"]["params"], state["params"])


def test_averages_follow_in_checkpoints_and_after_a_conversion(tmp_path: Path, pretrained: Any) -> None:
    path, old = pretrained
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, old)
        checkpoints.wait()
        state, report, *_ = checkpoints.restore(trained(planned()), only="params")
    same(state["ema"]["params"], old["params"])
    assert report.counts["ema"] == {"restarted": 5}
    sw.convert(path, tmp_path / "again", target=planned(averages=None).abstract())
    state, _ = sw.restore(tmp_path / "again", trained(planned()), only="params")
    same(state["ema"]["params"], old["params"])


def test_averages_of_several_objects_and_names_follow(tmp_path: Path) -> None:
    def plan_of(averages: Any) -> tuple[sw.Plan, Any]:
        models = nnx.Dict(w=nnx.Param(jnp.ones(2))), nnx.Dict(w=nnx.Param(jnp.zeros(2)))
        return sw.plan(*models, averages=averages), models

    plan, models = plan_of(None)
    sw.save(tmp_path / "run", jax.tree.map(lambda array: array + 4, plan.take(*models)))
    plan, models = plan_of({"params": [sw.EMA(0.9), sw.EMA(0.5, name="fast")]})
    state, _ = sw.restore(tmp_path / "run", plan.take(*models), only="params")
    same(state["ema"]["params"], state["params"])
    same(state["fast"]["params"], state["params"])
    assert state["params"][0]["w"][0] == 5


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("cast", [False, "bfloat16"])
def test_a_transfer_begins_the_averages_of_what_it_moves(pack: bool, cast: Any) -> None:
    src, target = trained(planned(averages=None), 7, 3), trained(planned(), pack=pack)
    state = sw.transfer(src, target, kinds="params", cast=cast)
    same(state["ema"]["params"], jax.tree.map(lambda array: array.astype("float32"), state["params"]))
    assert state["ema"]["_counts"]["params"] == 0
    same(state["stats"], target["stats"])
    if not cast:
        after, _ = train(state, X)
        assert after["ema"]["_counts"]["params"] == 1


def test_a_transfer_of_the_averages_too_moves_them() -> None:
    src, target = trained(planned(), 7, 3), trained(planned())
    same(sw.transfer(src, target, kinds=("params", "ema"))["ema"], src["ema"])
    same(sw.transfer(src, target)["ema"], src["ema"])
    same(sw.transfer(src, target, kinds="stats")["ema"], target["ema"])


def test_a_transfer_into_a_plan_begins_them_where_they_lie(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
    model = nnx.Dict(w=nnx.Param(jnp.arange(4.0)))
    plan = kinds.plan(model, averages={"params": sw.EMA(0.9)})
    state = sw.transfer(sw.plan(model).take(model), plan, kinds="params", mesh=mesh)
    same(state["ema"]["params"], state["params"])
    assert state["ema"]["params"]["w"].sharding == plan.shardings(mesh)["ema"]["params"]["w"]
    donated = plan.take(model)
    jax.tree.map(lambda array: array.delete(), donated["ema"])
    same(sw.transfer(state, donated, kinds="params")["ema"]["params"], state["params"])


def test_under_jit_a_transfer_begins_them_too() -> None:
    src, target = trained(planned(averages=None), 7), trained(planned())
    state = jax.jit(lambda src, target: sw.transfer(src, target, kinds="params"))(src, target)
    same(state["ema"]["params"], src["params"])


def test_replace_and_put_keep_the_averages() -> None:
    plan = planned()
    state, other = trained(plan), trained(plan, 7)
    same(state.replace(params=other["params"])["ema"], state["ema"])
    kept = jax.tree.map(jnp.copy, state["ema"])
    plan.put(state, Model(3))
    same(state["ema"], kept)


@settings(max_examples=20)
@given(st.sets(st.sampled_from(["params", "stats", "ema", "optimizer"]), min_size=1), st.booleans())
def test_an_average_is_never_of_other_weights(only: set[str], ephemeral: bool) -> None:
    """It comes from where its kind comes from, or is a copy of it; or both are asked for one by one."""
    plan = planned(kinds=with_ema(saved=not ephemeral), of=("params", "stats"))
    src, target = _states(plan)
    moved = sw.transfer(src, target, kinds=tuple(only))
    for kind in ("params", "stats"):
        came = src if "ema" in only else target if kind not in only else None
        if came is None:
            same(moved["ema"][kind], moved[kind])
        else:
            same(moved["ema"][kind], came["ema"][kind])


_known: dict[sw.Plan, tuple[sw.State, sw.State]] = {}


def _states(plan: sw.Plan) -> tuple[sw.State, sw.State]:
    if plan not in _known:
        _known[plan] = trained(plan, 7), trained(plan)
    return _known[plan]
