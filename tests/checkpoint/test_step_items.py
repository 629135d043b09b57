"""The other items of a step: they are what was written, or the restore says which is not; through both interfaces."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import number_of, numbered
from iterators import Counting
from refusals import refused
from statewise._src.checkpoint.format.manifest import leaves_text, write_manifest
from statewise._src.checkpoint.format.parse import read_manifest

ANOTHER = "leave it out, or restore another step: checkpoints.restore(target, step=...)"
OPTIONS = {"first": None, "new": ocp.v1.training.Checkpointer}
EPOCH_FILES = ("metadata", "data.json")


def save_steps(folder: pathlib.Path, options: Any) -> None:
    with sw.Checkpoints(folder, options=options) as checkpoints:
        for step in (1, 2):
            metrics = {"loss": step / 4, "worst": float("nan")}
            checkpoints.save(step, numbered(step), data=Counting(), metrics=metrics, epoch=10 + step)


@pytest.fixture(params=OPTIONS)
def run(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[sw.Checkpoints]:
    """Two steps; the second one's items are corrupted."""
    save_steps(tmp_path, OPTIONS[request.param])
    with sw.Checkpoints(tmp_path, options=OPTIONS[request.param]) as checkpoints:
        yield checkpoints


def file_of(folder: pathlib.Path, item: str) -> pathlib.Path:
    (file,) = [path for path in (folder / item).iterdir() if path.name in (*EPOCH_FILES, "metrics")]
    return file


def flip(folder: pathlib.Path, item: str) -> None:
    file = file_of(folder, item)
    file.write_text(file.read_text().replace("2", "3").replace("0.5", "0.6"))


def replace(folder: pathlib.Path, item: str) -> None:
    file = file_of(folder, item)
    file.write_bytes(file_of(folder.parent / "1", item).read_bytes())


def as_mapping(items: tuple[str, ...], options: Any) -> dict[str, Any]:
    return {name: ocp.args.JsonRestore() if options is None else None for name in items}


@pytest.mark.parametrize("harm", [flip, replace])
@pytest.mark.parametrize("item", ["metrics", "epoch"])
def test_json_that_is_not_what_was_written(
    run: sw.Checkpoints, item: str, harm: Callable[[pathlib.Path, str], None], request: pytest.FixtureRequest
) -> None:
    harm(run.directory / "2", item)
    said = f"The item {item!r} of step 2 in {run.directory} is corrupted: it is not what was written."
    by_orbax = as_mapping((item,), OPTIONS[request.node.callspec.params["run"]])
    for extra in (item, by_orbax):
        with refused(sw.CorruptedError, said, hint=ANOTHER):
            run.restore(numbered(0), extra=extra)
    assert number_of(run.restore(numbered(0)).state) == 2
    back = run.restore(numbered(0), step=1, extra=["metrics", "epoch"]).extra
    assert (back["metrics"]["loss"], back["epoch"], np.isnan(back["metrics"]["worst"])) == (0.25, 11, True)


@pytest.mark.parametrize("marked", [False, True])
def test_an_item_without_its_file(run: sw.Checkpoints, marked: bool) -> None:
    for item in ("metrics", "epoch"):
        file_of(run.directory / "2", item).unlink()
        if marked:
            (run.directory / "2" / item / "commit_success.txt").write_text("")
        said = f"The item {item!r} in {run.directory / '2'} is corrupted: it has no file."
        with refused(sw.CorruptedError, said, hint=ANOTHER):
            run.restore(numbered(0), extra=item)


@pytest.mark.parametrize("left", [(), ("process_0-of-1.statewise",), ("commit_success.txt",)])
def test_a_position_without_its_file(run: sw.Checkpoints, left: tuple[str, ...]) -> None:
    folder, iterator = run.directory / "2" / "data", Counting()
    for file in folder.iterdir():
        if file.name not in left:
            file.unlink()
    if "commit_success.txt" in left:
        (folder / "commit_success.txt").write_text("")
    hint = "another step: checkpoints.restore(target, step=..., data=iterator); or leave out data="
    with refused(sw.CorruptedError, "The item 'data' of step 2 is corrupted: it has no position.", hint=hint):
        run.restore(numbered(0), data=iterator)
    assert iterator.position == Counting().position
    if "process_0-of-1.statewise" in left:
        said = "The item 'data' of step 2 is the position of an iterator."
        with refused(sw.RestoreError, said, hint="checkpoints.restore(target, step=2, data=iterator)"):
            run.restore(numbered(0), extra="data")


def test_an_item_that_is_wholly_gone(run: sw.Checkpoints) -> None:
    for item in ("metrics", "data"):
        shutil.rmtree(run.directory / "2" / item)
    said = f"Step 2 in {run.directory} is corrupted: its item "
    with refused(sw.CorruptedError, f"{said}'metrics' is missing.", hint=ANOTHER):
        run.restore(numbered(0), extra="metrics")
    with refused(sw.CorruptedError, f"{said}'data' is missing.", hint=ANOTHER):
        run.restore(numbered(0), data=Counting())
    with refused(sw.RestoreError, "Step 2 has no item 'loss'.", hint="one of: epoch, state"):
        run.restore(numbered(0), extra="loss")


def test_an_item_that_goes_while_it_is_read(run: sw.Checkpoints) -> None:
    class Removing(Counting):
        def get_state(self) -> Any:
            shutil.rmtree(run.directory / "2" / "data", ignore_errors=True)
            return super().get_state()

    said = f"Step 2 in {run.directory} is corrupted: a file of its items was removed while it was read."
    with refused(sw.CorruptedError, said, hint=ANOTHER):
        run.restore(numbered(0), data=Removing())


def test_a_state_of_another_step_is_read_only_where_it_is_asked_for(run: sw.Checkpoints) -> None:
    shutil.rmtree(run.directory / "2" / "state")
    shutil.copytree(run.directory / "1" / "state", run.directory / "2" / "state")
    hint = (
        "restore another step: checkpoints.restore(target, step=...); or, if the directory was renamed on purpose, "
        "sw.restore(checkpoints.path(2), target)"
    )
    said = f"The state of step 2 in {run.directory} is corrupted: it was saved with step 1."
    for read in (run.restore, run.preview):
        with refused(sw.CorruptedError, said, hint=hint):
            read(numbered(0))
    assert number_of(sw.restore(run.path(2), numbered(0))[0]) == 1


def test_a_copy_of_a_step_in_another_run_and_under_another_form_of_its_number(
    run: sw.Checkpoints, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(run.directory / "2", tmp_path / "copy" / "step_0002")
    options = ocp.CheckpointManagerOptions(step_prefix="step", step_format_fixed_length=4)
    with sw.Checkpoints(tmp_path / "copy", options=options) as checkpoints:
        assert checkpoints.steps == (2,)
        assert checkpoints.restore(numbered(0), extra="epoch").extra == {"epoch": 12}


# --- the format ----------------------------------------------------------------------------------------------------


def test_the_manifest_records_the_step_and_the_items_among_the_versions(run: sw.Checkpoints) -> None:
    content = json.loads((run.path(2) / "statewise.json").read_text())["content"]
    recorded = {name: text for name, text in content["written"].items() if name.startswith("step")}
    assert recorded == {
        "step": "2",
        "step/data": "",
        "step/epoch": hashlib.sha256(b"12").hexdigest(),
        "step/metrics": hashlib.sha256(b'{"loss":0.5,"worst":NaN}').hexdigest(),
    }
    report = run.preview(numbered(0))
    assert not [name for name in report.written if name.startswith("step")]


def test_steps_without_such_entries_restore_as_before(run: sw.Checkpoints) -> None:
    """Older versions wrote none, nor does a manager of the user's own."""
    manifest = read_manifest(run.path(2))
    sums = [array.sums for leaf in manifest.leaves for array in leaf.arrays]
    older = {**manifest.__dict__, "recorded": {}}
    text = leaves_text(manifest.leaves, sums)
    (run.path(2) / "statewise.json").write_bytes(write_manifest(type(manifest)(**older), text))
    (run.directory / "2").rename(run.directory / "7")
    flip(run.directory / "7", "epoch")
    assert (run.latest, run.restore(numbered(0), extra="epoch").extra) == (7, {"epoch": 13})
    shutil.rmtree(run.directory / "7" / "epoch")
    with refused(sw.RestoreError, "Step 7 has no item 'epoch'.", hint="one of: data, metrics, state"):
        run.restore(numbered(0), extra="epoch")


def test_json_given_as_orbax_has_it_is_recorded_as_it_was_at_the_call(tmp_path: pathlib.Path) -> None:
    given = {"b": [1, 2], "a": {1: "é"}}
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), note=ocp.args.JsonSave(given), nothing=None)
        given["b"] = [3]
        back = checkpoints.restore(numbered(0), extra="note").extra
        assert back == {"note": {"b": [1, 2], "a": {"1": "é"}}}
        assert set(read_manifest(checkpoints.path()).recorded) == {"step", "step/note"}
