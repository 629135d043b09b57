"""The optimizer of values that their gradient replaces: the scales and amax histories of fp8 layers.

The derivative rules of such layers compute the next value where others compute a gradient.  Flax collects them under
the name `_overwrite_with_gradient` (flax/linen/fp8_ops.py), and its train state stores the gradient as the new value.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

__all__ = ["overwrite_with_gradient", "overwrites"]


def overwrite_with_gradient() -> optax.GradientTransformation:
    """Returns the optimizer of a kind whose leaves are replaced by their gradients, to the bit.

    It has no state.  In `optax.chain`, or any other transformation of Optax, the new value is the gradient only to
    rounding: Optax adds updates to parameters.  With microbatches each part starts from the gradients of the part
    before, and the last part's are stored; a part of weight 0 changes nothing.  In a plan with `PerDevice` kinds, each
    device computes a gradient, and their mean is stored.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Dict(amax=nnx.Param(jnp.array([1.0, 2.0])))
      >>> state = sw.plan(model, optimizers={"params": sw.overwrite_with_gradient()}).take(model)
      >>> @sw.train_step
      ... def train(model, history):
      ...     return jnp.vdot(model.amax[...], history)  # whose gradient is the history
      >>> state, _ = train(state, jnp.array([0.25, 4.0]))
      >>> state["params"]["amax"].tolist()
      [0.25, 4.0]
    """
    return optax.GradientTransformation(_no_state, _replace)


def _no_state(params: Any) -> optax.EmptyState:
    return optax.EmptyState()


def _replace(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    """Returns the updates that turn parameters into their gradients, for transformations that contain this one."""
    return jax.tree.map(lambda grad, param: grad - param, updates, params), state


def overwrites(optimizer: Any) -> bool:
    """Returns whether an optimizer is this one itself, so that its gradients can be stored as they are."""
    return getattr(optimizer, "update", None) is _replace
