"""Time against the number of leaves, of every verb that takes a model, a plan, a state or a checkpoint.

A verb that is quadratic in something is fast at the sizes of tests, and takes minutes at 100,000 leaves.  So each is
timed at sizes that grow tenfold, and an exponent is fitted: 1 is a cost per leaf, 2 is the square.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from benchmarks.compare import table
from benchmarks.measure import Settings, timed

__all__ = ["NO_LEAVES", "VERBS", "Subject", "exponent", "growth"]

LAYERS = 100  # layers in a stage
IN_LAYER = 10  # leaves in a layer
MESH = {"data": 8}


class Layer(nnx.Module):
    """Ten leaves of 100 numbers: eight parameters, a statistic and a cache."""

    def __init__(self, values: Iterator[jax.Array]) -> None:
        for name in ("query", "key", "value", "out", "gate", "up", "down", "norm"):
            setattr(self, name, nnx.Param(next(values)))
        self.mean = nnx.BatchStat(next(values))
        self.cached = nnx.Cache(next(values))


class Stage(nnx.Module):
    """Layers as attributes: to go through an `nnx.List` takes time by the square of its length."""

    def __init__(self, layers: int, values: Iterator[jax.Array]) -> None:
        for number in range(layers):
            setattr(self, f"layer{number}", Layer(values))


class Stages(nnx.Module):
    """A model of so many leaves: a hundred layers in a stage, ten leaves in a layer."""

    def __init__(self, leaves: int, seed: int = 0) -> None:
        layers = leaves // IN_LAYER
        values = np.random.default_rng(seed).normal(size=(leaves, 100)).astype(np.float32)
        rows = iter(jax.device_put(list(values)))
        for number in range(math.ceil(layers / LAYERS)):
            setattr(self, f"stage{number}", Stage(min(LAYERS, layers - number * LAYERS), rows))


@sw.step(writes="cache")
def bump(model: Any) -> jax.Array:
    """One leaf: what a step costs besides its leaves."""
    cached = model.stage0.layer0.cached
    cached.set_raw_value(cached.get_raw_value() + 1)
    return cached.get_raw_value().sum()


class Subject:
    """What verbs are called with, at one size: each thing is made when a verb first asks for it.

    Args:
      leaves: how many leaves the model has.
      folder: an empty folder for checkpoints.
    """

    def __init__(self, leaves: int, folder: Path) -> None:
        self.leaves, self.folder = leaves, folder
        self.model = Stages(leaves)
        self.kinds = sw.Kinds.standard()
        self.filters = [self.kinds[name].of for name in self.kinds]
        self.plan = sw.plan(self.model)
        self.state = self.plan.take(self.model)
        self.other = self.plan.take(Stages(leaves, seed=1))
        self.graphdef, self.parts = sw.split(self.model, self.kinds)
        self.pure = nnx.split(self.model)
        self.mesh = jax.sharding.AbstractMesh(tuple(MESH.values()), tuple(MESH))
        self.watch = sw.watch(self.model)
        self.count = 0
        sw.save(folder / "kept", self.state)
        names = sw.Names({path: path.replace("/", ".") for path in self.paths()})
        self.names = names
        sw.convert(self.state, folder / "published.safetensors", names=names)

    def paths(self) -> list[str]:
        """The paths of the leaves, as text."""
        return [sw.format_path(leaf.path) for leaf in self.plan.leaves]

    def fresh(self) -> Path:
        """A path at which there is nothing."""
        self.count += 1
        return self.folder / f"fresh{self.count}"
