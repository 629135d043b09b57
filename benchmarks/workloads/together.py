"""Several processes save and restore one state together, on one machine: against one process, and against the limit.

Each process holds an equal part of every array.  The limit is as many programs that know nothing of each other, each
with a state of its own of that size.  All of them wait for a line before each call; what counts is the slowest.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import WrongResultError, numbers_of, table
from benchmarks.measure import Settings
from benchmarks.workloads.disk import DELAY, late_store

__all__ = ["ONE", "VERBS", "WAYS", "child", "together"]

ONE = "statewise-1"
# Who calls, and how many processes: `statewise` and `orbax` together, `apart` each with a state of its own.
WAYS = {
    ONE: "Statewise, one process",
    "statewise-2": "Statewise, two processes",
    "apart-2": "two programs, each with half a state of its own",
    "statewise-4": "Statewise, four processes",
    "apart-4": "four programs, each with a quarter",
    "orbax-1": "Orbax `StandardCheckpointer`, one process",
    "orbax-2": "the same, two processes",
    "orbax-4": "the same, four processes",
}
VERBS = ("save", "restore")
# What is saved: the number of arrays, their shape, and what it is called.
SIZES = {
    "large": (16, (4096, 4096), "16 arrays, 1.07 GB"),
    "small": (1000, (8, 64), "1,000 arrays of 2 kB"),
    "store": (16, (1024, 1024), f"16 arrays, 67 MB, an object store on this machine, {1000 * DELAY:.0f} ms late"),
}
QUICK = {"small": (10, (8, 8), "10 arrays of 256 bytes")}

Times = dict[str, list[float]]


def together(settings: Settings, ways: Sequence[str] = tuple(WAYS)) -> list[dict[str, Any]]:
    """For each size a table of saving and one of restoring."""
    rounds = 2 if settings.quick else 6
    tables = []
    for size, (count, shape, title) in (QUICK if settings.quick else SIZES).items():
        with late_store() if size == "store" else contextlib.nullcontext("") as bucket:
            if bucket is None:
                continue
            found = {way: _run(way, rounds, count, shape, bucket and f"{bucket}/{way}") for way in ways}
        for verb in VERBS:
            numbers = numbers_of({way: times[verb] for way, times in found.items()}, ONE)
            rows = [{"key": way, "label": WAYS[way], **numbers[way]} for way in ways]
            tables.append(table(f"together_{size}_{verb}", f"{verb}, {title}", rows, per="call", reference=ONE))
    return tables


def _run(way: str, rounds: int, count: int, shape: Sequence[int], place: str) -> Times:
    """Seconds of the slowest process, by verb, for each round but the first, which compiles.

    Args:
      way: one of `WAYS`.
      rounds: how many times all is saved and restored.
      count: how many arrays.
      shape: their shape.
      place: a path in an object store; if it is empty, a new directory.
    """
    who, processes = way.split("-")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        told = [place or folder, who, processes, str(port), str(rounds), str(count), *map(str, shape)]
        command = [sys.executable, "-m", "benchmarks.workloads.together"]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device each
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children = [
            subprocess.Popen([*command, str(number), *told], env=environment, **pipes)
            for number in range(int(processes))
        ]
        try:
            times: Times = collections.defaultdict(list)
            for number in range(rounds):
                for verb in VERBS:
                    slowest = max(_called(children))
                    if number:
                        times[verb].append(slowest)
                for path in Path(folder).iterdir():
                    shutil.rmtree(path)
        finally:
            for each in children:
                each.kill()
                each.communicate()
    return times


def _called(children: Sequence[subprocess.Popen[str]]) -> list[float]:
    """Lets all make their next call, when all are ready; returns how long each took."""
    for word in ("ready", "seconds"):
        said = [_said(each, word) for each in children]
        if word == "ready":
            for each in children:
                assert each.stdin is not None
                each.stdin.write("go\n")
                each.stdin.flush()
    return said


def _said(process: subprocess.Popen[str], word: str) -> float:
    """What a process says of a word; its other lines are passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{") and word in (found := json.loads(line)):
            return float(found[word])
    raise WrongResultError(f"a process ended before it said {word!r}")


def child(number: int, folder: str, who: str, processes: int, port: int, rounds: int, count: int, *shape: int) -> None:
    """One process: makes its part of the state, and saves and restores it whenever it is told to."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if who == "apart":
        folder, shape = f"{folder}/{number}", (shape[0] // processes, *shape[1:])
    elif processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, number)
    import numpy as np
    from flax import nnx

    import statewise as sw

    rng = np.random.default_rng(0)
    leaves = {f"leaf_{each:04}": nnx.Param(rng.standard_normal(shape, np.float32)) for each in range(count)}
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    plan = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("devices"))).plan(nnx.Dict(**leaves))
    state = plan.take(nnx.Dict(**leaves), mesh=mesh)
    verbs = _orbax(state) if who == "orbax" else _ours(plan, state, mesh)
    for each in range(rounds):
        for verb in VERBS:
            print(json.dumps({"ready": each}), flush=True)
            sys.stdin.readline()
            start = time.perf_counter()
            arrays = jax.block_until_ready(verbs[verb](f"{folder}/{each}"))
            seconds = time.perf_counter() - start
            if verb == "restore" and not each:
                _check(jax.tree.leaves(state), arrays)
            del arrays
            print(json.dumps({"seconds": seconds}), flush=True)


def _ours(plan: Any, state: Any, mesh: Any) -> Mapping[str, Callable[[str], Any]]:
    import jax

    import statewise as sw

    target = plan.abstract(mesh)
    return {
        "save": lambda path: sw.save(path, state),
        "restore": lambda path: jax.tree.leaves(sw.restore(path, target)[0]),
    }


def _orbax(state: Any) -> Mapping[str, Callable[[str], Any]]:
    import jax
    import orbax.checkpoint as ocp

    arrays = dict(enumerate(jax.tree.leaves(state)))
    tree = {f"leaf_{number:04}": array for number, array in arrays.items()}
    abstract = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding), tree)
    checkpointer = ocp.StandardCheckpointer()

    def save(path: str) -> None:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()

    return {"save": save, "restore": lambda path: jax.tree.leaves(checkpointer.restore(path, abstract))}


def _check(saved: Sequence[Any], restored: Sequence[Any]) -> None:
    import numpy as np

    for one, other in zip(saved, restored, strict=True):
        for mine, theirs in zip(one.addressable_shards, other.addressable_shards, strict=True):
            if not np.array_equal(mine.data, theirs.data):
                raise WrongResultError("what was restored is not what was saved")


if __name__ == "__main__":
    first, place, whose, *numbers = sys.argv[1:]
    child(int(first), place, whose, *map(int, numbers))
