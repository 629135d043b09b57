"""Large states on a disk, as a share of what the disk itself does, and in object stores that answer late.

Random float32 in few large arrays.  Every way goes through the same files in turns, in another order each round; what
it has written is flushed to the disk before the next way begins, and what came back is compared with what was written
once, before anything is timed.  `DISK_GB` in the environment says how much is written, 4 by default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw
from benchmarks.compare import WrongResultError, table
from benchmarks.measure import Settings, quartiles

__all__ = ["ALONE", "LATE", "LOAD_FILE", "ORBAX_STORE", "OURS", "disk", "late_store", "remove_tree"]

OURS, ALONE, LOAD_FILE = "statewise", "alone", "safetensors"
ORBAX_STORE = "orbax-gs"
HELPERS = Path(__file__).parents[2] / "tests" / "helpers"
COUNT = 16
# Seconds that a request to an object store takes longer.
DELAY = 0.02
LATE = f"an object store on this machine, {1000 * DELAY:.0f} ms of added latency"
# The number of bytes that are written or read at a time where a file is written or read by itself.
BLOCK = 1 << 20

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to keep arrays: writes them below a path that does not exist, and reads them back to the device.

    Attributes:
      label: what it is called.
      save: writes, and returns when it says that it has.
      restore: returns the arrays; None if it only reads.
    """

    label: str
    save: Callable[[str], None]
    restore: Callable[[str], Any]


def disk(settings: Settings) -> list[dict[str, Any]]:
    """Save, warm and cold restore of large arrays on a disk; save and restore in object stores."""
    tiny = settings.rounds[0] < 3  # for tests
    size = 1 << 22 if tiny else 1 << 28 if settings.quick else int(float(os.environ.get("DISK_GB", "4")) * 1e9)
    rounds = 1 if tiny else 3 if settings.quick or size > 1 << 31 else 5
    with tempfile.TemporaryDirectory() as folder:
        found = _on_disk(_arrays(size), Path(folder), rounds)
    return found + _in_stores(_arrays(1 << 20 if tiny else 1 << 26), rounds)


def _arrays(size: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shape = (size // COUNT // 4096, 1024)
    return {f"array_{number:02}": jnp.asarray(rng.standard_normal(shape, np.float32)) for number in range(COUNT)}


def _state(arrays: Arrays) -> sw.State:
    model = nnx.Dict(**{name: nnx.Param(array) for name, array in arrays.items()})
    return sw.plan(model).take(model, copy=False)


# --- ways ------------------------------------------------------------------------------------------------------


def _ours(arrays: Arrays) -> Way:
    state = _state(arrays)
    target = sw.plan(nnx.Dict(**{name: nnx.Param(array) for name, array in arrays.items()})).abstract()
    return Way(
        "Statewise", lambda path: sw.save(path, state), lambda path: jax.tree.leaves(sw.restore(path, target)[0])
    )


def _alone(arrays: Arrays) -> Way:
    host = [np.asarray(array) for array in arrays.values()]

    def save(path: str) -> None:
        with open(path, "wb", buffering=0) as file:
            for array in host:
                left = memoryview(array.reshape(-1).view(np.uint8))
                while left:
                    left = left[file.write(left[:BLOCK]) :]
            os.fsync(file.fileno())

    def restore(path: str) -> None:
        block = bytearray(BLOCK)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass

    return Way("the disk alone: a file, written and flushed, or read", save, restore)


def _safetensors(arrays: Arrays) -> Way:
    from safetensors.numpy import load_file, save_file

    host = {name: np.asarray(array) for name, array in arrays.items()}
    return Way(
        "safetensors and `jax.device_put`, neither flushed nor checked",
        lambda path: save_file(host, path),
        lambda path: [jax.device_put(array) for _, array in sorted(load_file(path).items())],
    )


def _orbax(arrays: Arrays) -> Way:
    import orbax.checkpoint as ocp

    def save(path: str) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, dict(arrays))

    def restore(path: str) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return jax.tree.leaves(checkpointer.restore(path, _abstract(arrays)))

    return Way("Orbax `StandardCheckpointer`", save, restore)


def _orbax_v1(arrays: Arrays) -> Way:
    import orbax.checkpoint as ocp

    return Way(
        "Orbax `v1.save` and `v1.load`",
        lambda path: ocp.v1.save(path, dict(arrays)),
        lambda path: jax.tree.leaves(ocp.v1.load(path, _abstract(arrays))),
    )


def _torch(arrays: Arrays) -> Way:
    import torch
    import torch.distributed.checkpoint as dcp

    tensors = {name: torch.from_dlpack(array) for name, array in arrays.items()}  # the same memory

    def restore(path: str) -> Any:
        found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        dcp.load(found, checkpoint_id=path)
        return [jax.device_put(tensor.numpy()) for tensor in found.values()]

    return Way("PyTorch's distributed checkpoint", lambda path: dcp.save(tensors, checkpoint_id=path), restore)


def _abstract(arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding) for name, array in arrays.items()
    }


def _ways(arrays: Arrays) -> dict[str, Way]:
    ways = {OURS: _ours(arrays), ALONE: _alone(arrays)}
    if importlib.util.find_spec("safetensors") is not None:
        ways[LOAD_FILE] = _safetensors(arrays)
    ways |= {"orbax": _orbax(arrays), "orbax-v1": _orbax_v1(arrays)}
    if importlib.util.find_spec("torch") is not None:
        ways["torch"] = _torch(arrays)
    return ways


# --- on a disk -------------------------------------------------------------------------------------------------


def _on_disk(arrays: Arrays, folder: Path, rounds: int) -> list[dict[str, Any]]:
    ways = _ways(arrays)
    saved: dict[str, list[float]] = {name: [] for name in ways}
    warm: dict[str, list[float]] = {name: [] for name in ways}
    cold: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):  # the first one warms up
        shuffle(order)
        for name in order:
            path = folder / name
            saved[name].append(_seconds(lambda path=path, name=name: ways[name].save(str(path))))
            _forget(path)
        for name in order:
            cold[name].append(_read(ways[name], folder / name, arrays, check=number == 0))
        for name in order:
            _read(ways[name], folder / name, arrays)  # so that its files are in the system's cache, and the last there
            warm[name].append(_read(ways[name], folder / name, arrays))
            _remove(folder / name)
    facts: dict[str, Any] = {"arrays": len(arrays), "bytes": sum(array.nbytes for array in arrays.values())}
    labels = {name: way.label for name, way in ways.items()}
    return [
        _table("disk_save", "Save on a disk", "save", labels, saved, ALONE, facts),
        _table("disk_warm", "Restore, from the system's cache", "restore", labels, warm, OURS, facts),
        _table("disk_cold", "Restore, from the disk", "restore", labels, cold, OURS, facts),
    ]


def _read(way: Way, path: Path, arrays: Arrays, *, check: bool = False) -> float:
    found: list[Any] = []
    seconds = _seconds(lambda: found.append(jax.block_until_ready(way.restore(str(path)))))
    _check(way, found.pop(), arrays, check)
    return seconds


def _check(way: Way, found: Any, arrays: Arrays, check: bool) -> None:
    if not check or found is None:
        return
    if not all(np.array_equal(one, other) for one, other in zip(found, arrays.values(), strict=True)):
        raise WrongResultError(f"{way.label}: what came back is not what was written")


def _forget(path: Path) -> None:
    """Flushes what is at a path, and removes it from the system's cache."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remove(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)


def remove_tree(path: str) -> None:
    """Removes everything below a path, also in the emulated store; nothing has to be there."""
    if not path.startswith("gs://"):
        shutil.rmtree(path, ignore_errors=True)
        return
    bucket, _, prefix = path.removeprefix("gs://").partition("/")
    objects = f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}/o"
    with urllib.request.urlopen(f"{objects}?prefix={urllib.parse.quote(prefix + '/', safe='')}") as answer:
        names = [found["name"] for found in json.load(answer).get("items", ())]
    for name in names:
        request = urllib.request.Request(f"{objects}/{urllib.parse.quote(name, safe='')}", method="DELETE")
        with urllib.request.urlopen(request):
            pass


# --- in object stores ------------------------------------------------------------------------------------------


def _in_stores(arrays: Arrays, rounds: int) -> list[dict[str, Any]]:
    """Steps that a manager keeps in an emulated object store, each of whose answers is late."""
    ways = {OURS: _our_manager(arrays), ORBAX_STORE: _orbax_manager(arrays)}
    labels = {OURS: "`sw.Checkpoints`, gs://", ORBAX_STORE: "Orbax `CheckpointManager`, gs://"}
    saved: dict[str, list[float]] = {name: [] for name in ways}
    restored: dict[str, list[float]] = {name: [] for name in ways}
    with late_store() as bucket:
        for number in range(rounds + 1) if bucket else ():
            for name in sorted(ways, reverse=number % 2 == 1):
                path = f"{bucket}/{name}-{number}"
                saved[name].append(_seconds(lambda path=path, name=name: ways[name].save(path)))
                restored[name].append(_read_store(ways[name], path, arrays, check=number == 0))
                remove_tree(path)
    if not bucket:
        return []
    facts = {"arrays": len(arrays), "bytes": sum(array.nbytes for array in arrays.values())}
    return [
        _table("disk_store_save", f"Save in {LATE}", "save", labels, saved, OURS, facts),
        _table("disk_store_restore", f"Restore from {LATE}", "restore", labels, restored, OURS, facts),
    ]


def _read_store(way: Way, path: str, arrays: Arrays, *, check: bool) -> float:
    found: list[Any] = []
    seconds = _seconds(lambda: found.append(jax.block_until_ready(way.restore(path))))
    _check(way, found.pop(), arrays, check)
    return seconds


def _our_manager(arrays: Arrays) -> Way:
    state = _state(arrays)

    def save(path: str) -> None:
        with sw.Checkpoints(path) as checkpoints:
            checkpoints.save(0, state)

    def restore(path: str) -> Any:
        with sw.Checkpoints(path) as checkpoints:
            return jax.tree.leaves(checkpoints.restore(state, step=0)[0])

    return Way("Statewise", save, restore)


def _orbax_manager(arrays: Arrays) -> Way:
    import orbax.checkpoint as ocp

    def save(path: str) -> None:
        with ocp.CheckpointManager(path) as manager:
            manager.save(0, args=ocp.args.StandardSave(dict(arrays)))

    def restore(path: str) -> Any:
        with ocp.CheckpointManager(path) as manager:
            return jax.tree.leaves(manager.restore(0, args=ocp.args.StandardRestore(_abstract(arrays))))

    return Way("Orbax", save, restore)


@contextlib.contextmanager
def late_store() -> Iterator[str | None]:
    """Yields an empty bucket of an emulator that answers late; None if there is no emulator."""
    sys.path.append(str(HELPERS))
    import gcs_server
    import proxy

    missing = gcs_server.binary() if importlib.util.find_spec("gcsfs") else "gcsfs is not installed"
    if isinstance(missing, str):
        print(f"The tables of object stores are left out: {missing}.", flush=True)
        yield None
        return
    with gcs_server.gcs_server() as server:
        gcs_server.create_bucket(server.url, "bucket")
        server.faults = [proxy.delay(DELAY)]
        settings = gcs_server.environment(server.url)
        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # there are no credentials, and none are needed
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield "gs://bucket"
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


# --- numbers ---------------------------------------------------------------------------------------------------


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _table(
    key: str,
    title: str,
    per: str,
    labels: Mapping[str, str],
    found: Mapping[str, list[float]],
    reference: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    rows = []
    for name, (_, *samples) in found.items():  # without the first round
        low, middle, high = quartiles(samples)
        ratios = quartiles([one / other for one, other in zip(samples, found[reference][1:], strict=True)])
        rows.append(
            {
                "key": name,
                "label": labels[name],
                **{"median_s": middle, "q1_s": low, "q3_s": high, "samples": len(samples)},
                **dict(zip(("ratio_q1", "ratio", "ratio_q3"), ratios, strict=True)),
            }
        )
    title = f"{title}, {facts['arrays']} arrays, {facts['bytes'] / 1e6:,.0f} MB"
    return table(key, title, rows, per=per, reference=reference, **facts)
