"""Orbax's two interfaces and Statewise: each reads what any of the others wrote, and Orbax alone is the judge."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import as_plain_tree, assert_identical, mixed
from programs import plain_orbax

PROGRAM = Path(plain_orbax.__file__)
NEW = ocp.v1.training.Checkpointer
METRICS = {"loss": 0.5}


# --- what writes ---------------------------------------------------------------------------------------------------


def by_save(folder: Path, state: sw.State) -> tuple[Path, str]:
    sw.save(folder, state)
    return folder, ""


def by_checkpoints(folder: Path, state: sw.State, **options: Any) -> tuple[Path, str]:
    with sw.Checkpoints(folder, **options) as checkpoints:
        for step in (3, 7):
            assert checkpoints.save(step, state, metrics=METRICS)
    return folder / "7", "state"


def by_a_manager(folder: Path, state: sw.State) -> tuple[Path, str]:
    with ocp.CheckpointManager(folder) as manager:
        for step in (3, 7):
            items = {"model": sw.checkpointable(state), "metrics": ocp.args.JsonSave(METRICS)}
            assert manager.save(step, args=ocp.args.Composite(**items))
    return folder / "7", "model"


def by_save_checkpointables(folder: Path, state: sw.State) -> tuple[Path, str]:
    ocp.v1.save_checkpointables(folder, {"model": sw.checkpointable(state), "other": {"x": np.arange(3)}})
    return folder, "model"


def by_a_checkpointer(folder: Path, state: sw.State) -> tuple[Path, str]:
    with NEW(folder) as checkpointer:
        for step in (3, 7):
            assert checkpointer.save_checkpointables(step, {"model": sw.checkpointable(state)}, metrics=METRICS)
    return folder / "7", "model"


WRITERS: dict[str, Callable[[Path, sw.State], tuple[Path, str]]] = {
    "sw.save": by_save,
    "sw.Checkpoints": by_checkpoints,
    "sw.Checkpoints packed": functools.partial(by_checkpoints, layout="packed"),
    "sw.Checkpoints new": functools.partial(by_checkpoints, options=NEW),
    "sw.Checkpoints new sync": functools.partial(by_checkpoints, options=NEW, asynchronous=False),
    "manager": by_a_manager,
    "save_checkpointables": by_save_checkpointables,
    "checkpointer": by_a_checkpointer,
}
STEPS = [how for how in WRITERS if how not in ("sw.save", "save_checkpointables")]
# Orbax without Statewise reads what the packed layout has, which is not the tree.
NAMED = [how for how in WRITERS if "packed" not in how]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """One state, written in each way: the directory, and the name of the item in it."""
    root, state = tmp_path_factory.mktemp("written"), mixed()
    return {how: write(root / how.replace(" ", "-"), state) for how, write in WRITERS.items()}


# --- plain Orbax reads it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read_alone(written: dict[str, tuple[Path, str]]) -> dict[tuple[str, str], Any]:
    """What each function of Orbax reads, in a process that has never imported Statewise."""
    wanted = [(how, do) for how in NAMED for do in ("read_first", "read_new")]
    wanted += [(how, do) for how in STEPS if how in NAMED for do in ("steps_first", "steps_new")]
    requests = []
    for how, do in wanted:
        folder, name = written[how]
        requests.append([do, str(folder if do.startswith("read") else folder.parent), name])
    command = [sys.executable, str(PROGRAM), json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(wanted, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("do", ["read_first", "read_new"])
@pytest.mark.parametrize("how", NAMED)
def test_orbax_alone_reads_each_leaf(read_alone: dict[tuple[str, str], Any], how: str, do: str) -> None:
    assert read_alone[how, do] == json.loads(json.dumps(plain_orbax.shown(as_plain_tree(mixed()))))


@pytest.mark.parametrize("do", ["steps_first", "steps_new"])
@pytest.mark.parametrize("how", [how for how in STEPS if how in NAMED])
def test_orbax_alone_finds_the_steps_and_the_metrics(read_alone: dict[tuple[str, str], Any], how: str, do: str) -> None:
    steps, metrics, tree = read_alone[how, do]
    assert (steps, metrics) == ([3, 7], METRICS)
    assert tree == json.loads(json.dumps(plain_orbax.shown(as_plain_tree(mixed()))))


# --- Statewise reads it, through either interface ------------------------------------------------------------------


def changed() -> sw.State:
    """A target with other values."""
    return jax.tree.map(lambda array: array ^ 1 if array.dtype == "int4" else array + 1, mixed())


@pytest.mark.parametrize("how", WRITERS)
def test_a_restore_reads_it(written: dict[str, tuple[Path, str]], how: str) -> None:
    folder, name = written[how]
    state, report = sw.restore(folder / name, changed())
    assert report.ok
    assert_same_values(state)


def assert_same_values(state: sw.State) -> None:
    expected = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(mixed()))
    assert_identical(state, expected)


@pytest.mark.parametrize("how", [how for how in WRITERS if how != "sw.save"])
def test_an_item_of_the_newer_interface_reads_it(written: dict[str, tuple[Path, str]], how: str) -> None:
    folder, name = written[how]
    target = sw.checkpointable(changed())
    back = ocp.v1.load_checkpointables(folder, {name: target})
    assert back[name] is target
    assert_same_values(target.state)
    assert target.report is not None
    assert target.report.ok


@pytest.mark.parametrize("how", STEPS)
def test_an_item_of_a_checkpointer_reads_it(written: dict[str, tuple[Path, str]], how: str) -> None:
    folder, name = written[how]
    target = sw.checkpointable(changed())
    with NEW(folder.parent) as checkpointer:
        assert checkpointer.load_checkpointables(7, {name: target})[name] is target
        assert checkpointer.checkpoints[-1].metrics == METRICS
    assert_same_values(target.state)


@pytest.mark.parametrize("how", STEPS)
def test_an_item_of_a_manager_reads_it(written: dict[str, tuple[Path, str]], how: str) -> None:
    folder, name = written[how]
    with ocp.CheckpointManager(folder.parent) as manager:
        items = {name: sw.checkpointable(changed()), "metrics": ocp.args.JsonRestore()}
        back = manager.restore(7, args=ocp.args.Composite(**items))
    assert back["metrics"] == METRICS
    assert_same_values(back[name])


@pytest.mark.parametrize("options", [None, NEW], ids=["first", "new"])
@pytest.mark.parametrize("how", [how for how in STEPS if how.startswith("sw.")])
def test_either_interface_of_checkpoints_reads_it(written: dict[str, tuple[Path, str]], how: str, options: Any) -> None:
    folder, _ = written[how]
    with sw.Checkpoints(folder.parent, options=options) as checkpoints:
        assert checkpoints.steps == (3, 7)
        back = checkpoints.restore(changed(), extra=["metrics"])
    assert (back.step, back.extra) == (7, {"metrics": METRICS})
    assert_same_values(back.state)


# --- what plain Orbax writes ---------------------------------------------------------------------------------------


def plain_first(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def plain_new(folder: Path, tree: Any) -> Path:
    ocp.v1.save(folder, tree)
    return folder


def plain_new_items(folder: Path, tree: Any) -> Path:
    ocp.v1.save_checkpointables(folder, {"model": tree, "note": {"x": np.arange(3)}})
    return folder / "model"


@pytest.mark.parametrize("write", [plain_first, plain_new, plain_new_items])
def test_what_plain_orbax_wrote_is_inspected_and_converted(tmp_path: Path, write: Any) -> None:
    plain = write(tmp_path / "plain", as_plain_tree(mixed()))
    assert sw.inspect(plain)["arrays"].leaves == 7
    converted = sw.convert(plain, tmp_path / "converted", target=changed())
    assert converted.ok
    state, _ = sw.restore(tmp_path / "converted", changed())
    assert_same_values(state)
