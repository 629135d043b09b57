"""`checkpoints.wait(timeout=)`, and who asks JAX whether a machine is to be taken away."""

from __future__ import annotations

import pathlib
import signal
import threading
from typing import Any

import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

import statewise as sw
from checkpoint_models import number_of, numbered
from refusals import refused
from statewise._src.checkpoint.orbax.state_writer import StateWriter
from statewise._src.checkpoint.orbax.stores import StorePath, listing

NEW = ocp.v1.training.Checkpointer


class Held:
    """Lets each write wait until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        write = StateWriter.write

        def held(writer: StateWriter) -> None:
            assert self.may_go_on.wait(60)
            write(writer)

        monkeypatch.setattr(StateWriter, "write", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


@pytest.mark.parametrize("progress", [None, lambda written, total: None], ids=["", "progress"])
@pytest.mark.parametrize("options", [None, NEW], ids=["first", "new"])
def test_a_wait_ends_at_its_timeout_and_the_write_goes_on(
    tmp_path: pathlib.Path, held: Held, options: Any, progress: Any
) -> None:
    with sw.Checkpoints(tmp_path / "run", options=options, every=2) as checkpoints:
        assert checkpoints.save(2, numbered(2))
        for timeout in (0, 0.15):
            message = f"Step 2 (28 bytes) is still being written to {tmp_path / 'run'} after {timeout} s."
            hint = "checkpoints.wait() until it is complete; a process that ends before loses this step only"
            with refused(sw.SaveError, message, hint=hint):
                checkpoints.wait(progress, timeout=timeout)
            assert not checkpoints.save(3, numbered(3))  # not one to save: the other is still being written
        assert checkpoints.steps == ()
        held.may_go_on.set()
        checkpoints.wait(timeout=60)
        assert checkpoints.steps == (2,)
        assert number_of(checkpoints.restore(numbered(0)).state) == 2
        checkpoints.wait(timeout=0)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "30", [], -(10**400)], ids=["-1", "nan", "text", "list", "far"])
def test_a_timeout_is_a_number_of_seconds(tmp_path: pathlib.Path, timeout: Any) -> None:
    message = f"timeout={timeout!r} is not a number of seconds."
    with sw.Checkpoints(tmp_path) as checkpoints, refused(sw.SaveError, message, hint="timeout=30, or leave it out"):
        checkpoints.wait(timeout=timeout)


def test_only_the_thread_that_saves_asks_which_step_is_the_last(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX would take the step that another thread asks about for the one that training is at."""
    asked: list[tuple[int, bool]] = []

    def ask(step: int) -> bool:
        asked.append((step, threading.current_thread() is threading.main_thread()))
        return step == 5

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", ask)
    with sw.Checkpoints(tmp_path, every=3) as checkpoints:
        saved = [checkpoints.save(step, numbered(step)) for step in range(1, 8)]
        checkpoints.wait()
        assert checkpoints.steps == (3, 5, 6)
    steps = [step for step, _ in asked]
    assert steps == sorted(steps)
    assert saved == [False, False, True, False, True, True, False]
    assert all(in_main for _, in_main in asked)


def wait_interrupted(checkpoints: sw.Checkpoints, timeout: float | None = None) -> None:
    """Waits, and is interrupted as by Ctrl-C."""
    main = threading.main_thread().ident
    assert main is not None
    interrupt = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    # A shell that runs the tests in the background has interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait(timeout=timeout)
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("timeout", [None, 60], ids=["", "timeout"])
@pytest.mark.parametrize("options", [None, NEW], ids=["first", "new"])
def test_an_interrupted_wait_loses_nothing(
    tmp_path: pathlib.Path, held: Held, options: Any, timeout: float | None
) -> None:
    """The write goes on, and the next wait is for the same step."""
    with sw.Checkpoints(tmp_path / "run", options=options) as checkpoints:
        for step in (1, 2):
            held.may_go_on.clear()
            checkpoints.save(step, numbered(step))
            wait_interrupted(checkpoints, timeout)
            assert checkpoints.steps == tuple(range(1, step))
            held.may_go_on.set()
            checkpoints.wait()
            assert checkpoints.steps == tuple(range(1, step + 1))
        assert number_of(checkpoints.restore(numbered(0)).state) == 2


@pytest.mark.parametrize("options", [None, NEW], ids=["first", "new"])
def test_after_an_interrupted_wait_a_step_in_a_store_is_still_ours(stores: str, held: Held, options: Any) -> None:
    """The object that names the writer stays until the step is complete, and goes then."""
    with sw.Checkpoints(f"{stores}/run", options=options) as checkpoints:
        checkpoints.save(1, numbered(1))
        wait_interrupted(checkpoints)
        assert "1.statewise-writer" in listing(StorePath(f"{stores}/run"))
        held.may_go_on.set()
        checkpoints.wait()
        assert checkpoints.steps == (1,)
        assert {name.partition("/")[0] for name in listing(StorePath(f"{stores}/run"))} == {"1"}
