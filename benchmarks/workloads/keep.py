"""Keeping: `sw.save` and `sw.restore` against Orbax's `StandardCheckpointer` and safetensors, on the same arrays.

Every call writes into a directory that is not there yet, waits until all is on disk, reads it back onto the device,
and removes it.  What came back is compared with what was written once, before anything is timed.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw
from benchmarks.case import Call
from benchmarks.compare import WrongResultError, table, time_calls
from benchmarks.measure import Settings

__all__ = ["keep"]

# A directory that is not there yet -> what was read back from it.
RoundTrip = Callable[[Path], list[Any]]


def keep(settings: Settings) -> list[dict[str, Any]]:
    """Save and restore of many small and of few large arrays, and what an asynchronous save keeps a loop waiting."""
    small = _arrays(60, 750) if settings.quick else _arrays(1200, 750)
    large = _arrays(2, 1 << 18) if settings.quick else _arrays(8, 1 << 25)
    return [
        _table("keep_small", "Save and restore", small, settings),
        _table("keep_large", "Save and restore", large, settings),
        _blocking(large, settings),
    ]


def _arrays(count: int, size: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {f"leaf_{number:04}": jnp.asarray(rng.standard_normal(size, np.float32)) for number in range(count)}


def _state(arrays: dict[str, jax.Array]) -> sw.State:
    model = nnx.Dict(**{name: nnx.Param(array) for name, array in arrays.items()})
    return sw.plan(model).take(model)


def _ways(arrays: dict[str, jax.Array]) -> dict[str, RoundTrip]:
    import orbax.checkpoint as ocp

    state = _state(arrays)
    abstract = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), arrays
    )

    def ours(layout: str) -> RoundTrip:
        def run(path: Path) -> list[Any]:
            sw.save(path, state, layout=layout)
            return jax.tree.leaves(sw.restore(path, state)[0])

        return run

    def orbax(path: Path) -> list[Any]:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, arrays)
            checkpointer.wait_until_finished()
            return jax.tree.leaves(checkpointer.restore(path, abstract))

    ways = {
        "Statewise": ours("named"),
        'Statewise, `layout="packed"`': ours("packed"),
        "Orbax `StandardCheckpointer`": orbax,
    }
    if importlib.util.find_spec("safetensors") is not None:
        from safetensors.flax import load_file, save_file

        def safetensors(path: Path) -> list[Any]:
            path.mkdir()
            save_file(arrays, path / "all.safetensors")
            return jax.tree.leaves(load_file(path / "all.safetensors"))

        ways["safetensors, which neither syncs nor checks"] = safetensors
    return ways


def _table(key: str, title: str, arrays: dict[str, jax.Array], settings: Settings) -> dict[str, Any]:
    expected = [np.asarray(array) for array in arrays.values()]
    ways = _ways(arrays)
    with tempfile.TemporaryDirectory() as folder:
        for label, way in ways.items():
            found = way(Path(folder) / "checked")
            if not all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True)):
                raise WrongResultError(f"{label}: what came back is not what was written")
            shutil.rmtree(Path(folder) / "checked")
        rows = time_calls(
            {label: _timed(way, Path(folder) / "timed") for label, way in ways.items()}, "Statewise", settings
        )
    made = [{"key": label, "label": label, **rows[label]} for label in ways]
    count, size = len(arrays), sum(array.nbytes for array in expected)
    title = f"{title}, {count:,} arrays, {size / 1e6:,.1f} MB"
    return table(key, title, made, per="round trip", reference="Statewise", arrays=count, bytes=size)


def _timed(way: RoundTrip, path: Path) -> Call:
    def run() -> Any:
        found = way(path)
        jax.block_until_ready(found)
        shutil.rmtree(path)

    return run


def _blocking(arrays: dict[str, jax.Array], settings: Settings) -> dict[str, Any]:
    """How long a loop waits for `Checkpoints.save`; what goes on in the background is waited for outside the clock."""
    state = _state(arrays)
    size = sum(array.nbytes for array in arrays.values())
    saved, copied = [], []
    with tempfile.TemporaryDirectory() as folder, sw.Checkpoints(folder, max_to_keep=1) as checkpoints:
        for step in range(3 if settings.quick else 7):
            saved.append(_seconds(lambda step=step: checkpoints.save(step, state)))
            checkpoints.wait()
            copied.append(_seconds(lambda: [np.array(array, copy=True) for array in arrays.values()]))
    found = {"`checkpoints.save(step, state)` returns": saved[1:], "one copy of all arrays on the host": copied[1:]}
    reference = float(np.median(copied[1:]))
    rows = [
        {
            "key": label,
            "label": label,
            "median_s": float(np.median(samples)),
            "q1_s": float(np.quantile(samples, 0.25)),
            "q3_s": float(np.quantile(samples, 0.75)),
            "samples": len(samples),
            "ratio": float(np.median(samples)) / reference,
            "ratio_q1": float(np.quantile(samples, 0.25)) / reference,
            "ratio_q3": float(np.quantile(samples, 0.75)) / reference,
        }
        for label, samples in found.items()
    ]
    title = f"An asynchronous save of {size / 1e6:,.0f} MB: how long the loop waits"
    return table("keep_async", title, rows, per="save", reference="one copy of all arrays on the host", bytes=size)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
