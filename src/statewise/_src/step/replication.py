"""Which outputs of a traced function may differ from device to device, told from its jaxpr.

Under `jax.shard_map` each device runs the function on its own part of the batch and its own values.  JAX tracks this in
its types too, but then loops whose carried value starts the same everywhere and does not stay so (a zeroed carry of an
RNN) must be rewritten; here no model has to be.  A value varies over an axis of the mesh if it depends on one that
does, except through a collective that gives all devices along the axis the same.  A reference (`jax.new_ref`) varies
once it is given what does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statewise._src.common import compat
from statewise._src.step.effects import body_of

__all__ = ["varying"]

Axes = frozenset[str]
NOWHERE: Axes = frozenset()

# Each gives all devices along its axes the same value.
_JOINS = frozenset({"psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"})


def varying(jaxpr: Any, inputs: Sequence[Axes], axes: Axes) -> list[Axes]:
    """The axes over which each output of a jaxpr may vary.

    Args:
      jaxpr: open or closed; its constants are the same everywhere.
      inputs: the axes over which each input varies.
      axes: all axes that are asked about.
    """
    jaxpr = compat.inner_jaxpr(jaxpr)
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(var: Any) -> Axes:
        return NOWHERE if isinstance(var, compat.Literal) else known.get(var, NOWHERE)

    for eqn in jaxpr.eqns:
        ins = [of(var) for var in eqn.invars]
        refs = [var for var in eqn.invars if _is_ref(var)]
        if refs:
            # What is written into one of them may come out of any; a body may do it at any turn.
            found = axes if any(map(_has_jaxpr, eqn.params.values())) else NOWHERE.union(_named(eqn) & axes, *ins)
            known.update(dict.fromkeys([*refs, *eqn.outvars], found))
        else:
            known.update(zip(eqn.outvars, _through(eqn, ins, axes), strict=True))
    return [of(var) for var in jaxpr.outvars]


def _through(eqn: Any, ins: list[Axes], axes: Axes) -> list[Axes]:
    """The same for one equation."""
    name, count = eqn.primitive.name, len(eqn.outvars)
    joined = NOWHERE.union(*ins)
    over = _named(eqn) & axes
    if name in _JOINS:
        if eqn.params.get("axis_index_groups") is not None:
            return [joined | over] * count  # the same within each group only
        return [one - over for one in ins] if len(ins) == count else [joined - over] * count
    if name == "scan":
        return _through_scan(eqn, ins, axes)
    if name == "while":
        return _through_while(eqn, ins, axes)
    if name == "cond":
        index, *operands = ins
        branches = [varying(branch, operands, axes) for branch in eqn.params["branches"]]
        return [index.union(*of_branches) for of_branches in zip(*branches, strict=True)]
    body = None if name == "shard_map" else body_of(eqn)
    if body is not None and len(compat.inner_jaxpr(body).invars) == len(ins):
        return varying(body, ins, axes)
    if any(map(_has_jaxpr, eqn.params.values())):
        return [axes] * count  # a body that is called in some way of its own
    return [joined | over] * count


def _named(eqn: Any) -> Axes:
    """The axes of the mesh that an equation speaks of: a collective's, or those of `axis_index`."""
    found: set[str] = set()
    for key in ("axes", "axis_name"):
        value = eqn.params.get(key, ())
        found.update(axis for axis in (value if isinstance(value, tuple) else (value,)) if isinstance(axis, str))
    return frozenset(found)


def _has_jaxpr(value: Any) -> bool:
    several = value if isinstance(value, tuple | list) else (value,)
    return any(hasattr(compat.inner_jaxpr(one), "eqns") for one in several)


def _is_ref(var: Any) -> bool:
    """Whether a variable is a reference to an array that changes in place."""
    return hasattr(var.aval, "inner_aval")


def _through_scan(eqn: Any, ins: list[Axes], axes: Axes) -> list[Axes]:
    consts, carry = compat.scan_counts(eqn)
    while True:
        outs = varying(eqn.params["jaxpr"], ins, axes)
        after = [one | two for one, two in zip(ins[consts : consts + carry], outs[:carry], strict=True)]
        if after == ins[consts : consts + carry]:
            return [*after, *outs[carry:]]
        ins = [*ins[:consts], *after, *ins[consts + carry :]]


def _through_while(eqn: Any, ins: list[Axes], axes: Axes) -> list[Axes]:
    before, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body, carried = ins[:before], ins[before : before + consts], ins[before + consts :]
    while True:
        # Where devices turn a different number of times, all that is carried differs.
        turns = varying(eqn.params["cond_jaxpr"], [*of_cond, *carried], axes)[0]
        outs = varying(eqn.params["body_jaxpr"], [*of_body, *carried], axes)
        after = [one | two | turns for one, two in zip(carried, outs, strict=True)]
        if after == carried:
            return carried
        carried = after
