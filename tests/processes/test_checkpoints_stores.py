"""`sw.Checkpoints` on an object store, in several processes: one that reads again and again, and one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import number_of, numbered
from refusals import refused
from statewise._src.checkpoint.orbax.stores import StorePath, listing

TESTS = Path(__file__).parents[1]
PROGRAMS = TESTS / "helpers/programs"
PATHS = (TESTS / "helpers", TESTS.parent / "src")
NEW = ocp.v1.training.Checkpointer
ALL = pytest.mark.slow  # what the others show, in other pairs


def environment() -> dict[str, str]:
    paths = os.pathsep.join(map(str, PATHS))
    return {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.mark.parametrize("options", [None, pytest.param(NEW, marks=ALL)], ids=["first", "new"])
def test_a_reader_that_looks_again_and_again_sees_each_step(options: Any, stores: str) -> None:
    url = f"{stores}/run"
    program = [sys.executable, str(PROGRAMS / "poll_steps.py"), url]
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(program, env=environment(), **piped) as evaluator,
        sw.Checkpoints(url, max_to_keep=2, options=options) as checkpoints,
    ):

        def seen() -> Any:
            evaluator.stdin.write("\n")
            evaluator.stdin.flush()
            return json.loads(evaluator.stdout.readline())

        evaluator.stdout.readline()  # it has opened the directory, in which there is nothing
        assert seen() == [[], None, None]
        for step in (3, 5, 8):
            checkpoints.save(step, numbered(step))
            checkpoints.wait()
            steps = [kept for kept in (3, 5, 8) if kept <= step][-2:]
            assert seen() == [steps, step, step]
        evaluator.stdin.close()
    assert evaluator.returncode == 0


@pytest.mark.parametrize(
    ("options", "point"),
    [
        ("first", "mark"),
        ("new", "manifest"),
        *(pytest.param(options, "arrays", marks=ALL) for options in ("first", "new")),
        pytest.param("first", "manifest", marks=ALL),
        pytest.param("new", "mark", marks=ALL),
    ],
)
def test_a_step_of_a_killed_writer_is_offered_to_nobody_and_its_successor_writes_it(
    options: str, point: str, stores: str
) -> None:
    url = f"{stores}/run"
    program = [sys.executable, str(PROGRAMS / "killed_at.py"), url, options, point]
    assert subprocess.run(program, env=environment(), check=False).returncode == -signal.SIGKILL
    left = [name for name in listing(StorePath(f"{url}/2")) if name.startswith("state/statewise-")]
    assert left
    with sw.Checkpoints(url, options=NEW if options == "new" else None) as checkpoints:
        assert (checkpoints.steps, checkpoints.latest) == ((1,), 1)
        with refused(sw.RestoreError, f"There is no step 2 in {url}.", hint="one of: 1"):
            checkpoints.path(2)
        assert number_of(checkpoints.restore(numbered(0)).state) == 1
        assert checkpoints.save(2, numbered(5), metrics={"loss": 5.0})
        checkpoints.wait()
        assert checkpoints.steps == (1, 2)
        back = checkpoints.restore(numbered(0), extra="metrics")
        assert (number_of(back.state), back.extra) == (5, {"metrics": {"loss": 5.0}})
    names = listing(StorePath(url))
    assert not [name for name in names if name.endswith(".statewise-writer")]
    assert not [name for name in left if f"2/{name}" in names]
