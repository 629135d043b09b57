"""The declaration of an average: how a copy of some leaves follows them.

An `EMA` is pure data, like a `Kind`: a decay, a name and a dtype.  `kinds.plan(..., averages={"params":
sw.EMA(0.999)})` says which kinds it tracks.  `plan/averages` resolves that against a model, `step/average_update` runs
it inside a train step, and `core/averages` swaps the averages in for the values they track.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise.errors import DeclarationError

__all__ = ["EMA"]


@dataclasses.dataclass(frozen=True)
class EMA:
    """An exponential moving average: after each update, `average = decay * average + (1 - decay) * value`.

    It starts as a copy of the values.  As a kind's filter, `sw.Kind(sw.EMA, ...)`, it declares how the averages of that
    name are handled: their placement, or what a restore does when the checkpoint has none.

    Args:
      decay: a number in [0, 1): 0 follows the value exactly; or a schedule like Optax's, a function from the number of
        updates so far (int32, 0 at the first update) to such a number.
      name: the name of the kind that holds the averages, and the argument of `state.with_averages`.
      dtype: the dtype of the averages of floating-point leaves.  By default the leaf's own, but float32 for leaves of
        less than 32 bits: in bfloat16, 0.999 times a number rounds to the number itself.

    Raises:
      DeclarationError: the decay is outside [0, 1), the name is not a string, or the dtype is not a floating-point
        dtype.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> plan = sw.plan(
      ...     model,
      ...     optimizers={"params": optax.sgd(0.1)},
      ...     averages={"params": [sw.EMA(0.999), sw.EMA(0.5, name="fast")]},
      ... )
      >>> [sw.format_path(leaf.path) for leaf in plan["ema"]]
      ['ema/params/bias', 'ema/params/kernel']
      >>> @sw.train_step
      ... def train(model, x):
      ...     return model(x).sum()
      >>> state, loss = train(plan.take(model), jnp.ones(2))
      >>> state["params"]["bias"], state.with_averages("fast")["params"]["bias"]
      (Array([-0.1, -0.1, -0.1], dtype=float32), Array([-0.05, -0.05, -0.05], dtype=float32))
    """

    decay: float | Callable[[Any], Any]
    _: dataclasses.KW_ONLY
    name: str = "ema"
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self) -> None:
        if isinstance(self.decay, int | float | np.integer | np.floating) and not isinstance(self.decay, bool):
            if not 0 <= self.decay < 1 or math.isnan(self.decay):
                raise DeclarationError(f"decay={self.decay!r} is not in [0, 1).", hint="sw.EMA(0.999)")
            object.__setattr__(self, "decay", float(self.decay))
        elif isinstance(self.decay, type) or not callable(self.decay):
            shown = repr(self.decay) if isinstance(self.decay, str | bool) else type(self.decay).__name__
            raise DeclarationError(
                f"decay={shown} is not a number in [0, 1), nor a function of the number of updates.",
                hint="sw.EMA(0.999), or sw.EMA(lambda n: jnp.minimum(0.999, (1 + n) / (10 + n)))",
            )
        elif not isinstance(self.decay, Hashable):
            raise DeclarationError(
                f"decay={type(self.decay).__name__}(...) cannot be hashed, as every part of a declaration must be.",
                hint="sw.EMA(lambda n: ...)",
            )
        if not isinstance(self.name, str):
            raise DeclarationError(
                f"name={type(self.name).__name__}(...) is not a string.", hint="sw.EMA(0.999, name='ema')"
            )
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _floating(self.dtype))

    @property
    def schedule(self) -> Callable[[Any], Any] | None:
        """Returns the decay if it is a function of the number of updates, else None."""
        return self.decay if callable(self.decay) else None

    def dtype_of(self, dtype: Any) -> Any:
        """Returns the dtype of the average of a leaf of this dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return dtype  # complex: a floating-point dtype would drop the imaginary part
        if self.dtype is not None:
            return self.dtype
        return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def _floating(given: Any) -> Any:
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = repr(given) if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
        raise DeclarationError(f"dtype={shown} is not a floating-point dtype.", hint="sw.EMA(0.999, dtype=jnp.float32)")
    return dtype
