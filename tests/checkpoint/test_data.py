"""`checkpoints.save(step, state, data=iterator)`: a resumed run draws the batches that would have come."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw
from checkpoint_models import assert_identical, copied, number_of, numbered, train, trained
from iterators import PIPELINES, SIZE, Counting, Holding, drawn, loader, numbers
from statewise._src.checkpoint.orbax.data_item import DataItem

pytestmark = pytest.mark.heavy

NEW = ocp.v1.training.Checkpointer
INTERFACES = pytest.mark.parametrize("options", [None, NEW], ids=["first", "new"])


@pytest.fixture(params=[None, NEW], ids=["first", "new"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[sw.Checkpoints]:
    """On each of Orbax's interfaces."""
    with sw.Checkpoints(tmp_path / "run", options=request.param) as made:
        yield made


# --- the batches that would have come ----------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
@settings(max_examples=6)
@given(before=st.integers(0, 30), elsewhere=st.integers(0, 30), is_new=st.booleans())
def test_the_batches_that_would_have_come(
    tmp_path_factory: pytest.TempPathFactory, pipeline: str, before: int, elsewhere: int, is_new: bool
) -> None:
    iterator, again = PIPELINES[pipeline](), PIPELINES[pipeline]()
    drawn(iterator, before)
    drawn(again, elsewhere)
    with sw.Checkpoints(tmp_path_factory.mktemp("run"), options=NEW if is_new else None) as checkpoints:
        checkpoints.save(1, numbered(1), data=iterator)
        expected = drawn(iterator, 100)  # while it is being written
        result = checkpoints.restore(numbered(0), data=again)
    assert drawn(again, 100) == expected
    assert result.extra == {}


WITH_WORKERS = {
    "loader": lambda count: iter(loader(worker_count=count)),
    "dataset": lambda count: iter(numbers().to_iter_dataset().batch(4).mp_prefetch(workers(count))),
}


# Where Python's collector frees the semaphores of Grain's last workers while those of the next are being made, it warns
# that they may leak: the tracker of semaphores does not take calls from within (Python 3.13).
frees_workers = pytest.mark.filterwarnings("ignore:ResourceTracker called reentrantly:UserWarning")


def workers(count: int) -> grain.MultiprocessingOptions:
    return grain.MultiprocessingOptions(num_workers=count)


@frees_workers
@pytest.mark.parametrize("where", WITH_WORKERS)
def test_with_a_worker_the_iterator_itself_goes_back(tmp_path: pathlib.Path, where: str) -> None:
    iterator = WITH_WORKERS[where](1)
    drawn(iterator, 3)
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), data=iterator)
        expected = drawn(iterator, 3)
        checkpoints.restore(numbered(0), data=iterator)
    assert drawn(iterator, 3) == expected


@frees_workers
@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 1, 5, 8])
@pytest.mark.parametrize("where", WITH_WORKERS)
def test_with_workers_another_iterator_goes_there(tmp_path: pathlib.Path, where: str, position: int) -> None:
    iterator, again = WITH_WORKERS[where](2), WITH_WORKERS[where](2)
    drawn(iterator, position)
    drawn(again, 2)
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), data=iterator)
        checkpoints.restore(numbered(0), data=again)
    assert drawn(again, 50) == drawn(iterator, 50)


def row(number: int) -> np.ndarray:
    return np.array([number / SIZE, 1, -number / SIZE], np.float32)


@pytest.mark.parametrize(
    ("options", "stopped"),
    [(None, 3), pytest.param(NEW, 1, marks=pytest.mark.slow), pytest.param(None, 5, marks=pytest.mark.slow)],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: pathlib.Path, stopped: int, options: Any) -> None:
    rows = grain.MapDataset.range(SIZE).shuffle(seed=0).map(row).repeat().batch(5)
    start = trained()

    def run(folder: str, last: int) -> sw.State:
        state, iterator, done = copied(start), iter(rows.to_iter_dataset()), 0
        with sw.Checkpoints(tmp_path / folder, options=options) as checkpoints:
            if checkpoints.latest is not None:
                state, _, done, _ = checkpoints.restore(start.plan.abstract(), data=iterator)
            for step in range(done + 1, last + 1):
                state, _ = train(state, jnp.asarray(next(iterator)))
                checkpoints.save(step, state, data=iterator)
        return state

    run("stopped", stopped)
    assert_identical(run("stopped", 6), run("whole", 6))


# --- when the position is taken ----------------------------------------------------------------------------------


def test_a_step_that_is_not_saved_does_not_ask_for_the_position(checkpoints: sw.Checkpoints) -> None:
    class Asked(Counting):
        count = 0

        def get_state(self) -> Any:
            self.count += 1
            return super().get_state()

    iterator = Asked()
    with sw.Checkpoints(checkpoints.directory / "every", every=3) as every:
        saved = [every.save(step, numbered(step), data=iterator) for step in range(1, 8)]
    assert saved == [False, False, True, False, False, True, False]
    assert iterator.count == 2


def test_a_step_with_a_position_restores_without_it(checkpoints: sw.Checkpoints) -> None:
    checkpoints.save(1, numbered(7), data=Counting(), note="here")
    result = checkpoints.restore(numbered(0), extra="note")
    assert (number_of(result.state), result.extra) == (7, {"note": "here"})


def test_what_json_changes_in_form_only_comes_back(checkpoints: sw.Checkpoints) -> None:
    iterator = Holding(
        {
            "a": (np.int64(2**53 + 1), np.float32(0.1), np.array(3)),
            "b": [True, None, "\u00e9", float("nan"), float("-inf"), 10**30, 1e-310],
        }
    )
    checkpoints.save(1, numbered(1), data=iterator)
    iterator.state = {}
    checkpoints.restore(numbered(0), data=iterator)
    a, b = iterator.state["a"], iterator.state["b"]
    assert a == [2**53 + 1, float(np.float32(0.1)), 3]
    assert np.isnan(b.pop(3))
    assert b == [True, None, "\u00e9", float("-inf"), 10**30, 1e-310]


# --- Grain's own handlers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["map", "loader"])
def test_grain_s_own_handlers_read_it_through_each_interface(
    checkpoints: sw.Checkpoints, tmp_path: pathlib.Path, pipeline: str
) -> None:
    iterator = PIPELINES[pipeline]()
    drawn(iterator, 3)
    checkpoints.save(1, numbered(1), data=iterator)
    checkpoints.wait()
    expected = drawn(iterator, 3)
    first, new = PIPELINES[pipeline](), PIPELINES[pipeline]()
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {"state": sw.checkpointable(numbered(0)), "data": grain.checkpoint.CheckpointRestore(first)}
        manager.restore(1, args=ocp.args.Composite(**items))
    with NEW(tmp_path / "run") as manager:
        manager.load_checkpointables(1, {"state": sw.checkpointable(numbered(0)), "data": new})
    assert drawn(first, 3) == drawn(new, 3) == expected


@pytest.mark.parametrize("pipeline", ["map", "loader"])
def test_what_grain_s_own_handlers_wrote_is_read(tmp_path: pathlib.Path, pipeline: str) -> None:
    iterator, again = PIPELINES[pipeline](), PIPELINES[pipeline]()
    drawn(iterator, 3)
    with ocp.CheckpointManager(tmp_path / "first") as manager:
        items = {"state": sw.checkpointable(numbered(1)), "data": grain.checkpoint.CheckpointSave(iterator)}
        manager.save(1, args=ocp.args.Composite(**items))
    with NEW(tmp_path / "new") as manager:
        manager.save_checkpointables(1, {"state": sw.checkpointable(numbered(1)), "data": iterator})
    expected = drawn(iterator, 3)
    for folder in ("first", "new"):
        with sw.Checkpoints(tmp_path / folder) as checkpoints:
            checkpoints.restore(numbered(0), data=again)
        assert drawn(again, 3) == expected


@INTERFACES
def test_orbax_reads_the_files_of_the_item(tmp_path: pathlib.Path, options: Any) -> None:
    iterator = Counting()
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        checkpoints.save(1, numbered(1), data=iterator)
        checkpoints.wait()
        item = DataItem()
        result = checkpoints.restore(numbered(0), extra={"data": item})
    files = item.files if options is NEW else result.extra["data"]
    assert json.loads(files["process_0-of-1.json"]) == {"epoch": 0, "next": 0}
