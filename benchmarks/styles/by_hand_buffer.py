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
import optax

from benchmarks.case import Call, Case, Program
from benchmarks.styles.by_hand import ByHand

__all__ = ["ByHandBuffer"]

RUN = 16  # arrays


class ByHandBuffer(ByHand):
    """One buffer of parameters, all of one dtype, and the optimizer's state of it."""

    def __init__(self, case: Case, model: Any, sharding: Any = None) -> None:
        super().__init__(case, model, sharding)
        self.shapes = [array.shape for array in self.params]
        self.params = [jnp.concatenate([array.ravel() for array in self.params])]
        if case.tx is not None:
            self.moments, self.moments_tree = jax.tree.flatten(case.tx.init(self.params))

    def cut(self, buffer: jax.Array) -> list[jax.Array]:
        """The arrays in a buffer."""
        starts = range(0, len(self.shapes), RUN)
        runs = [[math.prod(shape) for shape in self.shapes[start : start + RUN]] for start in starts]
        pieces = jax.lax.split(buffer, [sum(run) for run in runs])
        flat = [array for piece, run in zip(pieces, runs, strict=True) for array in jax.lax.split(piece, run)]
        return [array.reshape(shape) for array, shape in zip(flat, self.shapes, strict=True)]

    def train_fn(self, program: Program) -> Call:
        tx = self.case.tx
        assert tx is not None

        def train(params: Any, moments: Any, rest: Any, *args: Any) -> Any:
            def loss_of(arrays: Any) -> Any:
                model = self.merged(arrays, [], rest)
                return program.fn(model, *args), self.others(model)

            (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(self.cut(params[0]))
            joined = [jnp.concatenate([grad.ravel() for grad in grads])]
            updates, state = tx.update(joined, jax.tree.unflatten(self.moments_tree, moments), params)
            return optax.apply_updates(params, updates), jax.tree.leaves(state), rest, loss

        return train
