"""A tiny model with leaves of the awkward sorts, its checkpoints, and how to tell whether a restore was right."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from strategies import Node


def model(seed: int = 0) -> Node:
    """A Dropout key, a BatchNorm, integer keys, a tied layer, bfloat16, a value that is a dict."""
    first = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
    return Node(
        layers=nnx.List([first, nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(seed + 1))]),
        tied=first,
        half=nnx.Param(jnp.arange(5, dtype=jnp.bfloat16) + seed),
        several=nnx.Variable({"a": jnp.arange(4) + seed, "b": jnp.ones((2, 2), jnp.uint8)}, ref=False),
    )


@functools.cache
def plan() -> sw.Plan:
    """Of that model, with Adam."""
    return sw.plan(model(), optimizers={"params": optax.adam(0.1)})


@functools.cache
def state(seed: int = 0) -> sw.State:
    """One whose values depend on the seed."""
    return plan().take(model(seed))


def words(value: sw.State) -> list[tuple[str, tuple[int, ...], bytes]]:
    """All that a state holds, to compare bit by bit."""
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(value)
    ]
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def files(folder: Any) -> list[str]:
    """Every file of a checkpoint."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
