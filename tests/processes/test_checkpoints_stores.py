"""`sw.Checkpoints` on an object store, in several processes: one that reads again and again, and one that is killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import number_of, numbered
from programs.save_together import make
from refusals import refused
from statewise._src.checkpoint.orbax.stores import StorePath, listing

TESTS = Path(__file__).parents[1]
PROGRAMS = TESTS / "helpers/programs"
PATHS = (TESTS / "helpers", TESTS.parent / "src")
OPTIONS = {"first": None, "new": ocp.v1.training.Checkpointer}


def environment() -> dict[str, str]:
    paths = os.pathsep.join(map(str, PATHS))
    return {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    """An empty bucket on the store that a test names."""
    return request.getfixturevalue(request.param)


def some(always: set[tuple[str, ...]], *choices: Iterable[str]) -> list[Any]:
    """All combinations; those that are not named are slow tests."""
    marks = (() if each in always else (pytest.mark.slow,) for each in itertools.product(*choices))
    return [pytest.param(*each, marks=mark) for each, mark in zip(itertools.product(*choices), marks, strict=True)]


@pytest.mark.parametrize(
    ("bucket", "options"),
    some({("gcs", "first")}, ("gcs", "s3"), ("first", "new")),
    indirect=["bucket"],
)
def test_a_reader_that_looks_again_and_again_sees_each_step(options: str, bucket: str) -> None:
    url = f"{bucket}/run"
    program = [sys.executable, str(PROGRAMS / "poll_steps.py"), url]
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(program, env=environment(), **piped) as evaluator,
        sw.Checkpoints(url, max_to_keep=2, options=OPTIONS[options]) as checkpoints,
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
    ("bucket", "options", "point"),
    some(
        {("gcs", "first", "mark"), ("s3", "new", "manifest")},
        ("gcs", "s3"),
        ("first", "new"),
        ("arrays", "manifest", "mark"),
    ),
    indirect=["bucket"],
)
def test_a_step_of_a_killed_writer_is_offered_to_nobody_and_its_successor_writes_it(
    options: str, point: str, bucket: str
) -> None:
    url = f"{bucket}/run"
    program = [sys.executable, str(PROGRAMS / "killed_at.py"), url, options, point]
    assert subprocess.run(program, env=environment(), check=False).returncode == -signal.SIGKILL
    left = [name for name in listing(StorePath(f"{url}/2")) if name.startswith("state/statewise-")]
    assert left
    with sw.Checkpoints(url, options=OPTIONS[options]) as checkpoints:
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


@pytest.mark.parametrize("bucket", ["gcs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_two_processes_save_steps_together_and_one_restores(bucket: str) -> None:
    url = f"{bucket}/run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    program = PROGRAMS / "save_steps_together.py"
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [
        subprocess.Popen([sys.executable, str(program), str(each), "2", port, url], env=environment(), **piped)
        for each in range(2)
    ]
    try:
        printed = [process.communicate(timeout=180)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert all(text.rstrip().endswith("the same") for text in printed), "\n".join(printed)
    plan = sw.plan(make(), optimizers={"params": optax.adam(1e-2)})
    with sw.Checkpoints(url) as checkpoints:
        assert checkpoints.steps == (2, 3, 4)
        for step in checkpoints.steps:
            average = sw.checkpointable(plan.abstract())
            state = checkpoints.restore(plan.abstract(), step=step, extra={"average": average}).state
            for found in (state, average.state):
                for one, other in zip(jax.tree.leaves(plan.take(make())), jax.tree.leaves(found), strict=True):
                    np.testing.assert_array_equal(one, other)
