"""Per-device values in checkpoints: all of them are kept; onto other devices goes what was declared, or nothing."""

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
from disagreeing import check_refused
from large_states import assert_same, bits
from meshes import by_key
from signing import content_of, corrupted, rewritten


class Net(nnx.Module):
    """Statistics and random streams, each device with its own."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Cache(jnp.zeros((2, 3)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.up(x)))


def mesh_of(devices: int) -> jax.sharding.Mesh:
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=kinds, devices=jax.devices()[:devices])


def plan_of(stats: str = "error", rng: str = "error", cache: sw.Kind | None = None) -> sw.Plan:
    kinds = sw.Kinds.standard().replace(
        stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data", resize=stats)),
        rng=sw.Kind(nnx.RngState, placement=sw.PerDevice("data", resize=rng)),
    )
    kinds = kinds.replace(cache=cache) if cache else kinds
    return kinds.plan(Net(), optimizers={"params": optax.adam(1e-2)})


@sw.train_step
def train(model: Net, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


@pytest.fixture(scope="module")
def trained() -> sw.State:
    """A state on four devices, whose statistics differ from device to device."""
    state, _ = train(plan_of().take(Net(), mesh=mesh_of(4)), jax.random.normal(jax.random.key(1), (32, 4)))
    mean = np.asarray(state["stats"]["norm"]["mean"])
    assert not np.array_equal(mean[0], mean[1])
    return state


@pytest.fixture(scope="module")
def folder(trained: sw.State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("devices") / "saved"
    sw.save(path, trained)
    return path


@pytest.mark.parametrize("layout", ["named", "packed"])
def test_the_values_of_all_devices_come_back(tmp_path: Path, trained: sw.State, layout: str) -> None:
    sw.save(tmp_path / "saved", trained, layout=layout)
    for target in (trained, plan_of().abstract(mesh_of(4))):
        restored, report = sw.restore(tmp_path / "saved", target)
        assert {name for counts in report.counts.values() for name in counts} <= {"restored", "kept", "restarted"}
        saved = [kind for kind in trained.plan.kinds if trained.plan.kinds[kind].saved]
        for kind in saved:
            assert_same(restored[kind], trained[kind])
            for one, other in zip(*map(jax.tree.leaves, (restored[kind], trained[kind])), strict=True):
                assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_training_goes_on_as_if_nothing_had_happened(folder: Path, trained: sw.State) -> None:
    x = jax.random.normal(jax.random.key(2), (32, 4))
    restored, _ = sw.restore(folder, plan_of().abstract(mesh_of(4)))
    on, expected = train(jax.tree.map(jnp.copy, trained), x)
    back, found = train(restored, x)
    np.testing.assert_array_equal(found, expected)
    assert_same(back["stats"], on["stats"])


def test_the_manifest_says_how_many_devices(folder: Path) -> None:
    leaves = {leaf["path"][-1]: leaf for leaf in content_of(folder)["leaves"] if leaf["kind"] == "stats"}
    array = leaves["mean"]["arrays"][0]
    assert array["shape"] == [4, 3]
    assert array["placement"] == {"per_device": 4, "mesh": {"data": 4}, "spec": ["data"]}


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("how", ["mean", "first"])
def test_onto_other_devices_each_gets_what_was_declared(
    folder: Path, trained: sw.State, how: str, devices: int
) -> None:
    target = plan_of(stats=how, rng="first").abstract(mesh_of(devices))
    restored, report = sw.restore(folder, target)
    assert report.counts["stats"] == {"resized": 2}
    assert report["stats"][0].why == f"the {how} of 4 devices' values, on each of {devices}"
    folded = trained.reduce_devices("stats", how=how)
    for name in ("mean", "var"):
        found = restored["stats"]["norm"][name]
        one = np.asarray(folded["stats"]["norm"][name])
        np.testing.assert_allclose(found, np.broadcast_to(one, (devices, 3)), rtol=1e-6)
        assert len(found.sharding.device_set) == devices
    assert_same(restored["params"], trained["params"])
    train(restored, jnp.ones((8, 4)))


def test_keys_of_other_devices_all_differ(folder: Path) -> None:
    restored, report = sw.restore(folder, plan_of("mean", "first").abstract(mesh_of(8)))
    assert report["rng"][1].why == "the first of 4 devices' values, on each of 8, folded in with their numbers"
    assert len(np.unique(bits(restored["rng"]["drop"]["rngs"]["key"]), axis=0)) == 8
    np.testing.assert_array_equal(restored["rng"]["drop"]["rngs"]["count"], np.ones(8))


def test_one_value_goes_to_each_device(tmp_path: Path) -> None:
    state, _ = train(sw.plan(Net(), optimizers={"params": optax.adam(1e-2)}).take(Net()), jnp.ones((8, 4)))
    sw.save(tmp_path / "single", state)
    restored, report = sw.restore(tmp_path / "single", plan_of().abstract(mesh_of(2)))
    assert report["stats"][0].outcome == "resized"
    assert report["stats"][0].why == "one value, on each of 2 devices"
    expected = np.broadcast_to(np.asarray(state["stats"]["norm"]["mean"]), (2, 3))
    np.testing.assert_array_equal(restored["stats"]["norm"]["mean"], expected)


def test_values_are_cast_and_resized_at_once(folder: Path) -> None:
    target = plan_of("mean", "first").abstract(mesh_of(2)).cast(stats="bfloat16")
    restored, _ = sw.restore(folder, target, cast=True)
    assert restored["stats"]["norm"]["mean"].dtype == jnp.bfloat16
    assert restored["stats"]["norm"]["mean"].shape == (2, 3)


def test_a_restart_in_a_restore_is_each_devices_own(folder: Path) -> None:
    each = sw.Kind(nnx.Cache, saved=False, restart=lambda array: array + array.shape[0], placement=sw.PerDevice("data"))
    restored, report = sw.restore(folder, plan_of(cache=each).abstract(mesh_of(4)))
    assert report.counts["cache"] == {"restarted": 1}
    np.testing.assert_array_equal(restored["cache"]["seen"], np.full((4, 2, 3), 2.0))


# --- refused -----------------------------------------------------------------------------------------------------


def test_without_a_declaration_other_devices_are_refused(folder: Path, trained: sw.State) -> None:
    why = "(is one value for each of 4 devices in the checkpoint)"
    check_refused(
        folder,
        trained,
        plan_of(rng="first").take(Net(), mesh=mesh_of(2)),
        f"norm/mean: BatchStat(2, 3) float32  kind=stats  {why}",
        f"norm/var: BatchStat(2, 3) float32  kind=stats  {why}",
        hint="declare what happens to them: stats=sw.Kind(..., placement=sw.PerDevice('data', resize='mean'))",
    )


def test_what_has_no_mean_is_refused(folder: Path, trained: sw.State) -> None:
    why = "(is one value without a mean for each of 4 devices in the checkpoint)"
    check_refused(
        folder,
        trained,
        plan_of("mean", "mean").take(Net(), mesh=mesh_of(2)),
        f"drop/rngs/count: RngCount(2,) uint32  kind=rng  {why}",
        f"drop/rngs/key: RngKey(2,) key<threefry2x32>  kind=rng  {why}",
        hint="sw.PerDevice('data', resize='first')",
    )


def test_one_value_cannot_be_made_of_several_by_itself(folder: Path, trained: sw.State) -> None:
    why = "(is one value for each of 4 devices in the checkpoint)"
    how = "with placement=sw.PerDevice(...): sw.restore(path, plan.abstract(mesh)), then state.reduce_devices({!r})"
    check_refused(
        folder,
        trained,
        sw.plan(Net(), optimizers={"params": optax.adam(1e-2)}).take(Net()),
        f"drop/rngs/count: RngCount() uint32  kind=rng  {why}",
        f"drop/rngs/key: RngKey() key<threefry2x32>  kind=rng  {why}",
        f"norm/mean: BatchStat(3,) float32  kind=stats  {why}",
        f"norm/var: BatchStat(3,) float32  kind=stats  {why}",
        hint=f"{how.format('rng')}\n{how.format('stats')}",
    )


def test_values_of_another_shape_are_refused_as_ever(folder: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nnx.BatchNorm(5, rngs=nnx.Rngs(0))

    kinds = plan_of("mean", "first").kinds
    target = kinds.plan(Wider(), optimizers={"params": optax.adam(1e-2)}).abstract(mesh_of(2))
    assert "norm/mean: BatchStat(2, 5) float32  kind=stats  (is (4, 3) in the checkpoint)" in map(
        str, sw.preview(folder, target).problems
    )


@pytest.mark.parametrize("devices", [3, "4", True, -4, None, [4]])
def test_a_manifest_that_lies_about_its_devices_is_refused(tmp_path: Path, trained: sw.State, devices: Any) -> None:
    sw.save(tmp_path / "saved", trained)

    def change(content: Any) -> None:
        for leaf in content["leaves"]:
            if leaf["kind"] == "stats":
                leaf["arrays"][0]["placement"]["per_device"] = devices

    rewritten(tmp_path / "saved", change)
    with corrupted(tmp_path / "saved", "an array does not have a value for each device"):
        sw.restore(tmp_path / "saved", trained)


def test_a_diff_shows_the_devices(trained: sw.State) -> None:
    folded = trained.reduce_devices("stats", how="mean")
    assert [line.split()[:6] for line in str(sw.diff(trained, folded)).splitlines() if "norm/mean" in line] == [
        ["norm/mean", "stats", "shape", "(4,", "3)", "to"]
    ]


def test_a_folded_state_is_saved_as_any_other(tmp_path: Path, trained: sw.State) -> None:
    folded = trained.reduce_devices("stats", how="mean").reduce_devices("rng", how="first")
    sw.save(tmp_path / "folded", folded)
    restored, _ = sw.restore(tmp_path / "folded", folded)
    assert_same(restored, folded)


def test_a_placement_function_is_asked_as_it_was_when_the_state_was_taken(tmp_path: Path) -> None:
    """Of several objects relative to each, and with the keys within a Variable's value."""

    def place(path: Any, shape: Any) -> sw.PerDevice:
        return sw.PerDevice("data", resize="first" if path[0] == "m" or path[-1] == "own" else "mean")

    def objects() -> tuple[nnx.Dict, nnx.Dict]:
        value = {"own": jnp.zeros(2), "other": jnp.zeros(2)}
        return nnx.Dict(m=nnx.BatchStat(jnp.zeros(2))), nnx.Dict(d=nnx.BatchStat(value))

    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=place))
    plan = kinds.plan(*objects())
    state = plan.take(*objects(), mesh=mesh_of(4))
    numbered = jnp.broadcast_to(jnp.arange(4.0)[:, None], (4, 2))
    state = jax.tree.map(lambda array: jax.device_put(numbered, array.sharding), state)
    sw.save(tmp_path / "saved", state)
    restored, _ = sw.restore(tmp_path / "saved", plan.abstract(mesh_of(2)))
    found = {key.split("/", 2)[-1]: float(value[0, 0]) for key, value in by_key(restored).items()}
    assert found == {"m": 0.0, "d": 1.5, "d#2": 0.0}  # of `d` first `other`, then `own`


@pytest.mark.parametrize("placement", [sw.PerDevice("data"), sw.Sharded("data")], ids=["each", "split"])
def test_arrays_without_elements_are_saved_wherever_they_lie(tmp_path: Path, placement: Any) -> None:
    model = nnx.Dict(none=nnx.BatchStat(jnp.zeros((8, 0))), some=nnx.BatchStat(jnp.ones((8, 2))))
    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=placement))
    state = kinds.plan(model).take(model, mesh=mesh_of(8))
    sw.save(tmp_path / "saved", state)
    restored, _ = sw.restore(tmp_path / "saved", state)
    assert_same(restored, state)
