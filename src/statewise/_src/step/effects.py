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
- `cond` and `switch`, and the selections that `vmap` makes of them: where all branches hand on the same value;
- `shard_map`: where the input and the output are laid out alike;
- equations that undo each other: transpositions, reshapes, and a key's unwrapping and wrapping.

`n = n` is therefore no write, `n = n * 1` is one: equality of values is not what is asked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from statewise._src.common import compat

__all__ = ["Effects", "body_of", "effects_of", "forwarded"]

# Each output is the operand at its position: what these primitives change is the derivative, the name or the
# place, not the value.  Where a leaf lives is for its kind's placement to say, not for a step.
_SAME_VALUE = frozenset(
    {
        "copy",
        "device_put",
        "layout_constraint",
        "name",
        "optimization_barrier",
        "random_clone",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)

# The same elements in the same order, in another shape (`_keeps_order` looks closer).
_RESHAPES = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "squeeze"})

# Primitives that call one body, once, on their own operands, and the parameters that may hold it.
_CALLS = frozenset(
    {
        "checkpoint",
        "closed_call",
        "composite",
        "compute_on",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vmap_call",
        "jit",
        "pjit",
        "remat",
        "remat2",
        "shard_map",
    }
)
_BODIES = ("jaxpr", "call_jaxpr", "call")


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
    jaxpr = compat.inner_jaxpr(closed)
    origins = forwarded(closed)
    written = tuple(origins[out] != source for out, source in tracked)
    unwritten = {out for (out, _), is_written in zip(tracked, written, strict=True) if not is_written}
    used = [position not in unwritten for position in range(len(jaxpr.outvars))]
    smaller, read = compat.dce(jaxpr, used)
    return Effects(written=written, read=tuple(read), jaxpr=smaller, consts=tuple(closed.consts))


def forwarded(closed: Any) -> tuple[int | None, ...]:
    """Says for each output of a jaxpr which input it is, unchanged; None for one that was computed.

    Args:
      closed: a closed or open jaxpr.

    Returns:
      for each output the position of the input whose value it has, or None.
    """
    jaxpr = compat.inner_jaxpr(closed)
    found: list[int | None] = []
    for var, sources in zip(jaxpr.outvars, _sources(jaxpr), strict=True):
        # Where it may be one of several inputs, it depends on a value: it is computed.
        (source, moves), *others = sources or [(-1, ())]
        whole = source >= 0 and not moves and not others
        # However it came about: what has another shape or type than an input is not that input.
        found.append(source if whole and _alike(var, jaxpr.invars[source]) else None)
    return tuple(found)


# What was done to a value on its way, the last first: ("transpose", permutation), ("reshape", (shape, former
# shape)), ("random_wrap" or "random_unwrap", (rank, former rank)).
_Move = tuple[str, Any]
_Moves = tuple[_Move, ...]
_NO_MOVE: _Move = ("", ())
# An input, or an operand, moved about.
_Source = tuple[int, _Moves]
# Those of which a value is one, unchanged: several where it depends on values (the branch taken, the number of
# turns) which of them it is; none where it is computed.
_Sources = frozenset[_Source]
_COMPUTED: _Sources = frozenset()


def _sources(closed: Any) -> tuple[_Sources, ...]:
    walk = _Walk(compat.inner_jaxpr(closed))
    return tuple(map(walk.sources, walk.jaxpr.outvars))


class _Walk:
    """Follows values of one jaxpr back to its inputs; remembers each equation's answer."""

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr = jaxpr
        self.inputs = {var: position for position, var in enumerate(jaxpr.invars)}
        self.maker = {var: (eqn, position) for eqn in jaxpr.eqns for position, var in enumerate(eqn.outvars)}
        self.known: dict[int, tuple[_Sources, ...]] = {}

    def sources(self, var: Any) -> _Sources:
        """The inputs that a variable of the jaxpr may be."""
        found: set[_Source] = set()
        seen: set[tuple[Any, _Moves]] = set()
        pending: list[tuple[Any, _Moves]] = [(var, ())]
        while pending:
            at, moves = view = pending.pop()
            if isinstance(at, compat.Literal):
                return _COMPUTED
            if view in seen:
                continue
            seen.add(view)
            if at in self.inputs:
                found.add((self.inputs[at], moves))
                continue
            before = self.back(at) if at in self.maker else ()  # else it is a constant of the jaxpr
            if not before:
                return _COMPUTED
            pending.extend((operand, functools.reduce(_moved, first, moves)) for operand, first in before)
        return frozenset(found)

    def back(self, var: Any) -> Sequence[tuple[Any, _Moves]]:
        """One equation further back: the operands that may be the value, moved; none where it is computed."""
        eqn, position = self.maker[var]
        name = eqn.primitive.name
        first: Any = eqn.invars[0] if eqn.invars else None
        if name in _SAME_VALUE:
            return [(eqn.invars[position], ())]
        if name == "convert_element_type" and first.aval.dtype == var.aval.dtype:
            return [(first, ())]
        if name == "transpose":
            return [(first, ((name, tuple(eqn.params["permutation"])),))]
        if name in ("random_wrap", "random_unwrap"):
            return [(first, ((name, (len(var.aval.shape), len(first.aval.shape))),))]
        if name in _RESHAPES:
            return [(first, (("reshape", (var.aval.shape, first.aval.shape)),))] if _keeps_order(eqn) else ()
        if id(eqn) not in self.known:
            self.known[id(eqn)] = _through(eqn)
        return [(eqn.invars[operand], moves) for operand, moves in self.known[id(eqn)][position]]


def _moved(moves: _Moves, move: _Move) -> _Moves:
    """Moves with one more before them; what undoes the next one takes both away."""
    name, what = move
    last, of_last = moves[-1] if moves else _NO_MOVE
    if name == "transpose":
        if last == name:
            moves, what = moves[:-1], tuple(what[axis] for axis in of_last)
        return moves if what == tuple(range(len(what))) else (*moves, (name, what))
    if name == "reshape":
        if last == name:
            moves, what = moves[:-1], (of_last[0], what[1])
        return moves if what[0] == what[1] else (*moves, (name, what))
    # The words of a key are its last axis: to transpose keys is to transpose their words, that axis apart.  So the
    # transposition can go first, to where it meets the one that undoes it.
    keys, words = min(what), tuple(range(min(what), what[1]))
    first: _Moves = ()
    if last == "transpose" and of_last[keys:] == tuple(range(keys, len(of_last))):
        moves, first = moves[:-1], (("transpose", of_last[:keys] + words),)
    undone = "random_unwrap" if name == "random_wrap" else "random_wrap"
    moves = moves[:-1] if moves and moves[-1][0] == undone else (*moves, move)
    return (*moves, *first)


def _alike(one: Any, other: Any) -> bool:
    return one.aval.shape == other.aval.shape and one.aval.dtype == other.aval.dtype


def _keeps_order(eqn: Any) -> bool:
    """Whether an equation that reshapes leaves the elements in their order, and adds none."""
    if eqn.invars[0].aval.size != eqn.outvars[0].aval.size:
        return False
    if eqn.primitive.name == "reshape":
        return eqn.params["dimensions"] is None  # else it transposes first
    axes = eqn.params.get("broadcast_dimensions", ())
    return tuple(axes) == tuple(sorted(axes))


# --- through the equations that call jaxprs --------------------------------------------------------------------


def body_of(eqn: Any) -> Any:
    """The jaxpr that an equation calls once, on its own operands; None where it does no such thing."""
    if eqn.primitive.name not in _CALLS:
        return None
    return next(eqn.params[name] for name in _BODIES if name in eqn.params)


def _through(eqn: Any) -> tuple[_Sources, ...]:
    """The sources of each output of an equation among its operands."""
    name = eqn.primitive.name
    if name == "scan":
        return _through_scan(eqn)
    if name == "while":
        return _through_while(eqn)
    if name == "cond":
        return _through_cond(eqn)
    if name == "select_n":
        return (frozenset((case, ()) for case in range(1, len(eqn.invars))),)
    if name in _CALLS:
        return _through_call(eqn)
    return (_COMPUTED,) * len(eqn.outvars)


def _through_call(eqn: Any) -> tuple[_Sources, ...]:
    found = _sources(body_of(eqn))
    if eqn.primitive.name != "shard_map":
        return found
    ins, outs = eqn.params["in_specs"], eqn.params["out_specs"]
    return tuple(
        sources if all(ins[source] == outs[position] and not moves for source, moves in sources) else _COMPUTED
        for position, sources in enumerate(found)
    )


def _through_cond(eqn: Any) -> tuple[_Sources, ...]:
    branches = [_sources(branch) for branch in eqn.params["branches"]]
    # Operand 0 is the index of the branch taken.
    return tuple(
        frozenset((1 + source, moves) for sources in of_branches for source, moves in sources)
        if all(of_branches)
        else _COMPUTED
        for of_branches in zip(*branches, strict=True)
    )


def _through_scan(eqn: Any) -> tuple[_Sources, ...]:
    consts, carry = compat.scan_counts(eqn)
    body = list(map(_unmoved, _sources(eqn.params["jaxpr"])))
    turns = eqn.params["length"] > 0
    carried = [_settled(body, position, consts, carry, turns) for position in range(carry)]
    # Stacked: only a whole scanned operand comes out as it went in.
    stacked = [sources if all(at >= consts + carry for at in sources) else frozenset() for sources in body[carry:]]
    return tuple(frozenset((source, ()) for source in sources) for sources in carried + stacked)


def _through_while(eqn: Any) -> tuple[_Sources, ...]:
    before, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    body = list(map(_unmoved, _sources(eqn.params["body_jaxpr"])))
    carried = [_settled(body, position, consts, len(body), turns=False) for position in range(len(body))]
    return tuple(frozenset((before + source, ()) for source in sources) for sources in carried)


def _unmoved(sources: _Sources) -> frozenset[int]:
    """The sources where none is moved; else none, for a loop would move them again and again."""
    return frozenset(source for source, _ in sources) if not any(moves for _, moves in sources) else frozenset()


def _settled(body: Sequence[frozenset[int]], position: int, consts: int, carry: int, turns: bool) -> frozenset[int]:
    """The operands that a carried value may be in the end, where the body only hands values around.

    Args:
      body: the sources of the body's outputs among its inputs: constants, carried, scanned.
      position: of the carried value.
      consts: how many constants there are.
      carry: how many carried values.
      turns: whether the body surely runs at least once; else the value may be what it was at first.
    """
    found = set() if turns else {consts + position}
    seen: set[int] = set()
    pending = [position]
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        if not body[at] or max(body[at]) >= consts + carry:
            return frozenset()
        found |= body[at]
        pending.extend(source - consts for source in body[at] if source >= consts)
    return frozenset(found)
