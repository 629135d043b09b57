"""Which outputs of a traced function may differ from device to device, determined from its jaxpr.

Under `jax.shard_map` each device runs the function on its own part of the batch and its own values.  JAX tracks this in
its types too, but that requires rewriting loops whose carried value starts the same everywhere and does not stay so (a
zero carry of an RNN); here models need no changes.  A value varies over a mesh axis if it depends on one that does,
except through a collective that gives all devices along the axis the same value.  A reference (`jax.new_ref`) varies
once a varying value may be written to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from statewise._src.common import compat
from statewise._src.step.effects import body_of

__all__ = ["varying"]

Axes = frozenset[str]
NOWHERE: Axes = frozenset()

# These give all devices along their axes the same value.
_JOINS = frozenset({"psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"})


def varying(jaxpr: Any, inputs: Sequence[Axes], axes: Axes) -> list[Axes]:
    """Returns the axes over which each output of a jaxpr may vary.

    Args:
      jaxpr: open or closed; its constants are the same on all devices.
      inputs: the axes over which each input varies.
      axes: the axes of interest.
    """
    jaxpr = compat.inner_jaxpr(jaxpr)
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(var: Any) -> Axes:
        return NOWHERE if isinstance(var, compat.Literal) else known.get(var, NOWHERE)

    for eqn in jaxpr.eqns:
        ins = [of(var) for var in eqn.invars]
        refs = [var for var in eqn.invars if _is_ref(var)]
        if refs:
            # A value that is written to one reference may be read from another, and a body may do so in any iteration.
            over = axes if any(map(_has_jaxpr, eqn.params.values())) else NOWHERE.union(_named(eqn) & axes, *ins)
            known.update(dict.fromkeys([*refs, *eqn.outvars], over))
        else:
            known.update(zip(eqn.outvars, _through(eqn, ins, axes), strict=True))
    return [of(var) for var in jaxpr.outvars]


def _through(eqn: Any, ins: list[Axes], axes: Axes) -> list[Axes]:
    """Returns the axes over which each result of one equation may vary."""
    name, count = eqn.primitive.name, len(eqn.outvars)
    joined = NOWHERE.union(*ins)
    over = _named(eqn) & axes  # `axis_index` varies over its axis
    if name in _JOINS:
        if eqn.params.get("axis_index_groups") is not None:
            return [joined | over] * count  # the same within each group only
        # A collective of several operands treats each on its own.
        return [operand - over for operand in ins] if len(ins) == count else [joined - over] * count
    if name == "scan":
        return _through_scan(eqn, ins, axes)
    if name == "while":
        return _through_while(eqn, ins, axes)
    if name == "cond":
        index, *operands = ins
        # If the branch index varies, so do all results.
        branches = [varying(branch, operands, axes) for branch in eqn.params["branches"]]
        return [index.union(*of_branches) for of_branches in zip(*branches, strict=True)]
    body = None if name == "shard_map" else body_of(eqn)
    if body is not None and len(compat.inner_jaxpr(body).invars) == len(ins):
        return varying(body, ins, axes)
    if any(map(_has_jaxpr, eqn.params.values())):
        return [axes] * count  # an unknown way of calling a body: assume that everything varies
    return [joined | over] * count


def _named(eqn: Any) -> Axes:
    """Returns the mesh axes that an equation refers to: those of a collective or of `axis_index`."""
    named: set[str] = set()
    for key in ("axes", "axis_name"):
        value = eqn.params.get(key, ())
        named.update(axis for axis in (value if isinstance(value, tuple) else (value,)) if isinstance(axis, str))
    return frozenset(named)


def _has_jaxpr(value: Any) -> bool:
    several = value if isinstance(value, tuple | list) else (value,)
    return any(hasattr(compat.inner_jaxpr(candidate), "eqns") for candidate in several)


def _is_ref(var: Any) -> bool:
    """Returns whether a variable is a reference to an array that changes in place."""
    return hasattr(var.aval, "inner_aval")


def _through_scan(eqn: Any, ins: list[Axes], axes: Axes) -> list[Axes]:
    # Operands: constants, carried, scanned.  Iterate until what is carried stops varying over more axes.
    consts, carry = compat.scan_counts(eqn)
    while True:
        outs = varying(eqn.params["jaxpr"], ins, axes)
        after = [before | now for before, now in zip(ins[consts : consts + carry], outs[:carry], strict=True)]
        if after == ins[consts : consts + carry]:
            return [*after, *outs[carry:]]
        ins = [*ins[:consts], *after, *ins[consts + carry :]]


def _through_while(eqn: Any, ins: list[Axes], axes: Axes) -> list[Axes]:
    before, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body, carried = ins[:before], ins[before : before + consts], ins[before + consts :]
    while True:
        # If devices run a different number of iterations, everything that is carried differs.
        iterations = varying(eqn.params["cond_jaxpr"], [*of_cond, *carried], axes)[0]
        outs = varying(eqn.params["body_jaxpr"], [*of_body, *carried], axes)
        after = [now | out | iterations for now, out in zip(carried, outs, strict=True)]
        if after == carried:
            return carried
        carried = after
