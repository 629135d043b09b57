"""`sw.report` as data: the same as census, memory, lint and diff say, leaf by leaf."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused
from reported import Net, Tracker, abstract
from statewise._src.report.gather import describe_array_placement
from statewise._src.sharding.array_placement import ArrayPlacement

MESH = {"data": 4, "model": 2}


def placed() -> sw.Kinds:
    return sw.Kinds(
        weights=sw.Kind(nnx.Param, placement=sw.Sharded(None, "model")), rest=sw.Kind(..., placement=sw.Replicated())
    )


def linear(features: int = 8) -> nnx.Module:
    return nnx.Linear(4, features, use_bias=False, rngs=nnx.Rngs(0))


def test_a_model_is_reported_as_the_other_instruments_see_it() -> None:
    model = Net()
    report = sw.report(model)
    assert (report.title, report.what) == ("Net", "model")
    assert report.census == sw.census(model)
    assert [one.leaf for one in report.leaves] == list(sw.plan(model).leaves)
    assert report.findings == sw.lint(model)
    assert [finding.code for finding in report.findings or ()] == ["statistic-starts-at-zero", "tied-weights"]
    assert (report.memory, report.diff, report.ok) == (None, None, False)


def test_a_model_without_findings_is_ok() -> None:
    report = sw.report(linear())
    assert report.ok
    assert report.findings == []


def test_several_objects_are_planned_together() -> None:
    model = linear()
    report = sw.report((model, nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)))
    assert report.title == "Linear and Optimizer"
    assert report.leaves[0].leaf.path == (0, "kernel")
    assert report.census["optimizer"].leaves == 2


def test_a_plan_and_a_state_bring_their_kinds_and_optimizers() -> None:
    model = linear()
    plan = placed().plan(model, optimizers={"weights": optax.adam(0.1)})
    for thing, what in ((plan, "plan"), (plan.take(model), "state")):
        report = sw.report(thing)
        assert (report.title, report.what) == (what.capitalize(), what)
        assert report.census == sw.census(plan)
        assert list(report.census) == ["weights", "rest", "optimizer"]


def test_what_an_earlier_sow_left_is_counted_and_said() -> None:
    model = nnx.Dict(weight=nnx.Param(jnp.zeros(3)), seen=nnx.Intermediate(jnp.zeros(5)))
    plan = sw.plan(model)
    report = sw.report(plan)
    assert len(plan.excluded) == 1
    assert report.census.total.leaves == len(report.leaves) == 2
    assert report.leaves[-1].to_dict()["note"] == "left by an earlier sow: not part of a state"


def test_bytes_per_device_add_up_to_what_memory_says() -> None:
    model = Net()
    kinds = sw.Kinds.standard()
    axes = {2: sw.Sharded(None, "model"), 1: sw.Replicated(), 0: sw.Replicated()}
    kinds = kinds.replace(
        params=sw.Kind(kinds["params"].of, placement=lambda path, shape: axes[len(shape)]),
        stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")),
    )
    plan = kinds.plan(model, optimizers={"params": optax.adam(0.1)})
    report = sw.report(plan, mesh=MESH)
    assert report.memory == sw.memory(plan, MESH)
    here: dict[str, int] = {}
    for one in report.leaves:
        here[one.leaf.kind or ""] = here.get(one.leaf.kind or "", 0) + (one.per_device or 0)
    assert here == {one.name: one.per_device for one in report.memory.kinds if one.arrays}
    placements = {sw.format_path(one.leaf.path): one.placement for one in report.leaves}
    assert placements["layers/0/up/kernel"] == "(-, model)"
    assert placements["optimizer/params/0/mu/layers/0/up/kernel"] == "(-, model)"
    assert placements["layers/0/up/bias"] == "replicated"
    assert placements["norm/mean"] == "one per device of data"


def test_a_mesh_of_devices_will_do_as_well(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    assert (
        sw.report(linear(), kinds=placed(), mesh=mesh).leaves == sw.report(linear(), kinds=placed(), mesh=MESH).leaves
    )


@pytest.mark.parametrize(
    ("lies", "ndim", "text"),
    [
        (ArrayPlacement(), 2, "replicated"),
        (ArrayPlacement(((), ())), 2, "replicated"),
        (ArrayPlacement((("data",),)), 3, "(data, -, -)"),
        (ArrayPlacement(((), ("data", "model"))), 2, "(-, data+model)"),
        (ArrayPlacement((), "pinned_host"), 1, "replicated, in pinned_host"),
        (ArrayPlacement((), None, ("data", "model")), 1, "one per device of data+model"),
    ],
)
def test_how_an_array_lies_in_words(lies: ArrayPlacement, ndim: int, text: str) -> None:
    assert describe_array_placement(lies, ndim) == text


def test_what_lies_in_the_hosts_memory_takes_nothing_of_a_device() -> None:
    kinds = sw.Kinds(weights=sw.Kind(nnx.Param, placement=sw.Sharded("data", memory="pinned_host")))
    (one,) = sw.report(linear(), kinds=kinds, mesh=MESH).leaves
    assert (one.placement, one.per_device) == ("(data, -), in pinned_host", 0)


def test_a_leaf_of_several_arrays_says_how_each_lies() -> None:
    model = nnx.Dict(pair=nnx.Param((jnp.zeros((2, 4)), jnp.zeros((2, 4, 6)), jnp.zeros((2, 4)))))
    kinds = sw.Kinds(weights=sw.Kind(nnx.Param, placement=sw.Sharded(None, "data")))
    (one,) = sw.report(model, kinds=kinds, mesh=MESH).leaves
    assert (one.placement, one.per_device) == ("(-, data); (-, data, -)", (8 + 48 + 8) * 4 // 4)


def test_another_is_compared() -> None:
    one, other = Net(), Net()
    other.layers[3].up.kernel[...] += 0.5
    report = sw.report(one, other)
    assert report.diff == sw.diff(one, other)
    assert [sw.format_path(leaf.leaf.path) for leaf in report.diff.leaves] == ["layers/3/up/kernel"]
    assert not report.ok
    assert sw.report(linear(), linear()).ok


def test_a_model_beside_a_plan_is_planned_by_its_kinds() -> None:
    model = linear()
    report = sw.report(model, placed().plan(model))
    assert list(report.census) == ["weights", "rest"]
    assert not report.diff


def test_a_checkpoint_is_reported_without_reading_an_array(tmp_path: Path) -> None:
    model = Net()
    state = sw.plan(model, optimizers={"params": optax.adam(0.1)}).take(model)
    sw.save(tmp_path / "first", state)
    report = sw.report(tmp_path / "first")
    assert (report.title, report.what) == (str(tmp_path / "first"), "checkpoint")
    assert report.census == sw.inspect(tmp_path / "first")
    assert report.findings is None
    assert report.ok
    kept = [leaf for leaf in state.plan.leaves if leaf.kind != "cache"]
    assert [(one.leaf.path, one.leaf.kind, one.leaf.shape) for one in report.leaves] == [
        (leaf.path, leaf.kind, leaf.shape) for leaf in kept
    ]
    assert {one.leaf.aliases for one in report.leaves} == {(), (("tied", "embedding"),)}
    tracker = next(one for one in report.leaves if one.leaf.path == ("seen",))
    assert tracker.to_dict()["type"] == Tracker.__name__


def test_a_checkpoint_beside_a_model_and_beside_another(tmp_path: Path) -> None:
    model = linear()
    sw.save(tmp_path / "first", sw.plan(model).take(model))
    model.kernel[...] += 1
    sw.save(tmp_path / "second", sw.plan(model).take(model))
    for other in (model, tmp_path / "second"):
        (change,) = sw.report(tmp_path / "first", other).diff.leaves
        assert change.what == ("value",)


def test_files_of_others_are_reported_too(tmp_path: Path) -> None:
    model = linear()
    sw.save(tmp_path / "first", sw.plan(model).take(model))
    sw.convert(tmp_path / "first", tmp_path / "first.safetensors")
    report = sw.report(tmp_path / "first.safetensors")
    assert [(one.leaf.path, one.leaf.kind, one.leaf.nbytes) for one in report.leaves] == [(("kernel",), "params", 128)]


def test_the_data_is_json_made_of_what_the_parts_give() -> None:
    model, other = Net(), linear()
    report = sw.report(model, other, mesh=MESH)
    data = json.loads(report.to_json())
    assert data["total"] == sw.census(model).to_dict()["total"]
    assert data["memory"] == sw.memory(sw.plan(model), MESH).to_dict()
    assert data["diff"] == json.loads(sw.diff(model, other).to_json())
    assert data["findings"] == sw.lint(model).to_dict()["findings"]
    assert data["versions"]["jax"] == jax.__version__
    assert data["leaves"][0] == {
        "path": "embed/embedding",
        "kind": "params",
        "type": "Param",
        "shape": [50, 16],
        "dtype": "float32",
        "aliases": ["tied/embedding"],
        "size": 800,
        "nbytes": 3200,
        "placement": "replicated",
        "per_device": 3200,
    }


def test_it_prints_as_a_census_that_says_the_rest_above() -> None:
    model, other = linear(), linear(16)
    lines = str(sw.report(model, other, mesh=MESH)).splitlines()
    assert lines[0] == (
        "report of Linear: 1 leaf, 128 B, 128 B on each of 8 devices, 0 findings, 1 leaf differs from a model (Linear)"
    )
    assert lines[1:] == str(sw.census(model)).splitlines()[1:]


def test_an_abstract_model_of_any_size() -> None:
    report = sw.report(abstract({"huge": (1 << 20, 1 << 20)}, jnp.bfloat16), mesh={"data": 1024})
    assert report.leaves[0].leaf.nbytes == report.leaves[0].per_device == 1 << 41


def test_kinds_where_there_is_no_model_are_refused() -> None:
    model = linear()
    plan = sw.plan(model)
    message = "Only models are planned by `kinds`; plans, states and checkpoints have their own."
    with refused(sw.DeclarationError, message, hint="sw.report(target)"):
        sw.report(plan, kinds=placed())
    with refused(sw.DeclarationError, message, hint="sw.report(target)"):
        sw.report("run/step_1", plan, kinds=placed())


def test_a_mesh_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with refused(
        sw.DeclarationError,
        "A checkpoint is not on a mesh; a plan says how its leaves are placed.",
        hint="sw.report(plan, path, mesh=mesh)",
    ):
        sw.report(tmp_path, mesh=MESH)


def test_leaves_that_no_kind_claims_are_all_named() -> None:
    with pytest.raises(sw.UnclaimedError) as caught:
        sw.report(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), kinds=sw.Kinds(stats=sw.Kind(nnx.BatchStat)))
    assert [sw.format_path(leaf.path) for leaf in caught.value.leaves] == ["bias", "kernel"]
