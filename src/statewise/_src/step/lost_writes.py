"""Writes that a function makes under a plain `jax.jit` or `jax.checkpoint`, and that never come back out.

A model that goes through one of these as an argument is taken apart and put together again for the inner trace.  What
is written there is written to that copy, and dropped with it.  The program shows it: the new value was computed from
the leaf, element by element (`count + 1`, `0.99 * mean + 0.01 * batch_mean`), and nobody uses it.

A new value that is used as well (a cache that attention reads at once) cannot be told from one that was not meant to
stay.  So what is found was dropped; what is not found may have been.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from statewise._src.common import compat
from statewise._src.step.effects import body_of

__all__ = ["dropped_inputs"]

# These call a body whose outputs are what the function returned, and nothing else.
_COPIES = frozenset({"checkpoint", "closed_call", "core_call", "jit", "pjit", "remat", "remat2"})

# The same elements under another name, dtype or layout: by itself no new value.
_MOVES = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "optimization_barrier",
        "reshape",
        "sharding_constraint",
        "squeeze",
        "stop_gradient",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    """That a value was made of an input, element by element.

    Attributes:
      of: the input's number.
      aval: the input's type, in the body that the value stands in.
      changed: whether anything was computed; else it is the input itself.
    """

    of: int
    aval: Any
    changed: bool


_Tags = tuple[_Made | None, ...]


def dropped_inputs(closed: Any, inputs: Sequence[int]) -> frozenset[int]:
    """Which inputs of a jaxpr are given a new value in the body of a `jax.jit` or `jax.checkpoint` that drops it.

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
    jaxpr = compat.inner_jaxpr(closed)
    chosen = set(inputs)
    tags = tuple(_Made(at, var.aval, False) if at in chosen else None for at, var in enumerate(jaxpr.invars))
    found: set[int] = set()
    _walk(jaxpr, tags, found, inside=False)
    return frozenset(found)


def _walk(jaxpr: Any, tags: _Tags, found: set[int], inside: bool) -> _Tags:
    """Follows what is made of the inputs through a jaxpr; returns what its outputs are made of."""
    made = {var: tag for var, tag in zip(jaxpr.invars, tags, strict=True) if tag is not None}
    if not made:
        return (None,) * len(jaxpr.outvars)
    used = _used(jaxpr) if inside else set()
    for eqn in jaxpr.eqns:
        operands = tuple(made.get(var) if not isinstance(var, compat.Literal) else None for var in eqn.invars)
        if not any(operands):
            continue
        for var, tag in zip(eqn.outvars, _through(eqn, operands, found, inside), strict=True):
            if tag is None:
                continue
            made[var] = tag
            if inside and tag.changed and var not in used and _alike(var.aval, tag.aval):
                found.add(tag.of)
    return tuple(None if isinstance(var, compat.Literal) else made.get(var) for var in jaxpr.outvars)


def _used(jaxpr: Any) -> set[Any]:
    """The values that the outputs, or effects, depend on."""
    used = {var for var in jaxpr.outvars if not isinstance(var, compat.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in used for var in eqn.outvars):
            used.update(var for var in eqn.invars if not isinstance(var, compat.Literal))
    return used


def _through(eqn: Any, operands: _Tags, found: set[int], inside: bool) -> _Tags:
    """What each result of an equation is made of."""
    name = eqn.primitive.name
    none = (None,) * len(eqn.outvars)
    if name == "scan":
        return _in_body(eqn, eqn.params["jaxpr"], operands, found, inside)
    if name == "while":
        asked = eqn.params["cond_nconsts"]
        return _in_body(eqn, eqn.params["body_jaxpr"], operands[asked:], found, inside)
    if name == "cond":
        branches = [_in_body(eqn, branch, operands[1:], found, inside) for branch in eqn.params["branches"]]
        return tuple(next((tag for tag in tags if tag is not None), None) for tags in zip(*branches, strict=True))
    body = body_of(eqn)
    if body is not None:
        return _in_body(eqn, body, operands, found, inside or name in _COPIES)
    if name.startswith("random_"):
        return none  # a key is drawn from: what comes of it is another key, not a new value of the stream
    # Element by element: the result has the shape that the leaf has.
    changed = name not in _MOVES
    tag = next((one for one in operands if one is not None), None)
    if tag is None or len(eqn.outvars) != 1 or eqn.outvars[0].aval.shape != tag.aval.shape:
        return none
    return (_Made(tag.of, tag.aval, tag.changed or changed),)


def _in_body(eqn: Any, closed: Any, operands: _Tags, found: set[int], inside: bool) -> _Tags:
    """The results of an equation that calls a body on its operands; inside, a slice stands for the whole."""
    jaxpr = compat.inner_jaxpr(closed)
    if len(jaxpr.invars) != len(operands):
        return (None,) * len(eqn.outvars)
    tags = tuple(
        None if tag is None else dataclasses.replace(tag, aval=var.aval)
        for var, tag in zip(jaxpr.invars, operands, strict=True)
    )
    results = _walk(jaxpr, tags, found, inside)
    whole = {tag.of: tag.aval for tag in operands if tag is not None}
    return tuple(
        None if tag is None else dataclasses.replace(tag, aval=whole[tag.of])
        for _, tag in zip(eqn.outvars, results, strict=True)
    )


def _alike(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and one.dtype == other.dtype)
