"""Which outputs of a jaxpr depend on some of its inputs, and therefore which gradients are zero for all values.

A gradient is linear in the cotangent of the loss: it is that cotangent, pulled back through the program.  So the
question "is this leaf's gradient zero for all values?" is answered by the pulled-back program: where the cotangent
never reaches a gradient, the gradient is a constant, and the only linear constant is zero.  JAX's own differentiation
rules have already encoded that `stop_gradient`, `argmax`, comparisons and integers pass nothing, that a custom
derivative returns zeros, and which branch of a loop carries which value.

The result is *structural*: a ReLU that happens to be dead passes its cotangent, and so does not count as a zero
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.compat import jaxprs, primitives
from statewise._src.step.flow import Flow

__all__ = ["differentiably_reached", "reached", "zero_gradients"]

_Flags = tuple[bool, ...]


def zero_gradients(
    loss_of: Callable[..., Any], wrt: Any, *others: Any, overwritten: Sequence[bool] | None = None
) -> list[bool]:
    """Returns, for each array of `wrt`, whether the gradient of the loss with respect to it is zero for all values.

    Nothing is computed: the gradient is only traced.

    Args:
      loss_of: a function of `wrt` and the others that returns a real scalar.
      wrt: a pytree of arrays, concrete or abstract.
      *others: further arguments of `loss_of`.
      overwritten: for each array of `wrt`, whether its gradient is its next value, as that of an amax history is.  Such
        a gradient need not be linear: it is zero only if no input reaches it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from statewise._src.step.dependence import zero_gradients
      >>> zero_gradients(lambda x: x[0] * jax.lax.stop_gradient(x[1]), [jnp.ones(()), jnp.ones(())])
      [False, True]
    """

    def pulled_back(cotangent: Any, wrt: Any, others: Any) -> Any:
        loss, pullback = jax.vjp(lambda wrt: loss_of(wrt, *others), wrt)
        return jax.tree.leaves(pullback(cotangent.astype(loss.dtype)))

    # The cotangent is the first input; a gradient that it does not reach is zero.
    closed = jax.make_jaxpr(pulled_back)(jnp.ones((), jnp.float32), wrt, others)
    count = len(jaxprs.input_types(closed))
    of_cotangent = reached(closed, [True] + [False] * (count - 1))
    if overwritten is None or not any(overwritten):
        return [not is_reached for is_reached in of_cotangent]
    of_any = reached(closed, [True] * count)
    return [not (any_ if is_own else one) for is_own, any_, one in zip(overwritten, of_any, of_cotangent, strict=True)]


def reached(closed: Any, inputs: Sequence[bool]) -> _Flags:
    """Returns, for each output of a jaxpr, whether it depends on one of the chosen inputs.

    A product with zeros that the program itself creates does not depend on anything; whatever else may depend on an
    input is assumed to.

    Args:
      closed: a closed or open jaxpr.
      inputs: for each input, whether it is chosen.
    """
    return _Dependence().outputs(closed, tuple(inputs))


def differentiably_reached(closed: Any, inputs: Sequence[bool]) -> _Flags:
    """Returns, for each output of a jaxpr, whether a gradient may pass from it to one of the chosen inputs.

    This walks the program itself once, where `zero_gradients` traces its gradient.  It errs on one side: an input that
    it reports as not reached has a gradient of zero for all values.

    Args:
      closed: a closed or open jaxpr.
      inputs: for each input, whether it is chosen.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from statewise._src.step.dependence import differentiably_reached
      >>> closed = jax.make_jaxpr(lambda x: (x * 2, jnp.round(x), jnp.argmax(x), x.astype(int) * 1.5))(
      ...     jnp.ones(3)
      ... )
      >>> differentiably_reached(closed, [True])
      (True, False, False, False)
    """
    return _Tangents().outputs(closed, tuple(inputs))


class _Dependence(Flow[bool]):
    """Whether values depend on the chosen inputs."""

    def __init__(self) -> None:
        super().__init__(False, True)
        self._zeros: set[Any] = set()

    def outputs(self, closed: Any, inputs: _Flags) -> _Flags:
        """Returns which outputs of a jaxpr depend on the chosen inputs; walks nothing if none is chosen."""
        if not any(inputs):
            return (False,) * len(jaxprs.inner_jaxpr(closed).outvars)
        return super().outputs(closed, inputs)

    def follow(self, eqn: Any, ins: _Flags, facts: dict[Any, bool]) -> None:
        """Adds which results of an equation depend on the chosen inputs, and which are zero."""
        name = jaxprs.name_of(eqn)
        # A product with a known zero is zero, even if the other factor depends on an input.
        if name in primitives.PRODUCTS and any(map(self._is_zero, eqn.invars)):
            self._zeros.update(eqn.outvars)
        elif any(ins):
            super().follow(eqn, ins, facts)
            # One operand is a reference (`jax.new_ref`): which one is written, or which part is read again, is not
            # tracked, so any may be.
            references = [var for var in eqn.invars if jaxprs.is_reference(var)]
            if references:
                facts.update((var, True) for var in (*references, *eqn.outvars) if _is_inexact(var))
        elif name in primitives.ZERO_OF_ZERO and self._is_zero(eqn.invars[0]):
            self._zeros.update(eqn.outvars)

    def _is_zero(self, var: Any) -> bool:
        if isinstance(var, jaxprs.Literal):
            return np.ndim(var.val) == 0 and bool(np.all(np.asarray(var.val) == 0))
        return var in self._zeros


class _Tangents(_Dependence):
    """Whether values have a derivative with respect to the chosen inputs: only inexact dtypes have any."""

    def through(self, eqn: Any, ins: _Flags) -> _Flags:
        """Returns which results of an equation may have a derivative with respect to its chosen operands."""
        name = jaxprs.name_of(eqn)
        if name in primitives.ZERO_DERIVATIVE:
            # The sign of a complex number has a derivative: it turns with the number.
            is_complex = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating)
            return (name == primitives.SIGN and is_complex and ins[0],) * len(eqn.outvars)
        custom = name in primitives.CUSTOM_DERIVATIVES
        passes = (True,) * len(eqn.outvars) if custom else super().through(eqn, ins)
        return tuple(flag and _is_inexact(var) for var, flag in zip(eqn.outvars, passes, strict=True))


def _is_inexact(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))
