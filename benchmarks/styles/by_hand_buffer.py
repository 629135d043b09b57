"""`jax.jit` by hand over one flat buffer, donated: the limit of what packing can reach.

All parameters are in one array, and so is each moment of the optimizer.  The compiled function cuts the parameters out
of it, differentiates by them, joins the gradients, and updates whole buffers.  It is cut twice, first into runs of
arrays: equal layers then make equal kernels, which XLA compiles once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.case import Case
from benchmarks.styles.by_hand import ByHand

__all__ = ["ByHandBuffer"]

RUN = 16  # arrays


class ByHandBuffer(ByHand):
    """One buffer of parameters, all of one dtype, and the optimizer's state of it."""

    def __init__(self, case: Case, model: Any, sharding: Any = None) -> None:
        super().__init__(case, model, sharding)
        self.shapes = [array.shape for array in self.params]
        self.params = self.joined(self.params)
        if case.tx is not None:
            self.moments, self.moments_tree = jax.tree.flatten(case.tx.init(self.params))

    def cut(self, params: list[Any]) -> list[Any]:
        starts = range(0, len(self.shapes), RUN)
        runs = [[math.prod(shape) for shape in self.shapes[start : start + RUN]] for start in starts]
        pieces = jax.lax.split(params[0], [sum(run) for run in runs])
        flat = [array for piece, run in zip(pieces, runs, strict=True) for array in jax.lax.split(piece, run)]
        return [array.reshape(shape) for array, shape in zip(flat, self.shapes, strict=True)]

    def joined(self, arrays: list[Any]) -> list[Any]:
        return [jnp.concatenate([array.ravel() for array in arrays])]
