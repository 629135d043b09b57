"""One of several processes that save to an object store, of which the last one is refused, or is killed; or to a disk.

`python fail_in_store.py NUMBER COUNT PORT FOLDER WAY URL SAVE ...`: each save is a number, with which `refused`, `full`
(the disk), `killed` or `silent` may stand.  What it says is printed after its number.  After such a save the processes
wait for `go` in the folder, or go on if it is there.  Run by test_store_together.py.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

import numbered
import statewise as sw
from programs.save_failing import fails, said
from programs.save_together import spread
from statewise._src.checkpoint.orbax.write import TreeWriter

PATIENCE = 3.0  # seconds, after which one that waits for a step of a killed process says so
LIMIT = 10  # seconds, after which the others go on without one that is silent
write = TreeWriter.write


def dies(*args: Any) -> None:
    """Writes all that this process has to, and ends it as a machine does that is taken away."""
    write(*args)
    os.kill(os.getpid(), signal.SIGKILL)


def options(way: str, limit: int) -> Any:
    """Returns the options of one of Orbax's interfaces, whose processes wait for each other for so many seconds."""
    if way == "first":
        return ocp.CheckpointManagerOptions(async_options=ocp.options.AsyncOptions(timeout_secs=limit))
    context = ocp.v1.Context()
    context.asynchronous.timeout_secs = limit
    return functools.partial(ocp.v1.training.Checkpointer, context=context)


def saving(way: str, url: str, limit: int) -> Callable[[int, str], None]:
    """Returns what saves the state of a number: alone, or as a step."""
    if way == "alone":
        return lambda number, _: sw.save(f"{url}/{number}", spread(numbered.state(number)))
    checkpoints = sw.Checkpoints(url, options=options(way, limit))

    def save(number: int, what: str) -> None:
        checkpoints.save(number, spread(numbered.state(number)), metrics={"loss": number / 4})
        checkpoints.wait(timeout=PATIENCE if what == "killed" else None)

    return save


def main(number: int, count: int, port: str, folder: str, way: str, url: str, *saves: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    save = saving(way, url, LIMIT if any("silent" in given for given in saves) else 1200)
    go = Path(folder, "go")

    def waits(*_: Any) -> None:
        while not go.exists():
            time.sleep(0.01)

    ways = {"killed": dies, "full": fails, "silent": waits}
    for given in saves:
        name, _, what = given.partition(" ")
        if number == count - 1:
            TreeWriter.write = ways.get(what, write)  # type: ignore[method-assign]
        print(name, said(functools.partial(save, int(name), what)), flush=True)
        if what:
            waits()
    os._exit(0)  # JAX would wait for the process that has ended


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
