"""Models for the tests of reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw

HOSTILE = "</script><script>harmed = 1</script><img src=x onerror=harmed=1>"


class Tracker(nnx.Variable):
    """A kind of state that no preset names."""


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


class Net(nnx.Module):
    """Several kinds, twelve blocks, tied weights, and a statistic that starts at zero."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(12)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.running_var = nnx.BatchStat(jnp.zeros(16))
        self.half = nnx.Cache(jnp.zeros((4, 512), jnp.bfloat16))
        self.tied = self.embed
        self.seen = Tracker(jnp.zeros((), jnp.int32))


def abstract(shapes: Mapping[str, tuple[int, ...]], dtype: Any = jnp.float32, cls: type = nnx.Param) -> nnx.Module:
    """A module with a leaf of each shape, and no array."""
    return nnx.Dict({name: cls(jax.ShapeDtypeStruct(shape, dtype)) for name, shape in shapes.items()})


def many(leaves: int) -> nnx.Module:
    """A module of many small leaves, ten to a layer, of sizes that differ."""
    layers = [
        abstract({f"w{number}": (8, 1 + (layer * number) % 13) for number in range(10)})
        for layer in range(leaves // 10)
    ]
    return nnx.Dict(layers=nnx.List(layers))


def hostile() -> sw.results.Report:
    """A report in which every text that a user can choose is an attack."""
    cls = type(HOSTILE, (nnx.Variable,), {})
    model = nnx.Dict({HOSTILE: nnx.Dict({HOSTILE: cls(jnp.zeros(3))}), "var": nnx.BatchStat(jnp.zeros(4))})
    other = nnx.Dict({HOSTILE: nnx.Dict({HOSTILE: cls(jnp.ones(3))}), "var": nnx.BatchStat(jnp.zeros(4))})
    return sw.report(model, other)
