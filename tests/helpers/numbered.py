"""States that follow from a number, and are made without compiling anything: for programs that live a moment.

The arrays have several dtypes and sizes; those of two numbers differ in every leaf.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw


class Numbered(nnx.Module):
    """A model whose values say its number."""

    def __init__(self, number: int) -> None:
        dice = np.random.default_rng(number)
        self.kernel = nnx.Param(jax.device_put(dice.standard_normal((64, 48), np.float32)))
        self.half = nnx.Param(jax.device_put(dice.standard_normal((33,), np.float32).astype(jnp.bfloat16)))
        self.blocks = nnx.List([nnx.Param(jax.device_put(dice.standard_normal((16, 8), np.float32))) for _ in range(6)])
        self.mean = nnx.BatchStat(jax.device_put(dice.standard_normal((48,), np.float32)))
        self.count = nnx.Variable(jax.device_put(np.int32(number)))
        self.bytes = nnx.Variable(jax.device_put(dice.integers(0, 256, (7, 11), np.uint8)))


@functools.cache
def plan() -> sw.Plan:
    """Of these models."""
    return sw.plan(Numbered(0))


def state(number: int) -> sw.State:
    """The state of a number."""
    return plan().take(Numbered(number))
