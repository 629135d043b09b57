"""Reading published weights: `sw.restore(names=)` against safetensors' own reader and `jax.device_put`, of one folder.

The files are in the page cache for all of them: what is compared is the work, and the last row is the rate at which
the system hands out the bytes.  What was read is compared once, before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw
from benchmarks.compare import WrongResultError, table, time_calls
from benchmarks.measure import Settings

__all__ = ["names"]

REFERENCE = "`safetensors.numpy.load_file`, then `jax.device_put`"
AS_IT_IS = "`sw.restore(names=)`, as the arrays are"
TURNED = "`sw.restore(names=)`, kernels transposed, layers stacked"
BYTES = "the bytes alone: `path.read_bytes()`"


class Same(nnx.Module):
    """Layers as the files have them."""

    def __init__(self, layers: int, width: int) -> None:
        layer = lambda: nnx.Dict(up=nnx.Param(jnp.zeros((4 * width, width))), norm=nnx.Param(jnp.zeros(width)))  # noqa: E731
        self.layers = nnx.List([layer() for _ in range(layers)])


class Stacked(nnx.Module):
    """The same layers as one, with inputs before outputs."""

    def __init__(self, layers: int, width: int) -> None:
        self.up = nnx.Param(jnp.zeros((layers, width, 4 * width)))
        self.norm = nnx.Param(jnp.zeros((layers, width)))


OF_SAME = sw.Names({"layers/{i}/up": "model.layers.{i}.up.weight", "layers/{i}/norm": "model.layers.{i}.norm.weight"})


def names(settings: Settings) -> list[dict[str, Any]]:
    """A folder of a few hundred megabytes, read again and again."""
    layers, width = (4, 256) if settings.quick else (8, 1536)
    rng = np.random.default_rng(0)
    arrays = {}
    for layer in range(layers):
        arrays[f"model.layers.{layer}.up.weight"] = rng.standard_normal((4 * width, width), np.float32)
        arrays[f"model.layers.{layer}.norm.weight"] = rng.standard_normal(width, np.float32)
    size = sum(array.nbytes for array in arrays.values())
    with tempfile.TemporaryDirectory() as folder:
        calls = _ways(Path(folder), arrays, layers, width)
        rows = time_calls(calls, REFERENCE, settings)
    made = [{"key": label, "label": label, **rows[label]} for label in calls]
    title = f"Reading {len(arrays)} published arrays, {size / 1e6:,.0f} MB, from the page cache"
    return [table("names", title, made, per="folder", reference=REFERENCE, arrays=len(arrays), bytes=size)]


def _ways(folder: Path, arrays: dict[str, np.ndarray], layers: int, width: int) -> dict[str, Callable[[], Any]]:
    import safetensors.numpy

    path = folder / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    same = sw.plan(nnx.eval_shape(lambda: Same(layers, width))).abstract()
    stacked = sw.plan(nnx.eval_shape(lambda: Stacked(layers, width))).abstract()
    of_stacked = sw.Names(
        {
            "up": sw.Name("model.layers.{i}.up.weight", "layer o i -> layer i o"),
            "norm": "model.layers.{i}.norm.weight",
        }
    )
    restored, _ = sw.restore(folder, same, names=OF_SAME)
    turned, _ = sw.restore(folder, stacked, names=of_stacked)
    for layer in range(layers):
        up = arrays[f"model.layers.{layer}.up.weight"]
        found = restored["params"]["layers"][layer]["up"][...], turned["params"]["up"][...][layer].T
        if not all(np.array_equal(each, up) for each in found):
            raise WrongResultError(f"layer {layer}: what came back is not what was written")
    return {
        REFERENCE: lambda: jax.device_put(safetensors.numpy.load_file(path)),
        AS_IT_IS: lambda: sw.restore(folder, same, names=OF_SAME)[0],
        TURNED: lambda: sw.restore(folder, stacked, names=of_stacked)[0],
        BYTES: lambda: len(path.read_bytes()),
    }
