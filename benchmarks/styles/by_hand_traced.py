"""`jax.jit` by hand of a function that is traced before it is differentiated: the limit of a first call like ours.

Whoever wants to know what a function reads and writes has to trace it first.  What is differentiated then is the trace:
the same operations, at the price of one more visit of each.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.extend.core import jaxpr_as_fun

from benchmarks.case import Call, Program
from benchmarks.styles.by_hand import ByHand

__all__ = ["ByHandTraced"]


class ByHandTraced(ByHand):
    """As `ByHand`, but for the trace."""

    def train_fn(self, program: Program) -> Call:
        tx = self.case.tx
        assert tx is not None

        def train(params: Any, moments: Any, rest: Any, *args: Any) -> Any:
            def called(params: Any, rest: Any, args: Any) -> Any:
                model = self.merged(params, [], rest)
                return program.fn(model, *args), self.others(model)

            jaxpr, shape = jax.make_jaxpr(called, return_shape=True)(params, rest, args)
            flat, tree = jaxpr_as_fun(jaxpr), jax.tree.structure(shape)

            def loss_of(params: Any) -> Any:
                return jax.tree.unflatten(tree, flat(*jax.tree.leaves((params, rest, args))))

            (loss, written), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            updates, state = tx.update(grads, jax.tree.unflatten(self.moments_tree, moments), params)
            return optax.apply_updates(params, updates), jax.tree.leaves(state), written, loss

        return train
