"""`jax.jit` by hand of a function that is traced before it is differentiated: the limit of a first call like ours.

Whoever wants to know what a function reads and writes has to trace it first.  What is differentiated then is the trace:
the same operations, at the price of one more visit of each.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from benchmarks.case import Call
from benchmarks.styles.by_hand import ByHand

__all__ = ["ByHandTraced"]


class ByHandTraced(ByHand):
    """As `ByHand`, but for the trace."""

    def differentiable(self, fn: Call, *operands: Any) -> Call:
        jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*operands)
        flat, tree = jaxpr_as_fun(jaxpr), jax.tree.structure(shape)
        return lambda *operands: jax.tree.unflatten(tree, flat(*jax.tree.leaves(operands)))
