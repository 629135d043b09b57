"""Rules of restarts: what a kind's function makes of its leaves, found by tracing it with their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common.compat import jaxprs, primitives
from statewise._src.common.nnx_graph import spec_of
from statewise._src.common.paths import Path
from statewise._src.inspect.lint.finding import Found, Rules, kind_with
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.fresh_values import takes

__all__ = ["RULES"]

RULES = Rules()


@RULES.rule(
    "adapter-of-zeros",
    "the gradient of each factor is a product with the other: if all are zero, the adapter never learns",
)
def adapter_of_zeros(subject: Subject) -> Iterator[Found]:
    """Finds adapters in which every factor is zero, after a restart or now."""
    modules: dict[Path, list[int]] = {}
    for number in subject.of_type(nnx.LoRAParam):
        modules.setdefault(subject.paths[number][:-1], []).append(number)
    restarted, current = [], []
    for numbers in modules.values():
        if len(numbers) < 2:
            continue
        if all(_restarts_at_zero(subject, number) for number in numbers):
            restarted += numbers
        elif all(map(subject.is_zero, numbers)):
            current += numbers
    if restarted:
        kinds = list(dict.fromkeys(subject.claims[number] or "" for number in restarted))
        restart = (
            f"lambda array, key, path: jnp.zeros_like(array) if path[-1] == {subject.name(restarted[-1])!r} else "
            "nnx.initializers.he_uniform()(key, array.shape, array.dtype)"
        )
        yield Found(
            f"The restart of {', '.join(kinds)} makes every factor of an adapter zero.",
            subject.rows(restarted),
            _kind_with_restart(subject, kinds[0], restart),
        )
    if current:
        yield Found(
            "Every factor of an adapter is zero.",
            subject.rows(current),
            f"{subject.target(current[0])} = nnx.LoRAParam(nnx.initializers.he_uniform()(key, shape, dtype))"
            "  # all but one",
        )


def _restarts_at_zero(subject: Subject, number: int) -> bool:
    jaxpr = _restart(subject, number) if subject.is_inexact(number) else None
    return jaxpr is not None and _is_zero(jaxpr)


def _restart(subject: Subject, number: int) -> Any:
    """Returns the jaxpr of a leaf's restart; None if it has none, or if the function raises an error."""
    kind, value = subject.kind(number), subject.values[number]
    spec = None if value is None else spec_of(value)
    if kind is None or kind.restart is None or kind.frozen or spec is None:
        return None
    fresh, wants = kind.restart, takes(kind.restart)
    named: dict[str, Any] = {"path": subject.paths[number]} if wants.path else {}
    shape = list(spec.shape)
    # A function with a key is called for each slot, so its array lacks the axis of the slots.
    if wants.key and kind.batch_axis is not None and -len(shape) <= kind.batch_axis < len(shape):
        del shape[kind.batch_axis]
    array = jax.ShapeDtypeStruct(tuple(shape), spec.dtype)

    def restart(array: jax.Array, key: jax.Array) -> Any:
        return fresh(array, **named, **({"key": key} if wants.key else {}))

    try:
        return jax.make_jaxpr(restart)(array, jax.eval_shape(lambda: jax.random.key(0)))
    except Exception as error:  # a user's function may raise anything; `state.restart` shows the error
        if isinstance(error, MemoryError | RecursionError):
            raise
        return None


def _is_zero(closed: Any) -> bool:
    """Returns whether the results of a jaxpr are zero, without running it: a zero that is broadcast, cast, reshaped."""
    jaxpr = jaxprs.inner_jaxpr(closed)
    known = dict(zip(jaxpr.constvars, jaxprs.consts_of(closed), strict=True))
    return all(_zero_var(jaxpr, known, var) for var in jaxpr.outvars)


def _zero_var(jaxpr: Any, known: dict[Any, Any], var: Any) -> bool:
    """Returns whether a variable of a jaxpr is zero.

    Args:
      jaxpr: the jaxpr.
      known: the values of its constants; for the inputs of an inner jaxpr, whether they are zero.
      var: the variable.
    """
    if isinstance(var, jaxprs.Literal):
        return _all_zero(var.val)
    if var in known:
        return known[var] if isinstance(known[var], bool) else _all_zero(known[var])
    eqn = next((eqn for eqn in jaxpr.eqns if var in eqn.outvars), None)
    if eqn is None:  # an input
        return False
    name = jaxprs.name_of(eqn)
    if name in primitives.ZERO_OF_ZERO:
        return _zero_var(jaxpr, known, eqn.invars[0])
    if name in primitives.PRODUCTS | primitives.SUMS:
        # A product is zero if one factor is, a sum only if both terms are.
        zeros = (_zero_var(jaxpr, known, operand) for operand in eqn.invars)
        return any(zeros) if name in primitives.PRODUCTS else all(zeros)
    if name in primitives.PLAIN_CALLS:
        # The body of a call has variables of its own for the operands and constants.
        inner = jaxprs.body_of(eqn)
        body = jaxprs.inner_jaxpr(inner)
        given = {own: _zero_var(jaxpr, known, outer) for own, outer in zip(body.invars, eqn.invars, strict=True)}
        given |= dict(zip(body.constvars, jaxprs.consts_of(inner), strict=False))
        return _zero_var(body, given, body.outvars[eqn.outvars.index(var)])
    return False


def _all_zero(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return bool(jnp.all(jnp.asarray(value) == 0))


def _kind_with_restart(subject: Subject, name: str, restart: str) -> str:
    # A restore with missing='restart' has no key to pass to the function.
    keep = ", missing='keep'" if subject.kinds[name].missing == "restart" else ""
    return kind_with(name, f"restart={restart}{keep}")


@RULES.rule(
    "restart-draws-alike",
    "every slot, every restart and every leaf of one shape gets the same numbers",
)
def restart_draws_alike(subject: Subject) -> Iterator[Found]:
    """Finds restarts that draw without a key: each time from the same key."""
    for name in subject.kinds:
        numbers = (number for number, claim in enumerate(subject.claims) if claim == name)
        drawing = [number for number in numbers if _draws_alike(subject, number)]
        if drawing:
            yield Found(
                f"The restart of {name} draws from a key of its own.",
                subject.rows(drawing),
                _kind_with_restart(
                    subject, name, "lambda array, key: jax.random.normal(key, array.shape, array.dtype)"
                ),
            )


def _draws_alike(subject: Subject, number: int) -> bool:
    kind = subject.kind(number)
    # The restart of a stream may well draw from the stream that it replaces.
    if kind is None or takes(kind.restart).key or issubclass(subject.types[number], nnx.RngState):
        return False
    jaxpr = _restart(subject, number)
    return jaxpr is not None and _draws(jaxprs.inner_jaxpr(jaxpr))


def _draws(jaxpr: Any) -> bool:
    """Returns whether a jaxpr, or one that its equations call, draws random numbers."""
    return any(jaxprs.name_of(eqn) in primitives.DRAWS for eqn in jaxpr.eqns) or any(
        _draws(jaxprs.inner_jaxpr(body)) for eqn in jaxpr.eqns for body in jaxprs.bodies_of(eqn)
    )
