"""A model, and the same weights in a folder as models are published: other names, other layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

import statewise as sw

INDEX = "model.safetensors.index.json"


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
        self.q = nnx.LinearGeneral(8, (2, 4), rngs=rngs, param_dtype=dtype)
        self.up = nnx.Linear(8, 6, use_bias=False, rngs=rngs, param_dtype=dtype)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Net(nnx.Module):
    """A tied embedding, layers, dropout, a counter."""

    def __init__(self, seed: int = 0, dtype: Any = jnp.float32) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(10, 8, rngs=rngs, param_dtype=dtype)
        self.layers = nnx.List([Block(rngs, dtype) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs, param_dtype=dtype)
        self.head = self.embed
        self.count = nnx.Variable(jnp.array(3))


NAMES = sw.Names(
    {
        "embed/embedding": "model.embed.weight",
        "head/embedding": "lm_head.weight",
        "layers/{i}/q/kernel": sw.Name("model.layers.{i}.q.weight", "(n h) d -> d n h"),
        "layers/{i}/q/bias": sw.Name("model.layers.{i}.q.bias", "(n h) -> n h"),
        "layers/{i}/up/kernel": sw.Name("model.layers.{i}.up.weight", "o i -> i o"),
        "norm/scale": "model.norm.weight",
        "norm/bias": "model.norm.bias",
        "count": None,
    }
)


def theirs(seed: int = 1, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The file's arrays, made by hand."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed.weight": (10, 8), "model.norm.weight": (8,)}
    shapes["model.norm.bias"] = (8,)
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.q.weight": (8, 8), f"model.layers.{layer}.q.bias": (8,)}
        shapes[f"model.layers.{layer}.up.weight"] = (6, 8)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def check_read(state: sw.State, arrays: dict[str, np.ndarray]) -> None:
    """Compares what was read with the file's arrays, rearranged by NumPy."""
    params = state["params"]
    assert np.array_equal(params["embed"]["embedding"][...], arrays["model.embed.weight"])
    for layer in range(2):
        block, name = params["layers"][layer], f"model.layers.{layer}"
        assert np.array_equal(block["q"]["kernel"][...], arrays[f"{name}.q.weight"].T.reshape(8, 2, 4))
        assert np.array_equal(block["q"]["bias"][...], arrays[f"{name}.q.bias"].reshape(2, 4))
        assert np.array_equal(block["up"]["kernel"][...], arrays[f"{name}.up.weight"].T)
    assert np.array_equal(params["norm"]["scale"][...], arrays["model.norm.weight"])


def folder_of(place: Path, arrays: dict[str, np.ndarray], files: int = 1) -> Path:
    """A folder as models are published, written by the package."""
    place.mkdir()
    if files == 1:
        safetensors.numpy.save_file(arrays, place / "model.safetensors", {"format": "pt"})
        return place
    owner = {name: f"model-{number % files + 1}.safetensors" for number, name in enumerate(arrays)}
    for file in set(owner.values()):
        safetensors.numpy.save_file({name: arrays[name] for name in arrays if owner[name] == file}, place / file)
    (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    return place
