"""The worked example: one small module with four kinds of state, counted kind by kind.

`MultiState` holds two parameters, two running statistics, a counter and a cache: six leaves, of four types.
All of them are `nnx.Variable`s, so a filter on `nnx.Variable` matches all six, and "only the plain ones" must be said
in another way.  With NNX one excludes every other type (`multi_state_filter`): a list that is wrong as soon as the
model gets one more type.  Statewise says it directly (`multi_state_count`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw

__all__ = ["BatchStat", "MultiState", "multi_state_count", "multi_state_filter"]

Number = float | np.ndarray | np.floating | np.integer | jax.Array


class BatchStat(nnx.Variable):
    """A running statistic: this model's own type, not a subclass of `nnx.BatchStat`.

    Example:
      >>> from flax import nnx
      >>> issubclass(BatchStat, nnx.BatchStat)
      False
    """


class MultiState(nnx.Module):
    """A linear layer that carries, beside its parameters, statistics, a counter and a cache.

    Args:
      in_features: the size of the input's last axis.
      hidden: the size of the output's last axis.
      rngs: its stream `params` initializes the kernel.

    Attributes:
      kernel: `nnx.Param` of shape (in_features, hidden), normal with standard deviation 1/sqrt(in_features).
      bias: `nnx.Param` of shape (hidden,), zeros.
      running_mean: `BatchStat` of shape (hidden,), zeros.
      running_var: `BatchStat` of shape (hidden,), ones: a variance of zero would divide by zero downstream.
      step_count: a plain `nnx.Variable`, a float scalar.
      cache: `nnx.Cache` of shape (4, hidden), zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = MultiState(3, 5, nnx.Rngs(0))
      >>> model(jnp.ones(3)).shape
      (5,)
    """

    def __init__(self, in_features: int, hidden: int, rngs: nnx.Rngs) -> None:
        kernel = jax.random.normal(rngs.params(), (in_features, hidden)) / jnp.sqrt(in_features)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((hidden,)))
        self.running_mean = BatchStat(jnp.zeros((hidden,)))
        self.running_var = BatchStat(jnp.ones((hidden,)))
        self.step_count = nnx.Variable(jnp.array(0.0))
        self.cache = nnx.Cache(jnp.zeros((4, hidden)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x of shape (..., in_features) to shape (..., hidden)."""
        return x @ self.kernel + self.bias


def _build(seed: Number, x: jax.Array | np.ndarray, hidden: Number) -> MultiState:
    return MultiState(x.shape[-1], int(hidden), nnx.Rngs(int(seed)))


def multi_state_filter(seed: Number, x: jax.Array | np.ndarray, hidden: Number, eps: Number) -> jax.Array:
    """Counts a fresh model's leaves by type, with NNX's own filters.

    Under a caller's `jax.jit`, `x` and `eps` may be traced; `seed` and `hidden` decide the program's shapes and
    must be concrete.

    Args:
      seed: the seed of the model's parameters, a whole number given as a float.
      x: an array of shape (in_features,); only its shape is used.
      hidden: the model's hidden size, a whole number given as a float.
      eps: a float that changes nothing: it is added times zero.

    Returns:
      A float array of shape (3,): how many leaves are `nnx.Param`, `BatchStat` and plain `nnx.Variable`.

    Raises:
      jax.errors.ConcretizationTypeError: if `seed` or `hidden` is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> multi_state_filter(0.0, jnp.ones(3), 5.0, 1e-3)
      Array([2., 2., 1.], dtype=float32)
    """
    model = _build(seed, x, hidden)
    plain = nnx.All(nnx.Variable, nnx.Not(nnx.Param), nnx.Not(BatchStat), nnx.Not(nnx.Cache))
    counts = [len(jax.tree.leaves(nnx.state(model, of))) for of in (nnx.Param, BatchStat, plain)]
    return jnp.array(counts, dtype=float) + 0.0 * eps


def multi_state_count(seed: Number, x: jax.Array | np.ndarray, hidden: Number, eps: Number) -> jax.Array:
    """Counts the same as `multi_state_filter`, the Statewise way.

    "Plain" is `sw.Exactly(nnx.Variable)`: that type without subclasses.  It stays correct when the model gets another
    type of state.

    Args:
      seed: the seed of the model's parameters, a whole number given as a float.
      x: an array of shape (in_features,); only its shape is used.
      hidden: the model's hidden size, a whole number given as a float.
      eps: a float that changes nothing: it is added times zero.

    Returns:
      A float array of shape (3,): how many leaves are `nnx.Param`, `BatchStat` and plain `nnx.Variable`.

    Raises:
      jax.errors.ConcretizationTypeError: if `seed` or `hidden` is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> multi_state_count(0.0, jnp.ones(3), 5.0, 1e-3)
      Array([2., 2., 1.], dtype=float32)
    """
    model = _build(seed, x, hidden)
    counts = sw.count(model, nnx.Param, BatchStat, sw.Exactly(nnx.Variable))
    return jnp.array(counts, dtype=float) + 0.0 * eps
