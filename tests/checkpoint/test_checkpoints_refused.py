"""`sw.Checkpoints`: what it refuses, and writes that fail."""

from __future__ import annotations

import functools
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import assert_identical, batches, number_of, numbered, train, trained
from refusals import refused

DELETE_1 = "checkpoints.manager.delete(1)"
# The thread of Orbax's that waits for all others of a save.
OF_ORBAX = "write_metadata_after_commits"
NEW = ocp.v1.training.Checkpointer


@pytest.fixture(params=["first async", "first sync", "new async", "new sync"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[sw.Checkpoints]:
    """On each of Orbax's interfaces."""
    options = NEW if "new" in request.param else None
    with sw.Checkpoints(tmp_path / "run", asynchronous="async" in request.param, options=options) as made:
        yield made


# --- refused -----------------------------------------------------------------------------------------------------


def test_a_directory_without_steps_says_so(checkpoints: sw.Checkpoints) -> None:
    for ask in (checkpoints.path, checkpoints.inspect, lambda: checkpoints.restore(numbered(0))):
        with refused(
            sw.RestoreError,
            f"There is no checkpoint in {checkpoints.directory}.",
            hint="checkpoints.save(step, state)",
        ):
            ask()


def test_a_step_that_is_not_there_is_named_with_those_that_are(checkpoints: sw.Checkpoints) -> None:
    for step in range(7):
        checkpoints.save(step, numbered(step))
    checkpoints.wait()
    with refused(sw.RestoreError, f"There is no step 9 in {checkpoints.directory}.", hint="one of: 2, 3, 4, 5, 6"):
        checkpoints.restore(numbered(0), step=9)


def test_a_step_is_not_written_over_neither_while_it_is_written_nor_after(checkpoints: sw.Checkpoints) -> None:
    message = f"There is already a step 1 in {checkpoints.directory}."
    checkpoints.save(1, numbered(1))
    for force in (False, True):
        with refused(sw.SaveError, message, hint=f"another step; {DELETE_1} removes one that is corrupted"):
            checkpoints.save(1, numbered(2), force=force)
        checkpoints.wait()
    assert number_of(checkpoints.restore(numbered(0)).state) == 1


def test_a_run_goes_on_from_before_a_step_that_is_corrupted(checkpoints: sw.Checkpoints) -> None:
    """By the words of the errors alone: the newest step is removed, and saved again."""
    for step in range(2):
        checkpoints.save(step, numbered(step))
    checkpoints.wait()
    (checkpoints.directory / "1/state/_METADATA").write_text("{}")
    with pytest.raises(sw.CorruptedError):
        checkpoints.restore(numbered(0))
    state = checkpoints.restore(numbered(0), step=0).state
    with pytest.raises(sw.SaveError, match="removes one that is corrupted"):
        checkpoints.save(1, state)
    eval(DELETE_1)
    assert checkpoints.save(1, state)
    checkpoints.wait()
    assert number_of(checkpoints.restore(numbered(5)).state) == 0


def test_what_is_left_of_a_step_is_no_step_and_is_named_where_it_is_in_the_way(checkpoints: sw.Checkpoints) -> None:
    for step in range(2):
        checkpoints.save(step, numbered(step))
    checkpoints.wait()
    (checkpoints.directory / "1/state/statewise.json").unlink()
    assert checkpoints.latest == 0
    message = f"Step 1 in {checkpoints.directory} is not a complete checkpoint."
    with refused(sw.SaveError, message, hint=DELETE_1):
        checkpoints.save(1, numbered(2))
    eval(DELETE_1)
    assert checkpoints.save(1, numbered(2))
    checkpoints.wait()
    assert number_of(checkpoints.restore(numbered(0)).state) == 2


def test_a_step_that_another_process_removes_meanwhile_is_in_nobody_s_way(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax's manager looks at each step that it has seen, and says that there is no such file."""
    plain, tried = ocp.CheckpointManager, []

    def racing(*args: Any, **options: Any) -> Any:
        tried.append(args)
        if len(tried) < 4:
            raise FileNotFoundError(2, "No such file or directory")
        return plain(*args, **options)

    monkeypatch.setattr(ocp, "CheckpointManager", racing)
    with sw.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == ()
    assert len(tried) == 4


def test_a_step_older_than_the_newest_is_not_silently_left_out(checkpoints: sw.Checkpoints) -> None:
    """Whoever goes on from an older step would save nothing until the newest is reached."""
    checkpoints.save(4, numbered(4))
    checkpoints.save(6, numbered(6))
    checkpoints.wait()
    with refused(
        sw.SaveError,
        f"Step 3 is older than what {checkpoints.directory} holds: 4, 6.",
        hint="another directory, to go on from an older step; or save(..., force=True), to save it beside them",
    ):
        checkpoints.save(3, numbered(3))
    assert checkpoints.save(5, numbered(5), force=True)
    checkpoints.wait()
    assert checkpoints.steps == (4, 5, 6)


@pytest.mark.parametrize("step", [-1, "1", 1.5, None, True], ids=str)
def test_a_step_is_a_number_from_zero_on(tmp_path: pathlib.Path, step: Any) -> None:
    with (
        sw.Checkpoints(tmp_path) as checkpoints,
        refused(sw.SaveError, f"{step!r} is not the number of a step.", hint="checkpoints.save(100, state)"),
    ):
        checkpoints.save(step, numbered(1))


def test_a_step_may_be_counted_by_an_array(checkpoints: sw.Checkpoints) -> None:
    checkpoints.save(jnp.array(2), numbered(1))
    checkpoints.save(np.int64(3), numbered(1))
    checkpoints.wait()
    assert checkpoints.steps == (2, 3)


def test_what_is_no_state_is_refused(checkpoints: sw.Checkpoints) -> None:
    with refused(
        sw.StructureError,
        "sw.checkpointable wants a state, not dict.",
        hint="sw.checkpointable(plan.take(model))",
    ):
        checkpoints.save(1, {"a": 1})


def test_a_spent_or_abstract_state_is_refused_and_the_step_stays_free(checkpoints: sw.Checkpoints) -> None:
    state = trained()
    new, _ = train(state, batches()[0])
    with pytest.raises(sw.StructureError, match=r"This state was donated: train has donated its .*params"):
        checkpoints.save(1, state)
    with refused(
        sw.StructureError,
        "This state is abstract: it has shapes but no values to save.",
        hint="sw.save(path, plan.take(model))",
    ):
        checkpoints.save(1, state.plan.abstract())
    checkpoints.wait(progress=lambda written, total: None)
    assert list(checkpoints.directory.iterdir()) == []
    assert checkpoints.save(1, new)
    checkpoints.wait()
    assert_identical(checkpoints.restore(new).state, new)


def test_a_state_that_is_being_traced_is_refused(checkpoints: sw.Checkpoints) -> None:
    @jax.jit
    def inside(state: sw.State) -> sw.State:
        checkpoints.save(1, state)
        return state

    with refused(
        sw.StructureError,
        "This state is being traced: inside jax.jit there are no values to save.",
        hint="return the state from the function, and save what comes back",
    ):
        inside(numbered(1))


def test_a_directory_that_cannot_be_made_is_said_so_at_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file" / "run", tmp_path / "file"):
        with refused(
            sw.SaveError, f"{directory} cannot be used: Not a directory.", hint="a directory that can be written to"
        ):
            sw.Checkpoints(directory)


def test_options_that_cannot_be_are_refused(tmp_path: pathlib.Path) -> None:
    with refused(sw.SaveError, "every=0 is less than one step.", hint="every=1, or leave it out"):
        sw.Checkpoints(tmp_path / "run", every=0)
    with refused(sw.SaveError, "max_to_keep=0 is less than one step.", hint="max_to_keep=1, or leave it out"):
        sw.Checkpoints(tmp_path / "run", max_to_keep=0)
    with refused(sw.SaveError, "layout='flat' is neither 'named' nor 'packed'.", hint="layout='packed'"):
        sw.Checkpoints(tmp_path / "run", layout="flat")
    assert not (tmp_path / "run").exists()


# --- a write that fails ------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A disk that is full when the manifest is written."""

    def fails(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("statewise._src.checkpoint.orbax.state_writer.write_manifest", fails)
    return monkeypatch


def failed(directory: Any) -> Any:
    return refused(
        sw.SaveError,
        f"A step could not be written to {directory}: No space left on device. Earlier steps are complete.",
        hint="free some space, or choose a directory that can be written to",
    )


def test_a_background_write_that_fails_is_said_by_wait(tmp_path: pathlib.Path, full: pytest.MonkeyPatch) -> None:
    checkpoints = sw.Checkpoints(tmp_path)
    checkpoints.save(1, numbered(1))
    with failed(tmp_path):
        checkpoints.wait()
    assert checkpoints.steps == ()
    checkpoints.close()


def test_a_background_write_that_fails_is_said_by_the_next_save(
    tmp_path: pathlib.Path, full: pytest.MonkeyPatch
) -> None:
    checkpoints = sw.Checkpoints(tmp_path)
    checkpoints.save(1, numbered(1))
    with failed(tmp_path):
        checkpoints.save(2, numbered(2))
    checkpoints.close()


def test_a_background_write_that_fails_is_said_by_close(tmp_path: pathlib.Path, full: pytest.MonkeyPatch) -> None:
    with failed(tmp_path), sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1))


@pytest.mark.parametrize("options", [None, NEW], ids=["first", "new"])
def test_after_a_write_that_failed_the_step_can_be_saved_again(
    options: Any, tmp_path: pathlib.Path, full: pytest.MonkeyPatch
) -> None:
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        checkpoints.save(1, numbered(1))
        with failed(tmp_path):
            checkpoints.wait()
        full.undo()
        checkpoints.save(1, numbered(2))
        checkpoints.wait()
        assert checkpoints.steps == (1,)
        assert number_of(checkpoints.restore(numbered(0)).state) == 2


def test_a_write_that_fails_at_once_leaves_nothing_to_wait_for(
    tmp_path: pathlib.Path, full: pytest.MonkeyPatch
) -> None:
    with sw.Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        with failed(tmp_path):
            checkpoints.save(1, numbered(1))
        told: list[tuple[int, int]] = []
        checkpoints.wait(progress=lambda written, total: told.append((written, total)))
        assert told == [(28, 28)]
        assert checkpoints.steps == ()


@pytest.mark.parametrize("options", [None, NEW], ids=["first", "new"])
def test_a_write_that_fails_at_once_is_not_taken_for_what_comes_after_the_step_before(
    options: Any, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    with sw.Checkpoints(tmp_path, asynchronous=False, options=options) as checkpoints:
        checkpoints.save(1, numbered(1))
        request.getfixturevalue("full")
        with failed(tmp_path):
            checkpoints.save(2, numbered(2))
        assert checkpoints.steps == (1,)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_step_whose_directory_cannot_be_made_leaves_no_thread_that_waits_for_it(
    tmp_path: pathlib.Path, asynchronous: bool
) -> None:
    """Such a thread waits for five minutes, and keeps the process from ending."""
    checkpoints = sw.Checkpoints(tmp_path / "run", asynchronous=asynchronous)
    checkpoints.save(1, numbered(1))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("in the way")
    with refused(
        sw.SaveError,
        f"A step could not be written to {tmp_path / 'run'}: Not a directory. Earlier steps are complete.",
        hint="free some space, or choose a directory that can be written to",
    ):
        checkpoints.save(2, numbered(2))
    checkpoints.close()
    writing = [thread for thread in threading.enumerate() if thread.name in ("statewise-arrays", OF_ORBAX)]
    for thread in writing:
        thread.join(60)
    assert not any(thread.is_alive() for thread in writing)


def test_an_extra_item_that_is_corrupted_is_named(checkpoints: sw.Checkpoints) -> None:
    checkpoints.save(1, numbered(1), note={"a": 1})
    checkpoints.wait()
    (file,) = [path for path in (checkpoints.directory / "1/note").iterdir() if path.name in ("metadata", "data.json")]
    file.write_text('{"a":')
    with refused(
        sw.CorruptedError,
        f"The item 'note' in {checkpoints.directory / '1'} is corrupted: {file.name} is not JSON: "
        "Expecting value: line 1 column 6 (char 5).",
        hint="leave it out, or restore another step: checkpoints.restore(target, step=...)",
    ):
        checkpoints.restore(numbered(0), extra="note")
    assert number_of(checkpoints.restore(numbered(0)).state) == 1


def test_a_folder_with_a_number_is_no_step(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1))
        checkpoints.wait()
        (tmp_path / "99").mkdir()
        assert checkpoints.steps == (1,)
        assert checkpoints.restore(numbered(0)).step == 1
        assert checkpoints.save(2, numbered(2))


def test_metrics_that_best_fn_cannot_judge_are_refused_and_the_run_goes_on(tmp_path: pathlib.Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: -metrics["loss"])
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        checkpoints.save(0, numbered(0), metrics={"loss": 1.0})
        with refused(
            sw.SaveError,
            "best_fn cannot judge these metrics: KeyError: 'loss'.",
            hint="give each step what best_fn looks at: checkpoints.save(step, state, metrics={'loss': loss})",
        ):
            checkpoints.save(1, numbered(1), metrics={})
        checkpoints.save(2, numbered(2), metrics={"loss": 0.0})
        checkpoints.wait()
        assert checkpoints.steps == (2,)


MARKED = ocp.options.AtomicityMode.COMMIT_FILE


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (
            ocp.CheckpointManagerOptions(atomicity_options=ocp.options.AtomicityOptions(mode=MARKED)),
            "AtomicityMode.COMMIT_FILE in atomicity_options",
        ),
        (
            ocp.CheckpointManagerOptions(temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath),
            "temporary_path_class=CommitFileTemporaryPath",
        ),
        (
            functools.partial(
                NEW, context=ocp.v1.Context(atomicity_options=ocp.v1.options.AtomicityOptions(mode=MARKED))
            ),
            "AtomicityMode.COMMIT_FILE in context",
        ),
    ],
    ids=["first", "path class", "newer"],
)
def test_steps_that_are_marked_and_not_renamed_are_refused_on_a_disk(
    options: Any, option: str, tmp_path: pathlib.Path
) -> None:
    """They would be on the disk only in part after a power cut: what is flushed is what Orbax renames."""
    said = (
        f"With {option} Orbax writes each step under its final name and renames nothing, so that on a disk a power cut "
        "can take files of a complete step."
    )
    with refused(sw.SaveError, said, hint="leave it out: on a disk Orbax renames, and what is renamed is on the disk"):
        sw.Checkpoints(tmp_path / "run", options=options)
    assert list(tmp_path.iterdir()) == []


def test_steps_that_are_renamed_by_name_are_as_those_by_default(tmp_path: pathlib.Path) -> None:
    renamed = ocp.options.AtomicityMode.ATOMIC_RENAME
    old = ocp.CheckpointManagerOptions(atomicity_options=ocp.options.AtomicityOptions(mode=renamed))
    context = ocp.v1.Context(atomicity_options=ocp.v1.options.AtomicityOptions(mode=renamed))
    for step, options in enumerate((old, functools.partial(NEW, context=context)), 1):
        with sw.Checkpoints(tmp_path, options=options) as checkpoints:
            checkpoints.save(step, numbered(step))
    assert checkpoints.steps == (1, 2)
