"""Run as a program by the tests that trace it: saves in every way, each below a directory of its own.

`python save_traced.py FOLDER WAY ...`: it tries to open `.mark/TEXT` in that directory at moments that the tests look
for, which leaves nothing but a line in the trace: `done NAME` after a save has returned.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

import statewise as sw
from checkpoint_models import numbered
from strategies import Node

__all__ = ["NAMES", "WAYS", "Position", "both"]

NAMES = sw.Names({"leaves/a": "model.a", "leaves/b": "model.b"})


def mark(folder: Path, text: str) -> None:
    """Leaves a line in the trace."""
    with contextlib.suppress(FileNotFoundError):
        os.close(os.open(folder / ".mark" / text, os.O_RDONLY))


def saved(folder: Path, layout: str = "named") -> None:
    """`sw.save`, to a path whose directories are made."""
    for number in (0, 1):
        sw.save(folder / "run" / "steps" / str(number), numbered(number), layout=layout)
        mark(folder, f"done run/steps/{number}")


def over_a_base(folder: Path) -> None:
    """`sw.save` over a base."""
    state = both(0, 0)
    sw.save(folder / "base", state)
    mark(folder, "done base")
    sw.save(folder / "tuned", both(0, 1), only="params", base=folder / "base")
    mark(folder, "done tuned")


def both(variables: float, params: float) -> sw.State:
    """A state with a number in each of two kinds."""
    model = Node(a=nnx.Variable(jnp.full(3, float(variables))), p=nnx.Param(jnp.full(3, float(params))))
    return sw.plan(model).take(model)


class Position:
    """Data that are nothing but where they are."""

    def __init__(self, step: int) -> None:
        self.step = step

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def with_data(folder: Path, options: Any = None) -> None:
    """`sw.Checkpoints`, with the position of the data."""
    with sw.Checkpoints(folder, max_to_keep=2, options=options) as checkpoints:
        for step in range(3):
            checkpoints.save(step, numbered(step), data=Position(step))
            checkpoints.wait()
            mark(folder, f"done {step}")


def kept(folder: Path, options: Any = None, max_to_keep: int = 2, asynchronous: bool = True, wait: bool = True) -> None:
    """`sw.Checkpoints`, with metrics."""
    with sw.Checkpoints(folder, max_to_keep=max_to_keep, options=options, asynchronous=asynchronous) as checkpoints:
        for step in range(3):
            checkpoints.save(step, numbered(step), metrics={"loss": float(step)})
            if wait:
                checkpoints.wait()
                mark(folder, f"done {step}")
            elif step:
                mark(folder, f"done {step - 1}")  # a save waits for the one before
    mark(folder, "done 2")


def in_own_manager(folder: Path) -> None:
    """An item of a user's own `ocp.CheckpointManager`, which flushes nothing itself."""
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.Composite(state=sw.checkpointable(numbered(step))))
            manager.wait_until_finished()
            mark(folder, f"done {step}")


def in_own_checkpointer(folder: Path) -> None:
    """The same on the newer interface."""
    with ocp.v1.training.Checkpointer(folder) as checkpointer:
        for step in range(2):
            checkpointer.save_checkpointables(step, {"state": sw.checkpointable(numbered(step))})
            mark(folder, f"done {step}")


def converted(folder: Path) -> None:
    """`sw.convert`, to each format that a file or a directory holds."""
    state = numbered(5)
    sw.save(folder / "source", state)
    mark(folder, "done source")
    sw.convert(folder / "source", folder / "out" / "plain.safetensors", to="safetensors")
    mark(folder, "done out/plain.safetensors")
    sw.convert(folder / "source", folder / "plain", to="orbax")
    mark(folder, "done plain")
    sw.convert(state, folder / "published", names=NAMES, max_shard_bytes=12)
    mark(folder, "done published")


WAYS: dict[str, Callable[[Path], None]] = {
    "save": saved,
    "packed": functools.partial(saved, layout="packed"),
    "base": over_a_base,
    "first": kept,
    "newer": functools.partial(kept, options=ocp.v1.training.Checkpointer),
    "one": functools.partial(kept, max_to_keep=1),
    "one newer": functools.partial(kept, max_to_keep=1, options=ocp.v1.training.Checkpointer),
    "blocking": functools.partial(kept, asynchronous=False),
    "overlapping": functools.partial(kept, wait=False),
    "data": with_data,
    "data newer": functools.partial(with_data, options=ocp.v1.training.Checkpointer),
    "own": in_own_manager,
    "own newer": in_own_checkpointer,
    "converted": converted,
}


if __name__ == "__main__":
    for way in sys.argv[2:]:
        WAYS[way](Path(sys.argv[1], way))
