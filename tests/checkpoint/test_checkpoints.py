"""`sw.Checkpoints`: the steps of a run, written in the background, complete or not there at all."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import assert_identical, batches, copied, number_of, numbered, taken, train, trained
from refusals import refused
from statewise._src.checkpoint import checkpoints as checkpoints_module

SAVE_ALONE = "a directory for each step: sw.save(f'run/{step}', state, only=('lora', 'optimizer'), base='base')"


NEW = ocp.v1.training.Checkpointer


@pytest.fixture(params=["first async", "first sync", "new async", "new sync"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[sw.Checkpoints]:
    """On each of Orbax's interfaces."""
    options = NEW if "new" in request.param else None
    with sw.Checkpoints(tmp_path / "run", asynchronous="async" in request.param, options=options) as made:
        yield made


# --- steps -------------------------------------------------------------------------------------------------------


def test_a_new_directory_has_no_steps(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path / "deep" / "run") as checkpoints:
        assert (checkpoints.steps, checkpoints.latest, len(checkpoints), list(checkpoints)) == ((), None, 0, [])
        assert checkpoints.directory == tmp_path / "deep" / "run"
        assert repr(checkpoints) == f"Checkpoints({str(tmp_path / 'deep' / 'run')!r}, steps=())"


def test_steps_are_saved_and_restored(checkpoints: sw.Checkpoints) -> None:
    for step in (3, 5, 10):
        assert checkpoints.save(step, numbered(step)) is True
    checkpoints.wait()
    assert (checkpoints.steps, checkpoints.latest, len(checkpoints)) == ((3, 5, 10), 10, 3)
    newest = checkpoints.restore(numbered(0))
    assert (newest.step, number_of(newest.state), newest.extra, newest.report.ok) == (10, 10, {}, True)
    older = checkpoints.restore(numbered(0).plan.abstract(), step=5)
    assert (older.step, number_of(older.state)) == (5, 5)


def test_a_state_may_be_donated_while_it_is_being_written(checkpoints: sw.Checkpoints) -> None:
    state, kept = trained(), []
    for step, batch in enumerate(batches()[:3]):
        kept.append(copied(state))
        checkpoints.save(step, state)
        state, _ = train(state, batch)
    checkpoints.wait()
    for step, expected in enumerate(kept):
        assert_identical(checkpoints.restore(state, step=step).state, expected)


def test_only_the_newest_are_kept(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, numbered(step))
        checkpoints.wait()
        assert checkpoints.steps == (3, 4)


def test_looking_at_the_steps_while_one_is_written_loses_none(tmp_path: pathlib.Path) -> None:
    """Orbax's manager forgets a step that is being written when it reloads."""
    with sw.Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, numbered(step))
            assert checkpoints.latest in (None, step - 1, step)
        checkpoints.wait()
        assert checkpoints.steps == (3, 4)


def test_only_every_so_many_steps_are_saved_the_first_one_too(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path, every=3) as checkpoints:
        saved = [checkpoints.save(step, numbered(step)) for step in range(1, 8)]
        assert saved == [False, False, True, False, False, True, False]
        checkpoints.wait()
        assert checkpoints.steps == (3, 6)
        assert checkpoints.save(8, numbered(8), force=True) is True
        checkpoints.wait()
        assert checkpoints.steps == (3, 6, 8)


def test_orbax_s_own_options_stand_instead(tmp_path: pathlib.Path) -> None:
    options = ocp.CheckpointManagerOptions(step_prefix="at", step_format_fixed_length=6, max_to_keep=1)
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        checkpoints.save(7, numbered(7))
        checkpoints.save(8, numbered(8))
        checkpoints.wait()
        assert checkpoints.steps == (8,)
        assert checkpoints.path() == tmp_path / "at_000008" / "state"
        assert number_of(checkpoints.restore(numbered(0)).state) == 8
        assert isinstance(checkpoints.manager, ocp.CheckpointManager)


def test_a_step_s_path_is_for_restore_and_inspect(checkpoints: sw.Checkpoints) -> None:
    checkpoints.save(1, numbered(1))
    checkpoints.save(2, numbered(2))
    checkpoints.wait()
    assert number_of(sw.restore(checkpoints.path(1), numbered(0))[0]) == 1
    assert number_of(sw.restore(checkpoints.path(), numbered(0))[0]) == 2
    assert checkpoints.inspect(1)["variables"].leaves == 2
    assert checkpoints.inspect()["variables"].size == 7


def test_a_preview_reads_nothing_and_says_what_differs(checkpoints: sw.Checkpoints) -> None:
    checkpoints.save(1, numbered(1))
    checkpoints.wait()
    assert checkpoints.preview(numbered(0)).ok
    report = checkpoints.preview(taken({"a": jnp.ones(2), "b": jnp.arange(4)}), step=1)
    assert [str(leaf) for leaf in report.problems] == [
        "leaves/a: Variable(2,) float32  kind=variables  (is (3,) in the checkpoint)"
    ]


def test_some_kinds_and_other_dtypes_are_restored_as_by_sw_restore(checkpoints: sw.Checkpoints) -> None:
    state = trained()
    checkpoints.save(1, state)
    checkpoints.wait()
    target = trained(1)
    assert_identical(checkpoints.restore(target, only="params").state, target.replace(params=state["params"]))
    half = state.cast(params="bfloat16")
    assert_identical(checkpoints.restore(half, cast=True).state, half)


def test_the_packed_layout_is_one_argument(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path, layout="packed") as checkpoints:
        checkpoints.save(1, numbered(1))
        checkpoints.wait()
        assert number_of(checkpoints.restore(numbered(0)).state) == 1
        with ocp.StandardCheckpointer() as reader:
            assert list(reader.restore(checkpoints.path())) == ["packed"]


def test_two_objects_read_one_directory(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as writer, sw.Checkpoints(tmp_path) as reader:
        writer.save(1, numbered(1))
        writer.wait()
        assert reader.steps == (1,)
        assert number_of(reader.restore(numbered(0)).state) == 1
        writer.save(2, numbered(2), metrics={"loss": 0.5})
        writer.wait()
        assert reader.restore(numbered(0), extra=["metrics"]).extra == {"metrics": {"loss": 0.5}}
        hint = "another step; checkpoints.manager.delete(2) removes one that is corrupted"
        with refused(sw.SaveError, f"There is already a step 2 in {tmp_path}.", hint=hint):
            reader.save(2, numbered(3))
        assert reader.save(3, numbered(3))
        reader.wait()
        assert writer.latest == 3


def test_orbax_goes_by_the_metrics_where_its_options_say_which_are_best(tmp_path: pathlib.Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda metrics: metrics["loss"], best_mode="min")
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 5.0, 2.0, 4.0]):
            checkpoints.save(step, numbered(step), metrics={"loss": loss})
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.manager.best_step()) == ((1, 3), 1)
        assert checkpoints.restore(numbered(0), step=1, extra=["metrics"]).extra == {"metrics": {"loss": 1.0}}


def test_an_error_in_its_block_does_not_cut_off_a_write(tmp_path: pathlib.Path) -> None:
    def run() -> None:
        with sw.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, numbered(1))
            raise KeyError("training")

    with pytest.raises(KeyError, match="training"):
        run()
    assert number_of(sw.restore(tmp_path / "1" / "state", numbered(0))[0]) == 1


def test_what_is_closed_saves_no_more_but_can_be_read(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1))
    with refused(
        sw.SaveError,
        f"Checkpoints({str(tmp_path)!r}) is closed.",
        hint="save inside its with block, or before checkpoints.close()",
    ):
        checkpoints.save(2, numbered(2))
    assert checkpoints.steps == (1,)
    assert number_of(checkpoints.restore(numbered(0)).state) == 1
    checkpoints.close()


def test_what_is_closed_can_be_opened_again(tmp_path: pathlib.Path) -> None:
    for step in (1, 2, 3):
        with sw.Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
            checkpoints.save(step, numbered(step))
    with sw.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (2, 3)


# --- extra items -------------------------------------------------------------------------------------------------


def test_extra_items_come_back_by_name(checkpoints: sw.Checkpoints) -> None:
    average, items = numbered(7), {"names": ["a", None], "options": {"rank": 2, "name": "b"}}
    checkpoints.save(1, numbered(1), metrics={"loss": 0.5}, epoch=3, average=sw.checkpointable(average), **items)
    checkpoints.wait()
    back = checkpoints.restore(numbered(0), extra=["metrics", "epoch", *items])
    assert back.extra == {"metrics": {"loss": 0.5}, "epoch": 3, **items}
    target = sw.checkpointable(numbered(0))
    checkpoints.restore(numbered(0), extra={"average": target})
    assert_identical(target.state, average)
    assert checkpoints.restore(numbered(0)).extra == {}


def test_what_orbax_has_a_handler_for_is_an_extra_item(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), tree=ocp.args.StandardSave({"x": np.arange(3)}))
        extra = checkpoints.restore(numbered(0), extra={"tree": ocp.args.StandardRestore()}).extra
        assert extra["tree"]["x"].tolist() == [0, 1, 2]
        path = checkpoints.path().parent
        with refused(
            sw.RestoreError,
            f"The item 'tree' in {path} is not JSON.",
            hint="say how to restore it: checkpoints.restore(target, extra={'tree': ocp.args.PyTreeRestore()})",
        ):
            checkpoints.restore(numbered(0), extra="tree")


def test_an_extra_item_is_saved_as_it_was_at_the_call(checkpoints: sw.Checkpoints) -> None:
    metrics: dict[str, Any] = {"losses": [1.0]}
    checkpoints.save(1, numbered(1), metrics=metrics)
    metrics["losses"].append(2.0)
    checkpoints.wait()
    assert checkpoints.restore(numbered(0), extra=["metrics"]).extra == {"metrics": {"losses": [1.0]}}


def test_an_extra_item_that_json_cannot_hold_is_refused_at_the_call(checkpoints: sw.Checkpoints) -> None:
    with refused(
        sw.SaveError,
        "The extra item 'metrics' cannot be written as JSON: Object of type ArrayImpl is not JSON serializable.",
        hint="Python numbers, such as float(loss); or "
        + (
            "an object that saves and loads itself (ocp.v1.StatefulCheckpointable)"
            if isinstance(checkpoints.manager, NEW)
            else "an ocp.args.CheckpointArgs, such as ocp.args.PyTreeSave(...)"
        ),
    ):
        checkpoints.save(1, numbered(1), metrics={"loss": jnp.ones(2)})
    assert checkpoints.save(1, numbered(1), metrics={"loss": 1.0})


def test_scalars_of_jax_and_numpy_are_numbers_in_json(checkpoints: sw.Checkpoints) -> None:
    checkpoints.save(1, numbered(1), metrics={"loss": jnp.array(0.5), "step": np.int64(3), "done": jnp.array(True)})
    extra = checkpoints.restore(numbered(0), extra="metrics").extra
    assert extra == {"metrics": {"loss": 0.5, "step": 3, "done": True}}


def test_a_restore_waits_for_what_is_being_written(checkpoints: sw.Checkpoints) -> None:
    for step in range(3):
        checkpoints.save(step, numbered(step))
    assert checkpoints.restore(numbered(9)).step == 2


@pytest.mark.parametrize(
    ("name", "of", "hint"),
    [
        ("only", "sw.save", SAVE_ALONE),
        ("base", "sw.save", SAVE_ALONE),
        ("layout", "sw.Checkpoints", "sw.Checkpoints(directory, layout='packed')"),
        ("cast", "checkpoints.restore", "checkpoints.restore(target, cast=True)"),
    ],
)
def test_an_option_of_another_function_is_no_extra_item(tmp_path: pathlib.Path, name: str, of: str, hint: str) -> None:
    """It would be written as one, beside a whole state, and nobody would know."""
    message = f"An extra item cannot be called {name!r}: that is an option of {of}, not of a step."
    with sw.Checkpoints(tmp_path) as checkpoints:
        with refused(sw.SaveError, message, hint=hint):
            checkpoints.save(1, numbered(1), **{name: ("params",)})
        assert checkpoints.steps == ()


def test_an_extra_item_does_not_take_the_state_s_place(checkpoints: sw.Checkpoints) -> None:
    with refused(sw.SaveError, "An extra item cannot be called 'state': that is the state.", hint="another name"):
        checkpoints.save(1, numbered(1), state={"x": 1})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../outside", "/tmp"])
def test_an_extra_item_s_name_is_that_of_a_folder(tmp_path: pathlib.Path, name: str) -> None:
    with (
        sw.Checkpoints(tmp_path / "run") as checkpoints,
        refused(
            sw.SaveError,
            f"An extra item cannot be called {name!r}: it is a directory of the step.",
            hint="another name",
        ),
    ):
        checkpoints.save(1, numbered(1), **{name: 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_item_that_is_not_there_is_refused_before_anything_is_read(
    checkpoints: sw.Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, numbered(1), metrics={"loss": 0.5})
    checkpoints.wait()
    monkeypatch.setattr("statewise._src.checkpoint.format.load.read_arrays", None)
    with refused(sw.RestoreError, "Step 1 has no item 'data'.", hint="one of: metrics, state"):
        checkpoints.restore(numbered(0), extra=["metrics", "data"])


# --- waiting -----------------------------------------------------------------------------------------------------


def test_progress_is_told_in_bytes_up_to_all_of_them(checkpoints: sw.Checkpoints) -> None:
    state = taken({"a": jnp.zeros(1 << 18), "b": jnp.arange(4)})
    checkpoints.save(1, state)
    told: list[tuple[int, int]] = []
    checkpoints.wait(progress=lambda written, total: told.append((written, total)))
    total = (1 << 20) + 16
    assert told[-1] == (total, total)
    assert {whole for _, whole in told} == {total}
    assert all(0 <= written <= total for written, _ in told)
    assert checkpoints.steps == (1,)


def test_a_bar_is_shown_in_a_terminal_for_large_states(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("statewise._src.checkpoint.checkpoints.LARGE", 1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1))
        checkpoints.wait()
    assert "28/28 bytes" in capsys.readouterr().err


def test_nothing_is_shown_for_small_ones(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1))
        checkpoints.wait()
    assert capsys.readouterr() == ("", "")


# --- a step that the run deletes while it is read ----------------------------------------------------------------


@pytest.fixture
def reader_of_deleted(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sw.Checkpoints]:
    """A reader of step 1, whose files go while it is restored for the first time, as another process deletes them."""
    with sw.Checkpoints(tmp_path) as writer, sw.Checkpoints(tmp_path) as reader:
        writer.save(1, numbered(1))
        writer.wait()
        real = checkpoints_module.open_checkpoint

        def open_checkpoint(path: Any, *arguments: Any, **options: Any) -> Any:
            if path == tmp_path / "1" / "state" and path.exists():
                writer.save(2, numbered(2), force=True)
                writer.wait()
                shutil.rmtree(tmp_path / "1")
            return real(path, *arguments, **options)

        monkeypatch.setattr(checkpoints_module, "open_checkpoint", open_checkpoint)
        yield reader


def test_the_newest_is_read_again_if_the_run_deletes_the_one_that_is_read(reader_of_deleted: sw.Checkpoints) -> None:
    result = reader_of_deleted.restore(numbered(0))
    assert result.step == 2
    assert number_of(result.state) == 2


def test_a_step_that_the_run_deletes_is_not_called_corrupted(
    reader_of_deleted: sw.Checkpoints, tmp_path: pathlib.Path
) -> None:
    with refused(
        sw.RestoreError,
        f"Step 1 in {tmp_path} was deleted while it was read.",
        hint="checkpoints.latest, or a larger max_to_keep for the run that writes",
    ):
        reader_of_deleted.restore(numbered(0), step=1)
