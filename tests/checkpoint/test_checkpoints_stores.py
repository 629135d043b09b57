"""`sw.Checkpoints` on object stores: what it does on a disk, it does there."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import statewise as sw
from checkpoint_models import assert_identical, number_of, numbered, trained
from refusals import refused
from statewise._src.checkpoint.orbax.stores import StorePath, listing

NEW = ocp.v1.training.Checkpointer
# Orbax warns of what it does here on purpose: without a target it takes the shardings that it finds.
PLAIN = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
# One of each pair that differs in both is always run.
SLOW = (pytest.param(mode, marks=pytest.mark.slow) for mode in ("first sync", "new async"))
MODES = ["first async", "new sync", *SLOW]


@pytest.fixture(params=MODES)
def checkpoints(request: pytest.FixtureRequest, stores: str) -> Iterator[sw.Checkpoints]:
    """On each of Orbax's interfaces, on each store."""
    options = NEW if "new" in request.param else None
    url, asynchronous = f"{stores}/deep/run", "async" in request.param
    with sw.Checkpoints(url, max_to_keep=2, every=2, asynchronous=asynchronous, options=options) as made:
        yield made


def test_a_run_is_saved_and_restored(checkpoints: sw.Checkpoints) -> None:
    url = str(checkpoints.directory)
    assert (checkpoints.steps, checkpoints.latest) == ((), None)
    assert [checkpoints.save(step, numbered(step), metrics={"loss": step / 2}) for step in (1, 2, 4)] == [
        False,
        True,
        True,
    ]
    told: list[tuple[int, int]] = []
    checkpoints.save(5, numbered(5), force=True, metrics={"loss": 2.5}, epoch=3, average=sw.checkpointable(numbered(7)))
    checkpoints.wait(progress=lambda written, total: told.append((written, total)))
    assert told[-1] == (28, 28)
    assert (checkpoints.steps, checkpoints.latest, len(checkpoints)) == ((4, 5), 5, 2)
    assert repr(checkpoints) == f"Checkpoints({url!r}, steps=(4, 5))"
    newest = checkpoints.restore(numbered(0), extra=["metrics", "epoch"])
    assert (newest.step, number_of(newest.state), newest.extra) == (5, 5, {"metrics": {"loss": 2.5}, "epoch": 3})
    average = sw.checkpointable(numbered(0))
    assert number_of(checkpoints.restore(numbered(0).plan.abstract(), step=4).state) == 4
    checkpoints.restore(numbered(0), extra={"average": average})
    assert number_of(average.state) == 7
    assert str(checkpoints.path()) == f"{url}/5/state"
    assert number_of(sw.restore(checkpoints.path(4), numbered(0))[0]) == 4
    assert number_of(sw.restore(f"{url}/5/state", numbered(0))[0]) == 5
    assert checkpoints.preview(numbered(0)).ok
    assert checkpoints.inspect()["variables"].leaves == 2
    # What was removed is gone, and nothing names a writer of what is complete.
    assert {name.partition("/")[0] for name in listing(StorePath(url))} == {"4", "5"}


@PLAIN
def test_orbax_reads_what_is_on_gs_with_both_of_its_interfaces(gcs: str) -> None:
    state, url = trained(), f"{gcs}/run"
    with sw.Checkpoints(url, layout="named") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, metrics={"loss": step / 2}, tree=ocp.args.StandardSave({"x": np.arange(3)}))
        checkpoints.wait()
        extra = checkpoints.restore(state, extra={"tree": ocp.args.StandardRestore()}).extra
        assert extra["tree"]["x"].tolist() == [0, 1, 2]
    read_by_orbax(url, state)


@PLAIN
def test_orbax_reads_what_is_on_s3_once_it_is_copied_to_a_disk(s3: str, tmp_path: pathlib.Path) -> None:
    state, url = trained(), f"{s3}/run"
    with sw.Checkpoints(url, options=NEW) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, metrics={"loss": step / 2})
        checkpoints.wait()
    for name in listing(StorePath(url)):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((StorePath(url) / name).read_bytes())
    read_by_orbax(str(tmp_path / "run"), state)
    with sw.Checkpoints(tmp_path / "run") as copied:
        assert_identical(copied.restore(state, step=1).state, state)


def read_by_orbax(directory: str, state: sw.State) -> None:
    """Orbax alone lists the steps, and reads their arrays and metrics."""
    kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    with ocp.CheckpointManager(epath.Path(directory)) as manager:
        assert list(manager.all_steps()) == [1, 2]
        wanted = {"state": ocp.args.PyTreeRestore(), "metrics": ocp.args.JsonRestore()}
        read = manager.restore(2, args=ocp.args.Composite(**wanted))
        assert read["metrics"] == {"loss": 1.0}
        assert_found(kernels, read["state"])
    with NEW(epath.Path(directory)) as checkpointer:
        assert [each.step for each in checkpointer.checkpoints] == [1, 2]
        assert_found(kernels, checkpointer.load_checkpointables(1)["state"])


def assert_found(arrays: list[np.ndarray], tree: Any) -> None:
    found = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    assert arrays
    for array in arrays:
        assert any(np.array_equal(array, other) for other in found)


def test_a_run_goes_on_where_another_interface_left_it_with_orbax_s_own_options(stores: str) -> None:
    url, names = f"{stores}/run", ocp.v1.path.step.standard_name_format(step_prefix="at")
    new = functools.partial(NEW, step_name_format=names)
    with sw.Checkpoints(url, options=new) as checkpoints:
        checkpoints.save(1, numbered(1))
    with sw.Checkpoints(url, options=ocp.CheckpointManagerOptions(step_prefix="at", max_to_keep=2)) as checkpoints:
        assert checkpoints.latest == 1
        for step in (2, 3):
            checkpoints.save(step, numbered(step))
        checkpoints.wait()
        assert checkpoints.steps == (2, 3)
        assert str(checkpoints.path()) == f"{url}/at_3/state"
    with sw.Checkpoints(url, options=new) as checkpoints:
        assert number_of(checkpoints.restore(numbered(0), step=2).state) == 2


def test_arrays_that_orbax_cannot_write_to_s3_are_refused_before_anything_is_written(s3: str) -> None:
    with sw.Checkpoints(f"{s3}/run") as checkpoints:
        with refused(
            sw.SaveError,
            "Orbax cannot write the arrays of StandardSaveArgs to s3://.",
            hint="numbers as JSON; a state as sw.checkpointable(state); or a directory on disk or on gs://",
        ):
            checkpoints.save(1, numbered(1), tree=ocp.args.StandardSave({"x": np.arange(3)}))
        assert listing(StorePath(f"{s3}/run")) == []
        assert checkpoints.save(1, numbered(1), tree=ocp.args.JsonSave({"x": [0, 1, 2]}))
        assert checkpoints.restore(numbered(0), extra="tree").extra == {"tree": {"x": [0, 1, 2]}}
