"""Averages in checkpoints: saved and restored as any kind, begun with what is restored where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused

ADAM = {"params": optax.adam(1e-2)}
AVERAGES = {"params": sw.EMA(lambda count: jnp.minimum(0.5, (1 + count) / (4 + count)))}
train = sw.train_step(lambda model, x: (model(x) ** 2).mean())
X = jnp.ones((4, 3))


def make() -> nnx.Module:
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def planned(averages: Any = AVERAGES, kinds: sw.Kinds | None = None) -> sw.Plan:
    return (kinds or sw.Kinds.standard()).plan(make(), optimizers=ADAM, averages=averages)


def trained(plan: sw.Plan, **options: Any) -> sw.State:
    state = plan.take(make(), **options)
    for _ in range(2):
        state, _ = train(state, X)
    return state


def same(one: Any, other: Any) -> None:
    for ours, theirs in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layout", ["named", "packed"])
def test_what_is_saved_is_restored_and_trains_on(tmp_path: Path, layout: str, pack: bool) -> None:
    plan = planned()
    state = trained(plan, pack=pack)
    sw.save(tmp_path / "run", state, layout=layout)
    restored, report = sw.restore(tmp_path / "run", plan.abstract())
    same(restored["ema"], state["ema"])
    assert restored["ema"]["_counts"]["params"] == 2
    assert {leaf.outcome for leaf in report.leaves} == {"restored"}
    same(train(restored, X)[0]["ema"], train(sw.restore(tmp_path / "run", plan.take(make()))[0], X)[0]["ema"])


def test_inspect_and_diff_show_averages(tmp_path: Path) -> None:
    plan = planned()
    state = trained(plan)
    sw.save(tmp_path / "run", state)
    assert sw.inspect(tmp_path / "run")["ema"].leaves == 3
    assert not any(sw.diff(tmp_path / "run", state).value.values())
    later, _ = train(state, X)
    assert set(sw.diff(tmp_path / "run", later).value) == {"params", "optimizer", "ema"}


def test_a_checkpoint_without_averages_is_refused_with_the_hint(tmp_path: Path) -> None:
    sw.save(tmp_path / "run", trained(planned(None)))
    target = planned().take(make())
    kinds = "dataclasses.replace(plan.kinds['ema'], missing='restart')"
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "ema/params/bias: Array(2,) float32  kind=ema  (missing from the checkpoint)",
        "ema/params/kernel: Array(3, 2) float32  kind=ema  (missing from the checkpoint)",
        "ema/_counts/params: Array() int32  kind=ema  (missing from the checkpoint)",
    ]
    assert f"to begin with what is restored, declare it: kinds = plan.kinds.replace(ema={kinds})" in str(caught.value)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_averages_begin_with_what_is_restored(tmp_path: Path, abstract: bool, pack: bool) -> None:
    old = trained(planned(None))
    sw.save(tmp_path / "run", old)
    plan = planned(kinds=sw.Kinds.standard() | sw.Kinds(ema=sw.Kind(sw.EMA, missing="restart")))
    target = plan.abstract() if abstract else trained(plan, pack=pack)
    restored, report = sw.restore(tmp_path / "run", target)
    same(restored["ema"]["params"], old["params"])
    assert restored["ema"]["_counts"]["params"] == 0
    assert {leaf.leaf.kind for leaf in report.leaves if leaf.outcome == "restarted"} == {"ema"}
    after, _ = train(restored, X)  # no buffer stands in two places
    same(sw.restore(tmp_path / "run", target)[0]["params"], old["params"])
    assert after["ema"]["_counts"]["params"] == 1


def test_a_restart_after_a_restore_of_the_other_kinds_does_the_same(tmp_path: Path) -> None:
    old = trained(planned(None))
    sw.save(tmp_path / "run", old)
    state, _ = sw.restore(tmp_path / "run", planned().take(make()), only=("params", "optimizer"))
    same(state.restart("ema")["ema"]["params"], old["params"])


def test_ephemeral_averages_begin_with_what_is_restored(tmp_path: Path) -> None:
    plan = planned(kinds=sw.Kinds.standard() | sw.Kinds(ema=sw.Kind(sw.EMA, saved=False)))
    state = trained(plan)
    sw.save(tmp_path / "run", state)
    restored, _ = sw.restore(tmp_path / "run", plan.abstract())
    same(restored["ema"]["params"], state["params"])


def test_on_a_mesh_averages_come_back_where_they_lie(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2,), ("data",))
    stats = sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data"))
    kinds = sw.Kinds.standard().replace(stats=stats)
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    plan = kinds.plan(model, optimizers=ADAM, averages={("params", "stats"): sw.EMA(0.5)})
    state, _ = train(plan.take(model, mesh=mesh), jax.random.normal(jax.random.key(0), (4, 4)))
    sw.save(tmp_path / "run", state)
    restored, _ = sw.restore(tmp_path / "run", plan.abstract(mesh))
    same(restored["ema"], state["ema"])
    assert restored["ema"]["stats"]["mean"].sharding == state["ema"]["stats"]["mean"].sharding


@pytest.mark.parametrize("resize", ["mean", "error"])
def test_onto_other_devices_averages_become_what_their_leaves_become(tmp_path: Path, resize: str) -> None:
    meshes = [jax.make_mesh((count,), ("data",), devices=jax.devices()[:count]) for count in (2, 4)]
    stats = sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data", resize=resize))
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    plan = sw.Kinds.standard().replace(stats=stats).plan(model, optimizers=ADAM, averages={"stats": sw.EMA(0.5)})
    state, _ = train(plan.take(model, mesh=meshes[0]), jax.random.normal(jax.random.key(0), (4, 4)))
    sw.save(tmp_path / "run", state)
    if resize == "error":
        with pytest.raises(sw.RestoreError) as caught:
            sw.restore(tmp_path / "run", plan.abstract(meshes[1]))
        assert {leaf.kind for leaf in caught.value.leaves} == {"stats", "ema"}
        assert str(caught.value.hint).count("stats=sw.Kind(") == 1
        assert "ema=" not in str(caught.value.hint)
        return
    restored, _ = sw.restore(tmp_path / "run", plan.abstract(meshes[1]))
    mean = np.asarray(state["ema"]["stats"]["mean"]).mean(0)
    np.testing.assert_allclose(restored["ema"]["stats"]["mean"], np.stack([mean] * 4), rtol=1e-6)


def test_conversions_leave_averages_to_the_run(tmp_path: Path) -> None:
    state = trained(planned())
    sw.save(tmp_path / "run", state)
    sw.convert(
        tmp_path / "run", tmp_path / "weights.safetensors", rename=lambda name: name if "/" not in name else None
    )
    target = trained(planned())
    report = sw.convert(tmp_path / "weights.safetensors", tmp_path / "back", target=target)
    assert "ema" in {leaf.kind for leaf in report.kept}
    linen = sw.convert(tmp_path / "run", tmp_path / "linen", to="linen")
    assert {leaf.kind for _, leaf in linen.matched} == {"params"}


def test_a_leaf_of_the_model_at_the_place_of_an_average_is_refused(tmp_path: Path) -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), ema=nnx.Dict(params=nnx.Dict(w=nnx.Variable(jnp.ones(2)))))
    plan = sw.plan(model, averages={"params": sw.EMA(0.5)})
    with refused(
        sw.StructureError,
        "Two leaves have one path, so that a restore could not distinguish them.",
        leaves=["ema/params/w: Variable(2,) float32  kind=variables", "ema/params/w: Array(2,) float32  kind=ema"],
        hint="give the model's attribute 'ema' another name: the plan keeps what it derives there",
    ):
        sw.save(tmp_path / "run", plan.take(model))
