"""Several processes save and restore one state together, on one machine: against one process, and against the limit.

Each process holds an equal part of every array.  The limit is as many programs that know nothing of each other, each
with a state of its own of that size.  All of them wait for a line before each call; what counts is the slowest.  No
process holds more than its part of the state, and what it has restored.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.compare import WrongResultError, numbers_of, table
from benchmarks.measure import Settings
from benchmarks.workloads.disk import LATE, late_store, remove_tree

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
    "large": (8, (4096, 4096), "8 arrays, 537 MB"),
    "small": (1000, (8, 64), "1,000 arrays of 2 kB"),
    "store": (16, (1024, 1024), f"16 arrays, 67 MB, {LATE}"),
}
QUICK = {"small": (10, (8, 8), "10 arrays of 256 bytes")}

# Seconds that a start, or one call, may take before the processes are ended.
LONGEST = 300


def together(settings: Settings, ways: Sequence[str] = tuple(WAYS)) -> list[dict[str, Any]]:
    """For each size a table of saving and one of restoring."""
    rounds = 2 if settings.quick else 6
    tables = []
    for size, (count, shape, title) in (QUICK if settings.quick else SIZES).items():
        place = late_store() if size == "store" else tempfile.TemporaryDirectory()
        with place as folder:
            if folder is None:  # there is no emulator
                continue
            found = _measured(ways, rounds, count, shape, folder)
        for verb in VERBS:
            cached = "" if verb == "save" or size == "store" else " from the system's cache"
            numbers = numbers_of(found[verb], ONE)
            rows = [{"key": way, "label": WAYS[way], **numbers[way]} for way in ways]
            tables.append(table(f"together_{size}_{verb}", f"{verb}{cached}, {title}", rows, per="call", reference=ONE))
    return tables


def _measured(
    ways: Sequence[str], rounds: int, count: int, shape: Sequence[int], place: str
) -> dict[str, dict[str, list[float]]]:
    """Seconds of the slowest process, by verb and way, for each round but the first, which compiles.

    The processes of all ways live from the first round to the last; the ways make their calls one after the other, in
    another order each round.
    """
    times: dict[str, dict[str, list[float]]] = {verb: {way: [] for way in ways} for verb in VERBS}
    with contextlib.ExitStack() as stack:
        running = {way: stack.enter_context(_processes(way, rounds, count, shape, f"{place}/{way}")) for way in ways}
        for number in range(rounds):
            for way in random.sample(list(ways), len(ways)):
                for verb in VERBS:
                    os.sync()  # what others wrote is not flushed during this call
                    slowest = max(_called(running[way]))
                    if number:
                        times[verb][way].append(slowest)
                remove_tree(f"{place}/{way}")
    return times


@contextlib.contextmanager
def _processes(
    way: str, rounds: int, count: int, shape: Sequence[int], place: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts the processes of a way, and ends them."""
    who, processes = way.split("-")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = [place, who, processes, str(port), str(rounds), str(count), *map(str, shape)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device each
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children: list[subprocess.Popen[str]] = []

    try:
        for number in range(int(processes)):
            command = [sys.executable, "-m", "benchmarks.workloads.together", str(number), *told]
            children.append(subprocess.Popen(command, env=environment, **pipes))
        _all_said(children, "ready")
        yield children
    finally:
        _end(children)
        for each in children:
            each.communicate()


def _end(children: Sequence[subprocess.Popen[str]]) -> None:
    for each in children:
        each.kill()


def _called(children: Sequence[subprocess.Popen[str]]) -> list[float]:
    """Lets all make their next call; returns how long each took."""
    for each in children:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    return _all_said(children, "seconds")


def _all_said(children: Sequence[subprocess.Popen[str]], word: str) -> list[float]:
    """What each says of a word; all are ended when that takes too long, which whoever waits for a line then sees."""
    watchdog = threading.Timer(LONGEST, _end, [children])
    watchdog.start()
    try:
        return [_said(each, word) for each in children]
    finally:
        watchdog.cancel()


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

    rng = np.random.default_rng(number)
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    part = (shape[0] // jax.device_count(), *shape[1:])  # no process has more than that of an array
    model = nnx.Dict(
        {
            f"leaf_{each:04}": nnx.Param(
                jax.make_array_from_callback(shape, sharding, lambda _: rng.standard_normal(part, np.float32))
            )
            for each in range(count)
        }
    )
    plan = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("devices"))).plan(model)
    state = plan.take(model, mesh=mesh)
    del model
    gc.collect()
    verbs = _orbax(state) if who == "orbax" else _ours(plan, state, mesh)
    print(json.dumps({"ready": number}), flush=True)
    for each in range(rounds):
        for verb in VERBS:
            if not sys.stdin.readline():  # whoever asked has ended
                return
            start = time.perf_counter()
            arrays = jax.block_until_ready(verbs[verb](f"{folder}/{each}"))
            seconds = time.perf_counter() - start
            if verb == "restore":
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
    try:
        child(int(first), place, whose, *map(int, numbers))
    except Exception:  # noqa: BLE001  whatever it is, it is shown, and the parent sees that this process has ended
        traceback.print_exc()
        os._exit(1)  # JAX would wait for the other processes first
