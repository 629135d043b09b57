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

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common import compat
from statewise._src.step.effects import body_of

__all__ = ["differentiably_reached", "reached", "zero_gradients"]

_Flags = tuple[bool, ...]


def zero_gradients(loss_of: Callable[..., Any], wrt: Any, *others: Any) -> list[bool]:
    """Returns, for each array of `wrt`, whether the gradient of the loss with respect to it is zero for all values.

    Nothing is computed: the gradient is only traced.

    Args:
      loss_of: a function of `wrt` and the others that returns a real scalar.
      wrt: a pytree of arrays, concrete or abstract.
      *others: further arguments of `loss_of`.

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
    inputs = [True] + [False] * (len(closed.in_avals) - 1)
    return [not is_reached for is_reached in reached(closed, inputs)]


def reached(closed: Any, inputs: Sequence[bool]) -> _Flags:
    """Returns, for each output of a jaxpr, whether it depends on one of the chosen inputs.

    A product with zeros that the program itself creates does not depend on anything; whatever else may depend on an
    input is assumed to.

    Args:
      closed: a closed or open jaxpr.
      inputs: for each input, whether it is chosen.
    """
    return _Walk().outputs(closed, tuple(inputs))


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


class _Walk:
    """Follows values forward through jaxprs; caches the answer for each body and each choice of inputs."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, _Flags], _Flags] = {}

    def outputs(self, closed: Any, inputs: _Flags) -> _Flags:
        jaxpr = compat.inner_jaxpr(closed)
        if not any(inputs):
            return (False,) * len(jaxpr.outvars)
        key = id(jaxpr), inputs  # ids stay valid: the outer jaxpr keeps its bodies alive
        if key not in self.known:
            touched = {var for var, chosen in zip(jaxpr.invars, inputs, strict=True) if chosen}
            zeros: set[Any] = set()
            for eqn in jaxpr.eqns:
                flags = tuple(_is_in(touched, var) for var in eqn.invars)
                # A product with a known zero is zero, even if the other factor depends on an input.
                if eqn.primitive.name in _PRODUCTS and any(_is_zero(zeros, var) for var in eqn.invars):
                    zeros.update(eqn.outvars)
                elif any(flags):
                    through = self.through(eqn, flags)
                    touched.update(var for var, flag in zip(eqn.outvars, through, strict=True) if flag)
                    touched.update(_through_references(eqn))
                elif eqn.primitive.name in _SHAPED and _is_zero(zeros, eqn.invars[0]):
                    zeros.update(eqn.outvars)
            self.known[key] = tuple(_is_in(touched, var) for var in jaxpr.outvars)
        return self.known[key]

    def through(self, eqn: Any, flags: _Flags) -> _Flags:
        """Returns which results of an equation depend on its chosen operands."""
        name = eqn.primitive.name
        if name == "scan":
            return self.through_scan(eqn, flags)
        if name == "while":
            return self.through_while(eqn, flags)
        # Operand 0 is the branch index: if it depends on an input, every result does (the last line).
        if name == "cond" and not flags[0]:
            branches = [self.outputs(branch, flags[1:]) for branch in eqn.params["branches"]]
            return tuple(any(of_branches) for of_branches in zip(*branches, strict=True))
        # A body's inputs may differ from the operands in number (custom rules); then assume that everything depends.
        body = body_of(eqn)
        if body is not None and len(compat.inner_jaxpr(body).invars) == len(flags):
            return self.outputs(body, flags)
        return (True,) * len(eqn.outvars)

    def through_scan(self, eqn: Any, flags: _Flags) -> _Flags:
        consts, carry = compat.scan_counts(eqn)
        length = eqn.params["length"]
        if not length:  # the carry comes out as it went in, and the stacked outputs are empty
            return flags[consts : consts + carry] + (False,) * (len(eqn.outvars) - carry)
        return self.settled(eqn.params["jaxpr"], flags, consts, carry, length)

    def through_while(self, eqn: Any, flags: _Flags) -> _Flags:
        # Operands: the condition's constants, the body's constants, the carried values.
        cond_consts, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = len(flags) - cond_consts - consts
        results = self.settled(eqn.params["body_jaxpr"], flags[cond_consts:], consts, carry)
        carried = tuple(a or b for a, b in zip(results, flags[cond_consts + consts :], strict=True))
        # If the number of iterations depends on an input, so does everything that is carried.
        (count,) = self.outputs(eqn.params["cond_jaxpr"], flags[:cond_consts] + carried)
        return (True,) * carry if count else carried

    def settled(self, body: Any, flags: _Flags, consts: int, carry: int, length: int | None = None) -> _Flags:
        """Returns which results of a loop's body depend on the inputs, after enough iterations of the loop."""
        for iteration in itertools.count(1):
            results = self.outputs(body, flags)
            if iteration == length:
                break
            # A result that depends on an input is carried into the next iteration, as an input of the body.
            carried = tuple(a or b for a, b in zip(flags[consts : consts + carry], results, strict=False))
            grown = flags[:consts] + carried + flags[consts + carry :]
            if grown == flags:
                break
            flags = grown
        return results


# Primitives whose derivatives are zero everywhere.
_FLAT = frozenset({"ceil", "floor", "round", "sign", "stop_gradient"})  # except the sign of a complex number
# Primitives whose gradients are defined by the user, not by their bodies.
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})


class _Tangents(_Walk):
    """Follows derivatives forward: only inexact dtypes have any."""

    def through(self, eqn: Any, flags: _Flags) -> _Flags:
        """Returns which results of an equation may have a derivative with respect to its chosen operands."""
        name = eqn.primitive.name
        if name in _FLAT and not (name == "sign" and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating)):
            return (False,) * len(eqn.outvars)
        passes = (True,) * len(eqn.outvars) if name in _CUSTOM else super().through(eqn, flags)
        return tuple(flag and _is_inexact(var) for var, flag in zip(eqn.outvars, passes, strict=True))


def _through_references(eqn: Any) -> list[Any]:
    """Returns what else may depend on an equation's operands if one is a reference (`jax.new_ref`).

    It does not track which of several references is written, or which part is read again: any may be.
    """
    references = [var for var in eqn.invars if _is_reference(var)]
    return [var for var in (*references, *eqn.outvars) if _is_inexact(var)] if references else []


def _is_reference(var: Any) -> bool:
    return not isinstance(var, compat.Literal) and hasattr(var.aval, "inner_aval")


def _is_inexact(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def _is_in(touched: set[Any], var: Any) -> bool:
    return not isinstance(var, compat.Literal) and var in touched


# Zero if one factor is; and zero if the operand is.
_PRODUCTS = frozenset({"mul", "dot_general"})
_SHAPED = frozenset({"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose", "neg", "copy"})


def _is_zero(zeros: set[Any], var: Any) -> bool:
    if isinstance(var, compat.Literal):
        return np.ndim(var.val) == 0 and bool(np.all(np.asarray(var.val) == 0))
    return var in zeros
