"""A power cut at any moment of a save: what the disk can hold then restores, and what was saved is not lost.

One program saves in every way, and is traced; `power_cuts` has what the disk can hold between any two of its calls.
At each of these moments that is very much: where the states are few, all of them are looked at, else the extremes and a
sample.  Those that look alike for a checkpoint are restored once.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import number_of, numbered
from power_cuts import Disk, Tree, below, built
from programs.save_traced import NAMES, WAYS, Position, both
from system_calls import need_strace, traced

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "helpers/programs/save_traced.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (TESTS / "helpers", TESTS.parent / "src"))),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
}
ALWAYS, MANY = 10, 500  # if there are more states at a moment, so many of them are drawn, beside the extremes
OPENED, MANY_OPENED = 2, 60  # how many of a run's states are opened as a user would
MANAGED = ("first", "newer", "one", "one newer", "blocking", "overlapping")


class Traced:
    """The traced program: its calls, and the directory of each way to save."""

    def __init__(self, folder: Path) -> None:
        for way in WAYS:
            (folder / way).mkdir()
        done, self._calls = traced([sys.executable, str(PROGRAM), str(folder), *WAYS], ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-3000:]
        self._folder = folder

    def disk(self, way: str) -> Disk:
        """The disk while the program saved in a way."""
        disk, folder = Disk(self._folder / way, self._calls), self._folder / way
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        there = {name: None if path.is_dir() else path.read_bytes() for name, path in paths.items()}
        assert disk.whole() == there, "the model has followed every call"
        return disk


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    need_strace()
    return Traced(tmp_path_factory.mktemp("traced"))


def looked_at(disk: Disk, most: int) -> Iterator[tuple[Tree, list[str]]]:
    """What the disk could hold at each moment, as `Disk.states` chooses it, with what had been saved by then."""
    dice = random.Random(0)
    for cut in disk.cuts:
        done = [text.removeprefix("done ") for at, text in disk.marks if at <= cut]
        for tree in disk.states(cut, most, dice):
            yield tree, done


class Outcomes:
    """What a checkpoint in a tree gives: its number, or why it gives none; each distinct one is read once."""

    def __init__(self, folder: Path, read: Callable[[Path], float]) -> None:
        self._folder = folder
        self._read = read
        self._known: dict[tuple[tuple[str, bytes | None], ...], float | str] = {}

    def of(self, tree: Tree) -> float | str:
        """The number in the checkpoint that is this tree."""
        key = tuple(sorted(tree.items()))
        if key not in self._known:
            place = built(tree, self._folder / str(len(self._known)))
            try:
                self._known[key] = self._read(place)
            except sw.StatewiseError as error:
                self._known[key] = f"{type(error).__name__}: {error.message}"
        return self._known[key]


target = functools.cache(lambda: numbered(-1))


def restored(path: Path) -> float:
    return number_of(sw.restore(path, target())[0])


# --- sw.save -----------------------------------------------------------------------------------------------------


def check_saved(disk: Disk, folder: Path, most: int) -> None:
    """What has a final name is whole; what `save` had returned for has its name."""
    outcomes = Outcomes(folder, restored)
    for tree, done in looked_at(disk, most):
        there = sorted(name for name in below(tree, "run/steps") if "/" not in name and not name.startswith("."))
        assert {*done} <= {f"run/steps/{name}" for name in there}, "it is still there"
        for name in there:
            assert outcomes.of(below(tree, f"run/steps/{name}")) == float(name)


@pytest.mark.parametrize("way", ["save", "packed"])
def test_a_saved_state_is_whole_or_absent_and_stays(way: str, program: Traced, tmp_path: Path) -> None:
    check_saved(program.disk(way), tmp_path, ALWAYS)


def test_a_state_over_a_base_is_whole_or_absent_and_stays(program: Traced, tmp_path: Path) -> None:
    def read(path: Path) -> float:
        for name in ("base", "tuned"):
            if (path / name).exists():
                state, _ = sw.restore(path / name, both(-1, -1))
                assert float(state["variables"]["a"][0]) == 0
                assert float(state["params"]["p"][0]) == (name == "tuned")
        return 1

    outcomes = Outcomes(tmp_path, read)
    for tree, done in looked_at(program.disk("base"), ALWAYS):
        assert {*done} <= {*tree}
        named = {name: data for name, data in tree.items() if not name.startswith(".")}
        assert outcomes.of(named) == 1


# --- sw.Checkpoints ----------------------------------------------------------------------------------------------


def check_kept(disk: Disk, folder: Path, most: int, opened: int) -> None:
    """The newest step that is offered is whole; an older one is, or says that it is corrupted; none is lost."""
    outcomes = Outcomes(folder / "steps", restored)
    distinct: dict[tuple[tuple[str, bytes | None], ...], float] = {}
    for tree, done in looked_at(disk, most):
        offered = sorted(int(name) for name in tree if name.isdigit() and f"{name}/state/statewise.json" in tree)
        values = {step: outcomes.of(below(tree, f"{step}/state")) for step in offered}
        newest = max(offered, default=-1)
        assert newest >= max(map(int, done), default=-1), "it is still there"
        for step, value in values.items():
            gone = step < newest and isinstance(value, str) and value.startswith("CorruptedError")
            assert value == step or gone, (step, value, done)
        distinct[tuple(sorted(tree.items()))] = max(offered, default=-1)
    for number, state in enumerate(random.Random(1).sample(sorted(distinct), min(opened, len(distinct)))):
        options = (None, ocp.v1.training.Checkpointer)[number % 2]
        with sw.Checkpoints(built(dict(state), folder / f"opened {number}"), options=options) as checkpoints:
            newest = distinct[state]
            assert checkpoints.latest == (None if newest < 0 else newest)
            if newest >= 0:
                assert number_of(checkpoints.restore(target()).state) == newest
            checkpoints.save(9, numbered(9))
            checkpoints.wait()
            assert number_of(checkpoints.restore(target()).state) == 9


@pytest.mark.parametrize("way", MANAGED)
def test_the_newest_step_is_whole_and_stays(way: str, program: Traced, tmp_path: Path) -> None:
    check_kept(program.disk(way), tmp_path, ALWAYS, OPENED)


def restored_with_data(folder: Path) -> float:
    """Restores the one step of a run, and the position of its data; returns the number that both of them have."""
    position = Position(-1)
    with sw.Checkpoints(folder) as checkpoints:
        number = number_of(checkpoints.restore(target(), data=position).state)
    assert position.step == number
    return number


# What is said of a step whose deletion was cut short, also where the data went first.
GONE = "CorruptedError: "


def check_data_kept(disk: Disk, folder: Path, most: int) -> None:
    """The newest step that is offered has its data too; an older one has them, or is corrupted; none is lost."""
    outcomes = Outcomes(folder, restored_with_data)
    for tree, done in looked_at(disk, most):
        offered = sorted(int(name) for name in tree if name.isdigit() and f"{name}/state/statewise.json" in tree)
        newest = max(offered, default=-1)
        assert newest >= max(map(int, done), default=-1), "it is still there"
        for step in offered:
            own = {path: data for path, data in tree.items() if path == f"{step}" or path.startswith(f"{step}/")}
            value = outcomes.of(own)
            gone = step < newest and isinstance(value, str) and value.startswith(GONE)
            assert value == step or gone, (step, value, done)


@pytest.mark.parametrize("way", ["data", "data newer"])
def test_the_newest_step_has_the_position_of_its_data(way: str, program: Traced, tmp_path: Path) -> None:
    check_data_kept(program.disk(way), tmp_path, ALWAYS)


@pytest.mark.parametrize("way", ["own", "own newer"])
def test_an_item_of_a_users_own_manager_is_whole_or_absent(way: str, program: Traced, tmp_path: Path) -> None:
    outcomes = Outcomes(tmp_path, restored)
    for tree, done in looked_at(program.disk(way), ALWAYS):
        offered = [int(name) for name in tree if name.isdigit() and f"{name}/state/statewise.json" in tree]
        values = {step: outcomes.of(below(tree, f"{step}/state")) for step in offered}
        # Here Orbax alone decides what is deleted, and when: what it has not flushed can be lost.
        assert all(values[step] == step for step in offered if step >= max(map(int, done), default=0)), values


# --- sw.convert --------------------------------------------------------------------------------------------------


def as_statewise(path: Path) -> float:
    state, _ = sw.restore(path, target(), names=NAMES)
    return number_of(state)


def as_mapping(path: Path) -> float:
    return float(np.asarray(sw.convert(path, None, to="orbax").tree["leaves"]["a"])[0])


CONVERTED: dict[str, Callable[[Path], float]] = {
    "source": restored,
    "out/plain.safetensors": as_mapping,
    "plain": as_mapping,
    "published": as_statewise,
}


def check_converted(disk: Disk, folder: Path, most: int) -> None:
    """What has a final name is whole; what `convert` had returned for has its name."""
    outcomes = {name: Outcomes(folder / str(number), read) for number, (name, read) in enumerate(CONVERTED.items())}
    for tree, done in looked_at(disk, most):
        assert {*done} <= {*tree}, "it is still there"
        for name, outcome in outcomes.items():
            data = tree.get(name)
            if name in tree:
                assert outcome.of(below(tree, name) if data is None else {"file.safetensors": data}) == 5


def test_what_is_converted_is_whole_or_absent_and_stays(program: Traced, tmp_path: Path) -> None:
    check_converted(program.disk("converted"), tmp_path, ALWAYS)


# --- more of the same ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", MANAGED)
def test_of_many_states_the_newest_step_is_whole_and_stays(way: str, program: Traced, tmp_path: Path) -> None:
    check_kept(program.disk(way), tmp_path, MANY, MANY_OPENED)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["save", "packed"])
def test_of_many_states_a_saved_state_is_whole_or_absent_and_stays(way: str, program: Traced, tmp_path: Path) -> None:
    check_saved(program.disk(way), tmp_path, MANY)


@pytest.mark.slow
def test_of_many_states_what_is_converted_is_whole_or_absent_and_stays(program: Traced, tmp_path: Path) -> None:
    check_converted(program.disk("converted"), tmp_path, MANY)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["data", "data newer"])
def test_of_many_states_the_newest_step_has_the_position_of_its_data(way: str, program: Traced, tmp_path: Path) -> None:
    check_data_kept(program.disk(way), tmp_path, MANY)
