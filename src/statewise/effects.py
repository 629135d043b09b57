"""What a traced function reads and writes, told from its jaxpr.

A step declares which kinds it may write, and only the leaves that it does write should cross back over the
boundary of the compiled function.  Comparing tracers before and after the call cannot tell: under `nnx.jit`
or `nnx.remat` every leaf comes back as another tracer, and all would look written.  So the question is asked
of the program itself: an output is *unwritten* if it is the value of one of the function's inputs, moved
about but never changed.  `forwarded` follows each output back through the equations, and into the bodies of
those that call other jaxprs:

- calls (`jit`, `remat`, `custom_jvp_call`, `custom_vjp_call` ...): through the body's output to its input;
- `scan` and `while`: a carried value that the body hands on as it came, a constant handed out, and, for
  `scan`, a stacked output which is a scanned input of the body (then it is the whole scanned operand);
- `cond` and `switch`: where all branches hand on the same operand;
- `shard_map`: where the input and the output are laid out alike;
- pairs of equations that undo each other: transpositions, and a key's unwrapping and wrapping.

`n = n` is therefore no write, `n = n * 1` is one: equality of values is not what is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from statewise import _compat

__all__ = ["Effects", "effects_of", "forwarded"]

# One output, one input, the same value: what these primitives change is not the value.
_SAME_VALUE = frozenset({"copy", "name", "sharding_constraint", "optimization_barrier"})

# The parameter that holds the body of a primitive which calls it once, on its own operands.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "shard_map": "jaxpr",
    "run_state": "jaxpr",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Effects:
    """What a jaxpr does to the inputs that come back as outputs.

    Attributes:
      written: per tracked output, whether it differs from its input.
      read: per input, whether any used output needs it.
      jaxpr: the open jaxpr, cut down to the used outputs and the read inputs.
      consts: the values of its constants.
    """

    written: tuple[bool, ...]
    read: tuple[bool, ...]
    jaxpr: Any
    consts: tuple[Any, ...]


def effects_of(closed: Any, tracked: Sequence[tuple[int, int]]) -> Effects:
    """Tells which inputs a closed jaxpr reads and which it writes.

    Args:
      closed: the closed jaxpr of the function.
      tracked: pairs (output, input): the output that carries the new value of that input.

    Returns:
      the effects; outputs of the cut-down jaxpr are those not tracked, then the written ones, in order.
    """
    jaxpr = _compat.inner_jaxpr(closed)
    origins = forwarded(closed)
    written = tuple(origins[out] != source for out, source in tracked)
    unwritten = {out for (out, _), is_written in zip(tracked, written, strict=True) if not is_written}
    used = [position not in unwritten for position in range(len(jaxpr.outvars))]
    smaller, read = _compat.dce(jaxpr, used)
    return Effects(written=written, read=tuple(read), jaxpr=smaller, consts=tuple(closed.consts))


def forwarded(closed: Any) -> tuple[int | None, ...]:
    """Says for each output of a jaxpr which input it is, unchanged; None for one that was computed.

    Args:
      closed: a closed or open jaxpr.

    Returns:
      for each output the position of the input whose value it has, or None.
    """
    return _Walk(_compat.inner_jaxpr(closed)).origins()


@dataclasses.dataclass(slots=True)
class _View:
    """A value and what was done to it on the way: read as transpose(value, permutation), as key data or not."""

    var: Any
    permutation: tuple[int, ...] | None = None
    wrapped: int = 0

    def transposed(self, operand: Any, permutation: Sequence[int]) -> _View | None:
        if self.wrapped:
            return None
        mine = self.permutation
        both = tuple(permutation) if mine is None else tuple(permutation[axis] for axis in mine)
        return _View(operand, None if both == tuple(range(len(both))) else both)

    def rewrapped(self, operand: Any, by: int) -> _View | None:
        # `random_wrap` of `random_unwrap`, or the other way round, is the identity; in between, one is owed.
        if self.permutation is not None or abs(self.wrapped + by) > 1:
            return None
        return _View(operand, None, self.wrapped + by)

    def at(self, var: Any) -> _View:
        return _View(var, self.permutation, self.wrapped)

    @property
    def untouched(self) -> bool:
        return self.permutation is None and not self.wrapped


class _Walk:
    """Follows values of one jaxpr back to its inputs; remembers each equation's answer."""

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr = jaxpr
        self.inputs = {var: position for position, var in enumerate(jaxpr.invars)}
        self.maker = {var: (eqn, position) for eqn in jaxpr.eqns for position, var in enumerate(eqn.outvars)}
        self.known: dict[int, tuple[int | None, ...]] = {}

    def origins(self) -> tuple[int | None, ...]:
        return tuple(self.origin(var) for var in self.jaxpr.outvars)

    def origin(self, var: Any) -> int | None:
        view: _View | None = _View(var)
        while view is not None:
            if isinstance(view.var, _compat.Literal):
                return None
            if view.var in self.inputs:
                return self.inputs[view.var] if view.untouched else None
            if view.var not in self.maker:
                return None  # a constant of the jaxpr
            view = self.back(view)
        return None

    def back(self, view: _View) -> _View | None:
        """One equation further back; None where the equation computes the value."""
        eqn, position = self.maker[view.var]
        name = eqn.primitive.name
        if name in _SAME_VALUE:
            return view.at(eqn.invars[position])
        if name == "convert_element_type" and eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype:
            return view.at(eqn.invars[0])
        if name == "transpose":
            return view.transposed(eqn.invars[0], eqn.params["permutation"])
        if name == "random_wrap":
            return view.rewrapped(eqn.invars[0], 1)
        if name == "random_unwrap":
            return view.rewrapped(eqn.invars[0], -1)
        if id(eqn) not in self.known:
            self.known[id(eqn)] = _through(eqn)
        operand = self.known[id(eqn)][position]
        return None if operand is None else view.at(eqn.invars[operand])


def _through(eqn: Any) -> tuple[int | None, ...]:
    """Says for each output of an equation which of its operands it is, unchanged."""
    name = eqn.primitive.name
    if name == "scan":
        return _through_scan(eqn)
    if name == "while":
        return _through_while(eqn)
    if name == "cond":
        return _through_cond(eqn)
    if name in _CALLS and _CALLS[name] in eqn.params:
        return _through_call(eqn)
    return (None,) * len(eqn.outvars)


def _through_call(eqn: Any) -> tuple[int | None, ...]:
    origins = forwarded(eqn.params[_CALLS[eqn.primitive.name]])
    if eqn.primitive.name != "shard_map":
        return origins
    ins, outs = eqn.params["in_specs"], eqn.params["out_specs"]
    return tuple(
        source if source is not None and ins[source] == outs[position] else None
        for position, source in enumerate(origins)
    )


def _through_scan(eqn: Any) -> tuple[int | None, ...]:
    consts, carry = _compat.scan_counts(eqn)
    first_scanned = consts + carry
    found: list[int | None] = []
    for position, source in enumerate(forwarded(eqn.params["jaxpr"])):
        if source is None:
            found.append(None)
        elif position >= carry:  # stacked: only a whole scanned operand comes out as it went in
            found.append(source if source >= first_scanned else None)
        elif source == consts + position or (source < consts and eqn.params["length"] > 0):
            found.append(source)
        else:
            found.append(None)
    return tuple(found)


def _through_while(eqn: Any) -> tuple[int | None, ...]:
    """A carried value is unwritten if the body hands it on; a constant of the body might never be handed out."""
    before, own = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    origins = forwarded(eqn.params["body_jaxpr"])
    return tuple(before + source if source == own + position else None for position, source in enumerate(origins))


def _through_cond(eqn: Any) -> tuple[int | None, ...]:
    branches = [forwarded(branch) for branch in eqn.params["branches"]]
    # Operand 0 is the index of the branch taken.
    return tuple(
        1 + sources[0] if sources[0] is not None and len(set(sources)) == 1 else None
        for sources in zip(*branches, strict=True)
    )
