"""Run as a program by the tests that look at what it leaves: saves step 1, and is killed while it saves step 2.

`python killed_at.py DIRECTORY first|new arrays|manifest|mark`: when the arrays are written, but no index of them; when
everything is but the manifest; when everything is but Orbax's mark.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import orbax.checkpoint as ocp

import statewise as sw
from checkpoint_models import numbered
from statewise._src.checkpoint.orbax.store_steps import Claim
from statewise._src.checkpoint.orbax.write import TreeWriter


def die(*_: object) -> None:
    """Ends this process at once, as a machine does that is taken away."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_commit(self: Claim, *args: Any) -> None:
    """Commits a state, and ends."""
    commit(self, *args)
    die()


if __name__ == "__main__":
    directory, options, point = sys.argv[1:]
    with sw.Checkpoints(directory, options=ocp.v1.training.Checkpointer if options == "new" else None) as checkpoints:
        checkpoints.save(1, numbered(1), metrics={"loss": 1.0})
        checkpoints.wait()
        commit = Claim.commit
        if point == "arrays":
            TreeWriter._write_index = die  # type: ignore[method-assign]
        else:
            Claim.commit = die if point == "manifest" else die_after_commit  # type: ignore[method-assign]
        checkpoints.save(2, numbered(2), metrics={"loss": 2.0})
