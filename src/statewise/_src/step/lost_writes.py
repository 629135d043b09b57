"""Writes that a function makes under a plain `jax.jit` or `jax.checkpoint`, and that are lost.

A model that is passed through one of these as an argument is flattened and rebuilt for the inner trace.  Writes go to
that copy and disappear with it.  The jaxpr shows it: a new value was computed from the leaf, element by element
(`count + 1`, `0.99 * mean + 0.01 * batch_mean`), and nothing uses it.

A new value that is also used (a cache that attention reads right away) cannot be distinguished from an intermediate
result.  So every reported write was lost, but not every lost write is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from statewise._src.common.compat import jaxprs, primitives
from statewise._src.step.effects import alike

__all__ = ["dropped_inputs"]

# The same elements with another name, placement, dtype or shape: not a new value by itself.
_MOVES = primitives.SAME_VALUE | primitives.RESHAPES | {primitives.CAST}


@dataclasses.dataclass(frozen=True, slots=True)
class _Origin:
    """The input that a value was computed from, element by element.

    Attributes:
      of: the position of the input.
      aval: the input's type, in the body that contains the value.
      changed: whether anything was computed; otherwise the value is the input itself.
    """

    of: int
    aval: Any
    changed: bool


_Tags = tuple[_Origin | None, ...]


def dropped_inputs(closed: Any, inputs: Sequence[int]) -> frozenset[int]:
    """Returns the inputs of a jaxpr that get a new value in the body of a `jax.jit` or `jax.checkpoint` that drops it.

    Args:
      closed: a closed or open jaxpr.
      inputs: the positions of the inputs to look at.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from statewise._src.step.lost_writes import dropped_inputs
      >>> @jax.jit
      ... def run(count, x):
      ...     count = count + 1
      ...     return x * 2
      >>> dropped_inputs(jax.make_jaxpr(run)(jnp.zeros(()), jnp.ones(3)), [0])
      frozenset({0})
    """
    jaxpr = jaxprs.inner_jaxpr(closed)
    chosen = {position: _Origin(position, jaxpr.invars[position].aval, False) for position in inputs}
    tags = tuple(map(chosen.get, range(len(jaxpr.invars))))
    dropped: set[int] = set()
    _walk(jaxpr, tags, dropped, inside=False)
    return frozenset(dropped)


def _walk(jaxpr: Any, tags: _Tags, dropped: set[int], inside: bool) -> _Tags:
    """Follows the chosen inputs through a jaxpr; returns the origins of its outputs, and adds to `dropped`."""
    origins = {var: tag for var, tag in zip(jaxpr.invars, tags, strict=True) if tag is not None}
    if not origins:
        return (None,) * len(jaxpr.outvars)
    used = _used(jaxpr) if inside else set()
    for eqn in jaxpr.eqns:
        operands = tuple(origins.get(var) if not isinstance(var, jaxprs.Literal) else None for var in eqn.invars)
        if not any(operands):
            continue
        for var, tag in zip(eqn.outvars, _through(eqn, operands, dropped, inside), strict=True):
            if tag is None:
                continue
            origins[var] = tag
            # A new value of the leaf's shape and dtype that nothing uses: the write was lost.
            if inside and tag.changed and var not in used and alike(var.aval, tag.aval):
                dropped.add(tag.of)
    return tuple(None if isinstance(var, jaxprs.Literal) else origins.get(var) for var in jaxpr.outvars)


def _used(jaxpr: Any) -> set[Any]:
    """Returns the values that the outputs, or side effects, depend on."""
    used = {var for var in jaxpr.outvars if not isinstance(var, jaxprs.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in used for var in eqn.outvars):
            used.update(var for var in eqn.invars if not isinstance(var, jaxprs.Literal))
    return used


def _through(eqn: Any, operands: _Tags, dropped: set[int], inside: bool) -> _Tags:
    """Returns the origin of each result of an equation."""
    name = jaxprs.name_of(eqn)
    none = (None,) * len(eqn.outvars)
    if name == primitives.SCAN:
        return _in_body(eqn, jaxprs.scan_of(eqn).body, operands, dropped, inside)
    if name == primitives.WHILE:
        loop = jaxprs.while_of(eqn)
        # The constants of the condition come first, and the body does not take them.
        return _in_body(eqn, loop.body, operands[loop.cond_consts :], dropped, inside)
    if name == primitives.COND:
        # Operand 0 is the branch index.  Any branch that passes on an origin will do: this is a heuristic for warnings.
        branches = [_in_body(eqn, branch, operands[1:], dropped, inside) for branch in jaxprs.branches_of(eqn)]
        return tuple(next((tag for tag in tags if tag is not None), None) for tags in zip(*branches, strict=True))
    body = jaxprs.body_of(eqn)
    if body is not None:
        return _in_body(eqn, body, operands, dropped, inside or name in primitives.PLAIN_CALLS)
    if primitives.uses_keys(name):
        return none  # drawing from a key makes another key, not a new value of the stream
    # Element by element: the result has the same shape as the leaf.
    tag = next((operand for operand in operands if operand is not None), None)
    if tag is None or len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape != tag.aval.shape:
        return none
    return (_Origin(tag.of, tag.aval, tag.changed or name not in _MOVES),)


def _in_body(eqn: Any, closed: Any, operands: _Tags, dropped: set[int], inside: bool) -> _Tags:
    """Returns the origins of the results of an equation that calls a body on its operands."""
    jaxpr = jaxprs.inner_jaxpr(closed)
    if len(jaxpr.invars) != len(operands):
        return (None,) * len(eqn.outvars)
    # In a scan's body an operand is one slice: give the origin the slice's type inside, and the array's type outside.
    tags = tuple(
        None if tag is None else dataclasses.replace(tag, aval=var.aval)
        for var, tag in zip(jaxpr.invars, operands, strict=True)
    )
    results = _walk(jaxpr, tags, dropped, inside)
    outside = {tag.of: tag.aval for tag in operands if tag is not None}
    return tuple(
        None if tag is None else dataclasses.replace(tag, aval=outside[tag.of])
        for _, tag in zip(eqn.outvars, results, strict=True)
    )
