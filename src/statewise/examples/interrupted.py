"""The demo's training, killed halfway and resumed.

`killed_and_resumed` runs this file as a separate process, which trains and saves as usual; kills it with SIGKILL, which
no process can catch, once it has saved a few steps; restores the newest complete one, and continues.  The position in
the data is saved beside the state, so the losses are those of the uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import statewise as sw
from statewise.examples.text import CharText, load_topics
from statewise.examples.training import Settings, advance, begin

__all__ = ["Resumed", "killed_and_resumed"]

EVERY, MORE = 5, 5  # steps between two checkpoints; steps after the one that is resumed from
PATIENCE = 180.0  # seconds for the process to start and to compile


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The result.

    Attributes:
      step: the newest complete step that the killed process left behind.
      losses: the losses of the steps after that.
    """

    step: int
    losses: list[float]


class Batches:
    """The batches that the demo trains on: an iterator that says where it is, and goes there.

    Args:
      settings: the seed, and the shape of a batch.
      text: what they are drawn from.
    """

    def __init__(self, settings: Settings, text: CharText) -> None:
        self._settings, self._text = settings, text
        self._random = np.random.default_rng(settings.seed)

    def __next__(self) -> tuple[Any, Any]:
        return self._text.batch(self._random, self._settings.batch, self._settings.window)

    def get_state(self) -> dict[str, Any]:
        """Returns the position: the state of NumPy's generator."""
        return dict(self._random.bit_generator.state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._random.bit_generator.state = state


def train_and_save(settings: Settings, folder: str) -> None:
    """Trains and saves, until it is killed."""
    text = load_topics()
    model, plan = begin(settings, text)
    state, batches = plan.take(model), Batches(settings, text)
    with sw.Checkpoints(folder, every=EVERY, max_to_keep=2) as checkpoints:
        for step in range(1, settings.steps - MORE + 1):
            state, _, _ = advance(state, step, *next(batches))
            checkpoints.save(step, state, data=batches)
        checkpoints.wait()
        signal.pause()  # waits to be killed, even if training is done


def resume(settings: Settings, text: CharText, folder: str) -> Resumed:
    """Restores the newest complete step, and continues training from there."""
    _, plan = begin(settings, text)
    batches, losses = Batches(settings, text), []
    with sw.Checkpoints(folder) as checkpoints:
        state, _, step, _ = checkpoints.restore(plan.abstract(), data=batches)
    for number in range(step + 1, step + MORE + 1):
        state, loss, _ = advance(state, number, *next(batches))
        losses.append(loss)
    return Resumed(step, losses)


def killed_and_resumed(settings: Settings, text: CharText) -> Resumed:
    """Trains in a separate process, kills it, and resumes here.

    Raises:
      AssertionError: the process exited by itself, or saved nothing.
    """
    with tempfile.TemporaryDirectory(prefix="statewise-demo-") as folder:
        package = str(Path(sw.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, folder, json.dumps(dataclasses.asdict(settings))],
            env=os.environ | {"PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        try:
            _wait_for_steps(process, Path(folder), 2)
        finally:
            process.kill()
            _, stderr = process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise AssertionError(f"the training process exited by itself:\n{stderr[-2000:]}")
        return resume(settings, text, folder)


def _wait_for_steps(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None:
        # A step's directory gets its final name only when it is complete.
        complete = [path for path in folder.glob("*/state/statewise.json") if path.parents[1].name.isdecimal()]
        if len(complete) >= count:
            return
        if time.monotonic() > end:
            raise AssertionError(f"no {count} checkpoints within {PATIENCE:.0f} s")
        time.sleep(0.02)


def main(arguments: list[str]) -> None:
    """Runs the process that is killed, given a folder and the settings as JSON."""
    folder, settings = arguments
    given: dict[str, Any] = json.loads(settings)
    train_and_save(Settings(**given), folder)


if __name__ == "__main__":
    main(sys.argv[1:])
