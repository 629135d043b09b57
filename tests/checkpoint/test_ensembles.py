"""Ensembles in checkpoints: back to the bit, and into other ensembles by declaration alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import statewise as sw
from stacked_models import AVERAGES, KINDS, OPTIMIZERS, PLAN, X, Y, keys, make, same, states_of, trained

# --- back as it was ----------------------------------------------------------------------------------------------


def ensemble_of(members: int, seed: int = 0, plan: sw.Plan = PLAN) -> sw.State:
    return plan.stacked(members).stack(states_of(members, seed, plan=plan))


def kept(state: sw.State) -> dict[str, Any]:
    return {kind: state[kind] for kind, one in state.plan.kinds.items() if one.saved}


@given(
    st.integers(1, 4),
    st.sampled_from(("named", "packed")),
    st.booleans(),
    st.fixed_dictionaries({}, optional={kind: st.sampled_from((-1, None)) for kind in ("params", "stats", "rng")}),
)
@settings(max_examples=8)
def test_save_and_restore_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, members: int, layout: str, pack: bool, axes: dict[str, Any]
) -> None:
    plan = PLAN.stacked(members, **axes)
    shared = [kind for kind, axis in axes.items() if axis is None]
    shared += ["optimizer", "ema"] if "params" in shared else []
    first, *others = states_of(members, pack=pack)
    others = [one.replace(**{kind: first[kind] for kind in shared}) for one in others]
    states = plan.stack([first, *others])
    path = tmp_path_factory.mktemp("kept") / "states"
    sw.save(path, states, layout=layout)
    back, report = sw.restore(path, states)
    same(kept(back), kept(states))
    assert back.plan is states.plan
    assert set(report.counts["params"]) == {"restored"}
    assert not sw.diff(path, back)
    assert sw.preview(path, plan.abstract()).ok


def test_a_run_of_an_ensemble_goes_on_where_it_was(tmp_path: Path) -> None:
    states, _ = trained(ensemble_of(4), X, Y)
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, states)
        wanted, losses = trained(states, X, Y)
        states, report, step, _ = checkpoints.restore(PLAN.stacked(4).abstract())
        assert (report.ok, step, checkpoints.inspect().members) == (True, 1, 4)
        one = checkpoints.restore(PLAN.abstract(), members=2).state
        same(kept(one), kept(states.member(2)))
        assert checkpoints.preview(PLAN.abstract(), members=2).ok
    again, same_losses = trained(states, X, Y)
    same(kept(again), kept(wanted))
    same(same_losses, losses)


def test_an_ensemble_in_a_manager_of_orbax(tmp_path: Path) -> None:
    states = ensemble_of(3)
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        manager.save(1, args=ocp.args.Composite(state=sw.checkpointable(states)))
        manager.wait_until_finished()
        into = sw.checkpointable(PLAN.abstract(), members=1)
        back = manager.restore(1, args=ocp.args.Composite(state=into))["state"]
    same(kept(back), kept(states.member(1)))


def test_what_the_manifest_says(tmp_path: Path) -> None:
    sw.save(tmp_path / "a", PLAN.stacked(3, stats=1, rng=None).stack([states_of(1)[0].replace(**{}) for _ in range(3)]))
    content = json.loads((tmp_path / "a" / "statewise.json").read_text())["content"]
    found = {one["path"][-1]: one["arrays"][0]["placement"] for one in content["leaves"] if one["kind"] != "optimizer"}
    assert found["mean"] == {"members": {"number": 3, "axis": 1}}
    assert found["steps"] == {"members": {"number": 3, "axis": 0}}
    assert found["key"] is None
    assert str(sw.inspect(tmp_path / "a")).startswith("census of an ensemble of 3\n")
    assert sw.report(tmp_path / "a").census.members == 3


def test_an_ensemble_on_a_mesh_comes_back_onto_it(tmp_path: Path, devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((2, 4), ("members", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = KINDS.replace(stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("model", resize="mean")))
    plan = placed.plan(make(keys(1)[0]), optimizers=OPTIMIZERS, averages=AVERAGES)
    states = plan.stacked(4, over="members").stack([plan.take(make(key), mesh=mesh) for key in keys(4)])
    assert states["stats"]["norm"]["mean"].shape == (4, 4, 4)
    sw.save(tmp_path / "a", states)
    back, report = sw.restore(tmp_path / "a", states.plan.abstract(mesh))
    assert {one.outcome for one in report["stats"]} == {"restored"}
    same(kept(back), kept(states))
    assert tuple(back["params"]["dense"]["kernel"].sharding.spec) == ("members",)
    other = jax.make_mesh((2, 2), ("members", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices[:4])
    fewer, report = sw.restore(tmp_path / "a", plan.stacked(4, over="members").abstract(other))
    assert {one.outcome for one in report["stats"]} == {"resized"}
    assert fewer["stats"]["norm"]["mean"].shape == (4, 2, 4)
    np.testing.assert_array_equal(fewer["stats"]["norm"]["mean"][:, 0], states["stats"]["norm"]["mean"].mean(1))


def test_over_explicit_axes_what_restarts_restarts_too(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("members", "model"), axis_types=(AxisType.Explicit,) * 2)
    states = PLAN.stacked(4, over="members").stack([PLAN.take(make(key), mesh=mesh) for key in keys(4)])
    sw.save(tmp_path / "a", states)
    back, report = sw.restore(tmp_path / "a", states.plan.abstract(mesh))
    assert {one.outcome for one in report["cache"]} == {"restarted"}
    same(kept(back), kept(states))
    again = states.restart("cache")
    same(again["cache"], back["cache"])


# --- other members, by declaration -------------------------------------------------------------------------------


def test_some_members_into_a_smaller_ensemble_and_into_one_model(tmp_path: Path) -> None:
    states = ensemble_of(4)
    sw.save(tmp_path / "a", states)
    two, report = sw.restore(tmp_path / "a", PLAN.stacked(2).abstract(), members=[3, 1])
    same(kept(two.member(0)), kept(states.member(3)))
    same(kept(two.member(1)), kept(states.member(1)))
    assert {(one.outcome, one.why) for one in report["params"]} == {("regrouped", "members 3, 1 of 4")}
    one, report = sw.restore(tmp_path / "a", PLAN.abstract(), members=-1)
    same(kept(one), kept(states.member(3)))
    assert {one.why for one in report["rng"]} == {"member 3 of 4"}
    half = PLAN.take(make(keys(1)[0])).cast(params="bfloat16")
    cast, _ = sw.restore(tmp_path / "a", half, members=2, cast=True, only="params")
    same(cast["params"], states.member(2).cast(params="bfloat16")["params"])


@pytest.mark.parametrize("members", [{0: 2, 1: 0}, {2, 0}, {2: 0, 0: 1}.keys()], ids=str)
def test_members_come_in_an_order(tmp_path: Path, members: Any) -> None:
    """Of a dict the keys would be taken for members, and of a set whatever comes first."""
    sw.save(tmp_path / "a", ensemble_of(4))
    for into in (PLAN.stacked(2).abstract(), PLAN.abstract()):
        with pytest.raises(sw.RestoreError, match=r"members=.* has no order") as caught:
            sw.restore(tmp_path / "a", into, members=members)
        assert "members=" in (caught.value.hint or "")


def test_into_a_larger_ensemble_the_rest_is_kept_where_it_is_said(tmp_path: Path) -> None:
    states, into = ensemble_of(2), ensemble_of(4, seed=9)
    sw.save(tmp_path / "a", states)
    larger, report = sw.restore(tmp_path / "a", into, members=[None, 1, 0, None])
    for number, wanted in enumerate((into.member(0), states.member(1), states.member(0), into.member(3))):
        same(kept(larger.member(number)), kept(wanted))
    assert {one.why for one in report["stats"]} == {"members 1, 0 of 2; 0, 3 kept"}


def declared(missing: str) -> sw.Plan:
    kinds = {
        name: dataclasses.replace(
            kind, missing=missing, restart=None if kind.of is sw.EMA or missing == "keep" else jnp.zeros_like
        )
        if name != "rng"
        else dataclasses.replace(kind, missing="keep")
        for name, kind in PLAN.kinds.items()
        if kind.saved
    }
    rest = {name: kind for name, kind in PLAN.kinds.items() if name not in kinds}
    return sw.Kinds(**kinds, **rest).plan(make(keys(1)[0]), optimizers=OPTIMIZERS, averages=AVERAGES)


def test_a_larger_ensemble_by_what_the_kinds_say_of_what_is_missing(tmp_path: Path) -> None:
    states = ensemble_of(2)
    sw.save(tmp_path / "a", states)
    keep = declared("keep")
    into = ensemble_of(3, seed=9, plan=keep)
    larger, _ = sw.restore(tmp_path / "a", into)
    for number, wanted in enumerate((states.member(0), states.member(1), into.member(2))):
        same(jax.tree.leaves(kept(larger.member(number))), jax.tree.leaves({k: wanted[k] for k in kept(into)}))
    restart = declared("restart")
    into = ensemble_of(3, seed=9, plan=restart)
    larger, report = sw.restore(tmp_path / "a", into)
    same(larger.member(0)["params"], states.member(0)["params"])
    assert not any(np.asarray(array).any() for array in jax.tree.leaves(larger.member(2)["params"]))
    same(larger.member(2)["ema"]["params"], larger.member(2)["params"])
    same(larger.member(1)["ema"], states.member(1)["ema"])
    assert {one.why for one in report["params"]} == {"members 0, 1 of 2; 2 restarted"}


def test_a_model_into_one_member_or_without_its_streams_into_all(tmp_path: Path) -> None:
    model, into = states_of(1)[0], ensemble_of(3, seed=9)
    sw.save(tmp_path / "a", model)
    one, _ = sw.restore(tmp_path / "a", into, members=[None, 0, None])
    same(kept(one.member(1)), kept(model))
    same(kept(one.member(2)), kept(into.member(2)))
    every, _ = sw.restore(tmp_path / "a", into, members=[0] * 3, only=("params", "stats", "optimizer"))
    for number in range(3):
        same(every.member(number)["params"], model["params"])
        same(every.member(number)["rng"], into.member(number)["rng"])


def test_objects_stacked_by_nnx_and_planned_as_one_model_are_the_same_arrays(tmp_path: Path) -> None:
    stacked = nnx.vmap(make)(keys(3))
    plain, ensemble = KINDS.plan(stacked), KINDS.plan(make(keys(1)[0])).stacked(3)
    sw.save(tmp_path / "a", plain.take(stacked))
    states, _ = sw.restore(tmp_path / "a", ensemble.abstract())
    same(kept(states), kept(ensemble.take(stacked)))
    sw.save(tmp_path / "b", states)
    back, _ = sw.restore(tmp_path / "b", plain.abstract())
    assert not sw.diff(back, states)


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "fact", "hint"),
    [
        (PLAN, {}, "is an ensemble of 3 in the checkpoint", "one of its members: sw.restore(path, target, members=0)"),
        (
            PLAN.stacked(2),
            {},
            "is an ensemble of 3 in the checkpoint",
            "say which of them: sw.restore(path, target, members=[0, 1])",
        ),
        (
            PLAN.stacked(4),
            {},
            "is an ensemble of 3 in the checkpoint",
            "say which of them: sw.restore(path, target, members=[0, 1, 2, None])"
            "  # None: the target's own member, which has to have values",
        ),
        (
            PLAN.stacked(4),
            {"members": [0, 1, 2, None]},
            "members 3 are not in the checkpoint, and the target is abstract: it has no value to keep",
            "restore into a state with values: sw.restore(path, plan.take(model), members=[0, 1, 2, None])",
        ),
        (
            PLAN.stacked(3, params=1),
            {},
            "is an ensemble along axis 0 in the checkpoint",
            "the axis that it was saved with: plan.stacked(3, params=0)",
        ),
        (
            PLAN.stacked(3, params=None),
            {"members": [2, 1, 0]},
            "is a value for each of 3 members in the checkpoint",
            "give each member its own here too: plan.stacked(3, params=0)",
        ),
    ],
)
def test_other_members_are_not_guessed(
    tmp_path: Path, target: sw.Plan, options: dict[str, Any], fact: str, hint: str
) -> None:
    sw.save(tmp_path / "a", ensemble_of(3))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "a", target.abstract(), only=("params", "stats"), **options)
    assert fact in {leaf.note for leaf in caught.value.leaves if leaf.kind == "params"}
    assert hint.replace("target", "target") in (caught.value.hint or "") or "only=" in (caught.value.hint or "")


def test_one_stream_does_not_go_into_several_members(tmp_path: Path) -> None:
    sw.save(tmp_path / "a", ensemble_of(3))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "a", PLAN.stacked(2).abstract(), members=[1, 1])
    (leaf,) = caught.value.leaves
    assert str(leaf) == (
        "drop/rngs/key: RngKey(2,) key<threefry2x32>  kind=rng  "
        "(is one random stream for several members, which would draw the same noise, in the checkpoint)"
    )
    assert caught.value.hint == (
        "restore the kinds without random streams, into a state that has its own: only=('params', 'stats')"
    )


@pytest.mark.parametrize(
    ("target", "members", "message", "hint"),
    [
        (PLAN, [1], "members=[1] does not fit a target that is one model.", "members=0"),
        (PLAN.stacked(3), 1, "members=1 does not fit a target that is an ensemble of 3.", "members=[0, 1, 2]"),
        (
            PLAN.stacked(3),
            [1],
            "members= names 1 members, and the target is an ensemble of 3.",
            "members=[0, 1, 2]  # for each member of the target that of the checkpoint, or None",
        ),
        (
            PLAN.stacked(2),
            [0, 7],
            "The checkpoint is of an ensemble of 3: it has no member 7.",
            "members=[0, 1]",
        ),
        (PLAN, True, "The checkpoint is of an ensemble of 3: it has no member True.", "members=0"),
        (PLAN, 0.5, "The checkpoint is of an ensemble of 3: it has no member 0.5.", "members=0"),
    ],
)
def test_members_that_are_none(tmp_path: Path, target: sw.Plan, members: Any, message: str, hint: str) -> None:
    sw.save(tmp_path / "a", ensemble_of(3))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "a", target.abstract(), members=members)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_manifest_whose_members_do_not_fit_is_corrupted(tmp_path: Path) -> None:
    import hashlib

    from statewise._src.checkpoint.format.manifest import content_text

    sw.save(tmp_path / "a", ensemble_of(2))
    file = tmp_path / "a" / "statewise.json"
    whole = json.loads(file.read_text())
    for wrong in (
        {"number": 3, "axis": 0},
        {"number": 2, "axis": 9},
        {"number": 2},
        [2, 0],
        {"number": True, "axis": 0},
    ):
        content = json.loads(json.dumps(whole["content"]))
        content["leaves"][0]["arrays"][0]["placement"] = {"members": wrong}
        text = content_text(content)
        digest = hashlib.sha256(text.encode()).hexdigest()
        file.write_text(f'{{"statewise":1,"sha256":"{digest}","content":{text}}}\n')
        with pytest.raises(sw.CorruptedError, match="an array does not have a value for each member"):
            sw.inspect(tmp_path / "a")
