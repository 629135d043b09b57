"""A template of writers, for tests that kill many: it has imported everything, and each writer is a fork of it.

`python fork_writers.py`, then a line `BASE FIRST HOW` on its input for each writer.  A writer prints `pid PID`, then
`begun STEP` and `done STEP` for each save, from the first step on, until it is killed; or `failed STEP ERROR` and ends.
The template itself never touches JAX's devices or TensorStore, whose threads a fork would not have.
"""

from __future__ import annotations

import os
import sys

import etils.epath
import gcsfs
import orbax.checkpoint
import s3fs
import tensorstore

import numbered
import statewise as sw
from saying import say

STEPS = 50
# What a save imports when it is needed.
IMPORTED = (etils.epath, gcsfs, orbax.checkpoint, s3fs, tensorstore)


def plain(base: str, first: int) -> None:
    """`sw.save` to a path for each step."""
    for step in range(first, first + STEPS):
        state = numbered.state(step)
        say(f"begun {step}")
        try:
            sw.save(f"{base}/step_{step}", state)
        except sw.SaveError as error:
            say(f"failed {step} {error.message}")
            return
        say(f"done {step}")


def managed(base: str, first: int) -> None:
    """`sw.Checkpoints`, which keeps two."""
    with sw.Checkpoints(base, max_to_keep=2) as checkpoints:
        for step in range(first, first + STEPS):
            state = numbered.state(step)
            say(f"begun {step}")
            checkpoints.save(step, state)
            checkpoints.wait()
            say(f"done {step}")


def main() -> None:
    """Makes writers until its input ends."""
    for name in sw.__all__:
        getattr(sw, name)
    for line in iter(sys.stdin.readline, ""):
        base, first, how = line.split()
        pid = os.fork()
        if not pid:
            say(f"pid {os.getpid()}")
            {"plain": plain, "managed": managed}[how](base, int(first))
            os._exit(0)
        os.waitpid(pid, 0)
        say(f"ended {pid}")


if __name__ == "__main__":
    main()
