"""Orbax's own side: it reads what Statewise writes, and takes a state as an item beside others."""

from __future__ import annotations

import asyncio
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
import pytest
from flax import nnx

import statewise as sw
from checkpoint_models import (
    as_plain_tree,
    assert_identical,
    bits,
    contents,
    copied,
    mixed,
    one_of,
    spread,
    taken,
    train,
    trained,
)
from refusals import refused

# Orbax warns where it is not told where arrays are to lie.
unplaced = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")


def assert_equal_trees(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.map(bits, one) == jax.tree.map(bits, other)


# --- plain Orbax reads it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("plain") / "saved"
    sw.save(path, mixed())
    return path


def test_orbax_s_standard_checkpointer_reads_each_leaf_under_its_own_path(saved: pathlib.Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal_trees(checkpointer.restore(saved), as_plain_tree(mixed()))


@unplaced
def test_orbax_s_tree_checkpointer_reads_it(saved: pathlib.Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_equal_trees(checkpointer.restore(saved), as_plain_tree(mixed()))


@unplaced
@pytest.mark.parametrize("options", [{}, {"checkpointable_name": None}], ids=str)
def test_orbax_s_newer_interface_reads_it(saved: pathlib.Path, options: dict[str, Any]) -> None:
    assert v1.is_orbax_checkpoint(saved)
    assert_equal_trees(v1.load(saved, **options), as_plain_tree(mixed()))


def test_orbax_reads_it_into_another_placement(tmp_path: pathlib.Path, devices: list[jax.Device]) -> None:
    state = taken({"a": jnp.arange(16.0)})
    sw.save(tmp_path / "saved", state)
    sharding = spread(state, devices)["variables"]["leaves"]["a"].sharding
    target = {"leaves": {"a": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}}
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path / "saved", target)["leaves"]["a"]
    assert read.sharding == sharding
    assert bits(read) == bits(jnp.arange(16.0))


def test_what_orbax_has_no_dtype_for_it_reads_as_words_and_bytes(tmp_path: pathlib.Path) -> None:
    key, floats = jax.random.key(3), one_of("float8_e3m4")
    sw.save(tmp_path / "saved", taken({"key": key, "floats": floats}))
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path / "saved")["leaves"]
    assert bits(read["key"]) == bits(jax.random.key_data(key))
    assert bits(read["floats"].view(floats.dtype)) == bits(floats)


# --- an item of a manager ----------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def manager(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Any:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=request.param)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as made:
        yield made


def save_items(manager: Any, step: int, **items: Any) -> None:
    assert manager.save(step, args=ocp.args.Composite(**items))


def test_a_state_is_an_item_beside_metrics_and_a_tree(manager: Any) -> None:
    state, tree = trained(), {"x": np.arange(3)}
    metrics, more = ocp.args.JsonSave({"loss": 0.5}), ocp.args.StandardSave(tree)
    save_items(manager, 1, state=sw.checkpointable(state), metrics=metrics, tree=more)
    manager.wait_until_finished()
    items = {"metrics": ocp.args.JsonRestore(), "tree": ocp.args.StandardRestore()}
    target = sw.checkpointable(trained(1))
    assert target.report is None
    back = manager.restore(1, args=ocp.args.Composite(state=target, **items))
    assert_identical(back["state"], state)
    assert (back["metrics"], back["tree"]["x"].tolist()) == ({"loss": 0.5}, [0, 1, 2])
    assert target.state is back["state"]
    assert target.report is not None
    assert target.report.ok
    assert {outcome for count in target.report.counts.values() for outcome in count} == {"restored"}


def test_one_item_is_restored_by_itself(manager: Any) -> None:
    state = trained()
    save_items(manager, 1, state=sw.checkpointable(state), metrics=ocp.args.JsonSave({"loss": 0.5}))
    manager.wait_until_finished()
    target = sw.checkpointable(state.plan.abstract())
    assert_identical(manager.restore(1, args=ocp.args.Composite(state=target))["state"], state)
    assert manager.restore(1, args=ocp.args.Composite(metrics=ocp.args.JsonRestore()))["metrics"] == {"loss": 0.5}


def test_two_states_are_two_items(manager: Any) -> None:
    """A moving average beside the model: each has its own manifest."""
    state, average = trained(), taken({"a": jnp.arange(3.0)})
    for step in (1, 2):
        save_items(manager, step, state=sw.checkpointable(state), average=sw.checkpointable(average, layout="packed"))
    manager.wait_until_finished()
    items = {"state": sw.checkpointable(trained(1)), "average": sw.checkpointable(average.plan.abstract())}
    back = manager.restore(2, args=ocp.args.Composite(**items))
    assert_identical(back["state"], state)
    assert_identical(back["average"], average)


def test_an_item_may_be_some_kinds_only(manager: Any) -> None:
    state = trained()
    save_items(manager, 1, state=sw.checkpointable(state, only=("params", "stats")))
    manager.wait_until_finished()
    counts = sw.inspect(pathlib.Path(manager.directory) / "1" / "state")
    assert {kind: counts[kind].leaves for kind in ("params", "stats", "rng", "optimizer")} == {
        "params": 5,
        "stats": 2,
        "rng": 0,
        "optimizer": 0,
    }
    target = sw.checkpointable(trained(1), only="params")
    manager.restore(1, args=ocp.args.Composite(state=target))
    assert_identical(target.state, copied(trained(1)).replace(params=state["params"]))


def test_an_item_restores_into_another_dtype_where_it_may(manager: Any) -> None:
    state = trained()
    save_items(manager, 1, state=sw.checkpointable(state))
    manager.wait_until_finished()
    half = state.cast(params="bfloat16")
    target = sw.checkpointable(half, cast=True)
    assert_identical(manager.restore(1, args=ocp.args.Composite(state=target))["state"], half)
    assert target.report is not None
    assert target.report.counts["params"] == {"cast": 5}


def test_an_item_can_be_read_with_sw_restore(manager: Any) -> None:
    state = trained()
    save_items(manager, 3, state=sw.checkpointable(state))
    manager.wait_until_finished()
    restored, _ = sw.restore(pathlib.Path(manager.directory) / "3" / "state", state.plan.abstract())
    assert_identical(restored, state)


@pytest.mark.parametrize("layout", ["named", "packed"])
def test_what_was_donated_right_after_the_call_is_saved_as_it_was(manager: Any, layout: str) -> None:
    """Values and checksums are those at the time of the call, however long the write takes."""
    state = trained()
    kept = copied(state)
    for batch in range(3):
        save_items(manager, batch, state=sw.checkpointable(state, layout=layout))
        state, _ = train(state, jnp.full((5, 3), float(batch)))
    manager.wait_until_finished()
    assert_identical(manager.restore(0, args=ocp.args.Composite(state=sw.checkpointable(kept)))["state"], kept)
    assert manager.all_steps() == [0, 1, 2]


def test_large_arrays_donated_right_after_the_call_are_saved_as_they_were(
    manager: Any, devices: list[jax.Device]
) -> None:
    donate = jax.jit(lambda array: -array, donate_argnums=0)
    for step, state in enumerate(
        (taken({"a": jnp.arange(1 << 18)}), spread(taken({"a": jnp.arange(1 << 18)}), devices))
    ):
        kept = copied(state)
        save_items(manager, step, state=sw.checkpointable(state))
        donated = jax.tree.map(donate, state)
        manager.wait_until_finished()
        target = sw.checkpointable(kept)
        assert_identical(manager.restore(step, args=ocp.args.Composite(state=target))["state"], kept)
        assert contents(donated) != contents(kept)


def test_numpy_arrays_written_right_after_the_call_are_saved_as_they_were(manager: Any) -> None:
    state = taken({"a": jnp.arange(1000.0), "b": one_of("float8_e3m4")})
    host = jax.tree.map(np.array, state)
    save_items(manager, 1, state=sw.checkpointable(host))
    for array in jax.tree.leaves(host):
        array[...] = 0
    manager.wait_until_finished()
    assert_identical(manager.restore(1, args=ocp.args.Composite(state=sw.checkpointable(state)))["state"], state)


# --- an item of the newer interface ------------------------------------------------------------------------------


def test_the_newer_interface_saves_and_loads_a_state_beside_others(tmp_path: pathlib.Path) -> None:
    state = trained()
    item = sw.checkpointable(state)
    assert isinstance(item, v1.StatefulCheckpointable)
    v1.save_checkpointables(tmp_path / "saved", {"state": item, "scores": {"loss": 0.5}})
    target = sw.checkpointable(trained(1))
    back = v1.load_checkpointables(tmp_path / "saved", {"state": target, "scores": None})
    assert back["state"] is target
    assert back["scores"] == {"loss": 0.5}
    assert_identical(target.state, state)
    assert target.report is not None
    assert target.report.ok
    assert_identical(sw.restore(tmp_path / "saved" / "state", state)[0], state)


@unplaced
def test_the_newer_interface_reads_a_state_as_a_tree(tmp_path: pathlib.Path) -> None:
    v1.save_checkpointables(tmp_path / "saved", {"state": sw.checkpointable(mixed())})
    assert_equal_trees(v1.load(tmp_path / "saved", checkpointable_name="state"), as_plain_tree(mixed()))


def test_the_newer_interface_saves_in_the_background_what_was_there_at_the_call(tmp_path: pathlib.Path) -> None:
    state = trained()
    kept = copied(state)
    response = v1.save_checkpointables_async(tmp_path / "saved", {"state": sw.checkpointable(state)})
    train(state, jnp.ones((5, 3)))
    response.result()
    target = sw.checkpointable(kept.plan.abstract())
    v1.load_checkpointables(tmp_path / "saved", {"state": target})
    assert_identical(target.state, kept)


def test_the_newer_interface_reads_what_a_manager_wrote(manager: Any) -> None:
    state = trained()
    save_items(manager, 1, state=sw.checkpointable(state))
    manager.wait_until_finished()
    target = sw.checkpointable(trained(1))
    v1.load_checkpointables(pathlib.Path(manager.directory) / "1", {"state": target})
    assert_identical(target.state, state)


# --- refused -----------------------------------------------------------------------------------------------------


def test_an_item_is_mixed() -> None:
    with refused(
        sw.StructureError,
        "sw.checkpointable wants a state, not Linear.",
        hint="sw.checkpointable(plan.take(model))",
    ):
        sw.checkpointable(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_the_kinds_and_the_layout_of_an_item_are_checked_when_it_is_made() -> None:
    state = trained()
    with refused(
        sw.DeclarationError, "There is no kind 'gates'.", kind="gates", hint=f"one of: {', '.join(state.plan.kinds)}"
    ):
        sw.checkpointable(state, only="gates")
    with refused(sw.SaveError, "layout='flat' is neither 'named' nor 'packed'.", hint="layout='packed'"):
        sw.checkpointable(state, layout="flat")


def test_an_item_that_does_not_fit_is_refused_and_changes_nothing(manager: Any) -> None:
    save_items(manager, 1, state=sw.checkpointable(taken({"a": jnp.ones(2)})))
    manager.wait_until_finished()
    target = sw.checkpointable(taken({"a": jnp.ones(3)}))
    before = target.state
    folder = manager.directory / "1" / "state"
    with refused(
        sw.RestoreError,
        f"{folder} does not fit the target: 1 leaf differs. Nothing was read or changed.",
        leaves=["leaves/a: Variable(3,) float32  kind=variables  (is (2,) in the checkpoint)"],
        hint="build the model with the sizes that it was saved with",
    ):
        manager.restore(1, args=ocp.args.Composite(state=target))
    assert target.state is before
    assert target.report is None


# --- in a loop that runs already, as in a notebook ---------------------------------------------------------------


def test_saving_and_restoring_work_within_a_running_event_loop(tmp_path: pathlib.Path) -> None:
    state = trained()

    async def cell() -> sw.State:
        sw.save(tmp_path / "saved", state)
        with sw.Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(1, state)
            checkpoints.wait()
            assert_identical(checkpoints.restore(state).state, state)
        return sw.restore(tmp_path / "saved", state)[0]

    assert contents(asyncio.run(cell())) == contents(state)
