"""Run as a program by the tests that kill it: saves one step after the other until it is killed.

`python keep_killed.py FOLDER plain|managed|newer FIRST`: before a save begins it prints its number, and `done` when it
ended.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

import statewise as sw
from damaging import state
from saying import say


def plain(folder: Path, first: int) -> None:
    """`sw.save` to a path for each step."""
    for step in range(first, first + 1000):
        say(f"begun {step}")
        sw.save(folder / f"step_{step}", state(step), layout=("named", "packed")[step % 2])
        say(f"done {step}")


def managed(folder: Path, first: int, options: Any = None) -> None:
    """`sw.Checkpoints`, which keeps two."""
    with sw.Checkpoints(folder, max_to_keep=2, options=options) as checkpoints:
        for step in range(first, first + 1000):
            say(f"begun {step}")
            checkpoints.save(step, state(step))
            if step % 2:  # the others overlap
                checkpoints.wait()
                say(f"done {step}")


def newer(folder: Path, first: int) -> None:
    """The same on Orbax's newer interface."""
    managed(folder, first, ocp.v1.training.Checkpointer)


if __name__ == "__main__":
    # A shell that runs the tests in the background has interrupts ignored, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    {"plain": plain, "managed": managed, "newer": newer}[sys.argv[2]](Path(sys.argv[1]), int(sys.argv[3]))
