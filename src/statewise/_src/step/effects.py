"""Which inputs a traced function reads and which it writes, determined from its jaxpr.

A step declares which kinds it may write, and only the leaves that it does write should be returned by the compiled
function.  Comparing tracers before and after the call does not work: under `nnx.jit` or `nnx.remat` every leaf comes
back as another tracer, and all would look written.  So the program itself is examined: an output is *unwritten* if it
is the value of one of the function's inputs, moved but not changed.  `forwarded` follows each output back through
the equations, and into the bodies of those that call other jaxprs:

- calls (`jit`, `remat`, `custom_jvp_call`, `custom_vjp_call` ...): through the body's output to its input;
- `scan` and `while`: a carried value that the body returns unchanged, a constant that is returned, and, for `scan`, a
  stacked output that is a scanned input of the body (then it is the complete scanned operand);
- `cond` and `switch`, and the selections that `vmap` turns them into: where all branches return the same value;
- `shard_map`: where the input and the output have the same spec;
- equations that undo each other: transposes, reshapes, and the unwrapping and wrapping of a key.

So `n = n` is not a write and `n = n * 1` is one: equality of values is not checked.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from statewise._src.common.compat import jaxprs, primitives
from statewise._src.common.compat.primitives import RANDOM_UNWRAP, RANDOM_WRAP, RESHAPE, TRANSPOSE

__all__ = ["Effects", "alike", "effects_of", "forwarded"]


@dataclasses.dataclass(frozen=True, slots=True)
class Effects:
    """How a jaxpr treats the inputs that come back as outputs.

    Attributes:
      written: per tracked output, whether it differs from its input.
      used: per output, whether it is returned: an unwritten one is not.
      read: per input, whether any used output needs it.
      jaxpr: the open jaxpr, reduced to the used outputs and the read inputs.
      consts: the values of its constants.
    """

    written: tuple[bool, ...]
    used: tuple[bool, ...]
    read: tuple[bool, ...]
    jaxpr: Any
    consts: tuple[Any, ...]

    def run(self, inputs: Iterable[Any]) -> list[Any]:
        """Returns the used outputs, from the values of all inputs (None for those not read)."""
        return jaxprs.eval_jaxpr(self.jaxpr, self.consts, list(itertools.compress(inputs, self.read)))


def effects_of(closed: Any, tracked: Sequence[tuple[int, int]]) -> Effects:
    """Determines which inputs a closed jaxpr reads and which it writes.

    Args:
      closed: the closed jaxpr of the function.
      tracked: pairs (output, input): the output that carries the new value of that input.

    Returns:
      the effects; the outputs of the reduced jaxpr are those not tracked, then the written ones, in order.
    """
    jaxpr = jaxprs.inner_jaxpr(closed)
    origins = forwarded(closed)
    written = tuple(origins[out] != source for out, source in tracked)
    # An unwritten output is not returned, so what was only needed to return it is not read either.
    unwritten = {out for (out, _), is_written in zip(tracked, written, strict=True) if not is_written}
    used = tuple(position not in unwritten for position in range(len(jaxpr.outvars)))
    smaller, read = jaxprs.dce(jaxpr, used)
    return Effects(written, used, tuple(read), smaller, tuple(jaxprs.consts_of(closed)))


def forwarded(closed: Any) -> tuple[int | None, ...]:
    """Returns, for each output of a jaxpr, the input that it is, unchanged; None for a computed output.

    Args:
      closed: a closed or open jaxpr.

    Returns:
      for each output the position of the input whose value it has, or None.
    """
    jaxpr = jaxprs.inner_jaxpr(closed)
    origins: list[int | None] = []
    for var, sources in zip(jaxpr.outvars, _sources(jaxpr), strict=True):
        # With several possible sources, the result depends on a value: it is computed.
        (source, moves), *others = sources or [(-1, ())]
        unchanged = source >= 0 and not moves and not others
        # An output whose shape or dtype differs from the input's is not that input, whatever produced it.
        origins.append(source if unchanged and alike(var.aval, jaxpr.invars[source].aval) else None)
    return tuple(origins)


# What happened to a value on its way, last step first: (TRANSPOSE, permutation), (RESHAPE, (shape, former shape)),
# (RANDOM_WRAP or RANDOM_UNWRAP, (rank, former rank)).
_Move = tuple[str, Any]
_Moves = tuple[_Move, ...]
_NO_MOVE: _Move = ("", ())
# An input, or an operand, and the moves applied to it.
_Source = tuple[int, _Moves]
# The candidates that a value may be, unchanged: several where a value decides (the branch taken, the number of
# iterations); empty where the value is computed.
_Sources = frozenset[_Source]
_COMPUTED: _Sources = frozenset()


def _sources(closed: Any) -> tuple[_Sources, ...]:
    walk = _Walk(jaxprs.inner_jaxpr(closed))
    return tuple(map(walk.sources, walk.jaxpr.outvars))


class _Walk:
    """Follows the values of one jaxpr back to its inputs; caches the answer for each equation."""

    def __init__(self, jaxpr: Any) -> None:
        self.jaxpr = jaxpr
        self.inputs = {var: position for position, var in enumerate(jaxpr.invars)}
        self.maker = {var: (eqn, position) for eqn in jaxpr.eqns for position, var in enumerate(eqn.outvars)}
        self.known: dict[int, tuple[_Sources, ...]] = {}

    def sources(self, var: Any) -> _Sources:
        """Returns the inputs that a variable of the jaxpr may be."""
        inputs: set[_Source] = set()
        seen: set[tuple[Any, _Moves]] = set()
        pending: list[tuple[Any, _Moves]] = [(var, ())]
        while pending:
            current, moves = view = pending.pop()
            if isinstance(current, jaxprs.Literal):
                return _COMPUTED
            if view in seen:
                continue
            seen.add(view)
            if current in self.inputs:
                inputs.add((self.inputs[current], moves))
                continue
            before = self.back(current) if current in self.maker else ()  # neither: a constant of the jaxpr
            if not before:
                return _COMPUTED
            # The moves of this equation happened before those already collected, so they are applied first.
            pending.extend((operand, functools.reduce(_moved, first, moves)) for operand, first in before)
        return frozenset(inputs)

    def back(self, var: Any) -> Sequence[tuple[Any, _Moves]]:
        """Goes one equation back: returns the operands that may be the value, moved; none if it is computed."""
        eqn, position = self.maker[var]
        name = jaxprs.name_of(eqn)
        first: Any = eqn.invars[0] if eqn.invars else None
        if name in primitives.SAME_VALUE:
            return [(eqn.invars[position], ())]
        if name == primitives.CAST and first.aval.dtype == var.aval.dtype:
            return [(first, ())]
        if name == TRANSPOSE:
            return [(first, ((name, jaxprs.permutation_of(eqn)),))]
        if name in (RANDOM_WRAP, RANDOM_UNWRAP):
            return [(first, ((name, (len(var.aval.shape), len(first.aval.shape))),))]
        if name in primitives.RESHAPES:
            return [(first, ((RESHAPE, (var.aval.shape, first.aval.shape)),))] if jaxprs.keeps_order(eqn) else ()
        if id(eqn) not in self.known:
            self.known[id(eqn)] = _through(eqn)
        return [(eqn.invars[operand], moves) for operand, moves in self.known[id(eqn)][position]]


def _moved(moves: _Moves, move: _Move) -> _Moves:
    """Adds a move that happened before the others; if it undoes the next one, both disappear."""
    name, what = move
    last, of_last = moves[-1] if moves else _NO_MOVE
    if name == TRANSPOSE:
        # Two transposes in a row are one: compose the permutations.
        if last == name:
            moves, what = moves[:-1], tuple(what[axis] for axis in of_last)
        return moves if what == tuple(range(len(what))) else (*moves, (name, what))
    if name == RESHAPE:
        # Two reshapes in a row are one: from the shape before the first to the shape after the second.
        if last == name:
            moves, what = moves[:-1], (of_last[0], what[1])
        return moves if what[0] == what[1] else (*moves, (name, what))
    # The words of a key are its last axis: transposing keys is transposing their words with that axis left alone.  So a
    # transpose can be moved to the other side of a wrap or unwrap, where it may meet the one that undoes it.
    rank, words = min(what), tuple(range(min(what), what[1]))
    first: _Moves = ()
    if last == TRANSPOSE and of_last[rank:] == tuple(range(rank, len(of_last))):
        moves, first = moves[:-1], ((TRANSPOSE, of_last[:rank] + words),)
    undone = RANDOM_UNWRAP if name == RANDOM_WRAP else RANDOM_WRAP
    moves = moves[:-1] if moves and moves[-1][0] == undone else (*moves, move)
    return (*moves, *first)


def alike(aval: Any, other: Any) -> bool:
    """Returns whether two types of a jaxpr have the same shape and dtype."""
    return bool(aval.shape == other.shape and aval.dtype == other.dtype)


# --- through the equations that call jaxprs --------------------------------------------------------------------


def _through(eqn: Any) -> tuple[_Sources, ...]:
    """Returns, for each output of an equation, its sources among the operands."""
    through = _THROUGH.get(jaxprs.name_of(eqn))
    return (_COMPUTED,) * len(eqn.outvars) if through is None else through(eqn)


def _through_select(eqn: Any) -> tuple[_Sources, ...]:
    # Operand 0 selects; each case is a candidate.
    return (frozenset((case, ()) for case in range(1, len(eqn.invars))),)


def _through_call(eqn: Any) -> tuple[_Sources, ...]:
    sources_of = _sources(jaxprs.body_of(eqn))
    if jaxprs.name_of(eqn) != primitives.SHARD_MAP:
        return sources_of
    # Inside, each device sees its part: the result is the operand only if both are split in the same way.
    ins, outs = jaxprs.specs_of(eqn)
    return tuple(
        sources if all(ins[source] == outs[position] and not moves for source, moves in sources) else _COMPUTED
        for position, sources in enumerate(sources_of)
    )


def _through_cond(eqn: Any) -> tuple[_Sources, ...]:
    branches = [_sources(branch) for branch in jaxprs.branches_of(eqn)]
    # Operand 0 is the index of the branch taken.
    return tuple(
        frozenset((1 + source, moves) for sources in of_branches for source, moves in sources)
        if all(of_branches)
        else _COMPUTED
        for of_branches in zip(*branches, strict=True)
    )


def _through_scan(eqn: Any) -> tuple[_Sources, ...]:
    scan = jaxprs.scan_of(eqn)
    # Operands and body inputs: constants, carried, scanned.  Results: carried, stacked.
    consts, carry = scan.consts, scan.carry
    body = list(map(_unmoved, _sources(scan.body)))
    carried = [_settled(body, position, consts, carry, runs=scan.length > 0) for position in range(carry)]
    # A stacked output is an operand only if it is a scanned one; a stacked constant or carry is new.
    stacked = [of if all(source >= consts + carry for source in of) else frozenset() for of in body[carry:]]
    return tuple(frozenset((source, ()) for source in sources) for sources in carried + stacked)


def _through_while(eqn: Any) -> tuple[_Sources, ...]:
    # Operands: the condition's constants, the body's constants, the carried values.
    loop = jaxprs.while_of(eqn)
    body = list(map(_unmoved, _sources(loop.body)))
    carried = [_settled(body, position, loop.body_consts, len(body), runs=False) for position in range(len(body))]
    return tuple(frozenset((loop.cond_consts + source, ()) for source in sources) for sources in carried)


def _unmoved(sources: _Sources) -> frozenset[int]:
    """Returns the sources if none of them is moved; otherwise none, because a loop would repeat the moves."""
    return frozenset(source for source, _ in sources) if not any(moves for _, moves in sources) else frozenset()


def _settled(body: Sequence[frozenset[int]], position: int, consts: int, carry: int, runs: bool) -> frozenset[int]:
    """Returns the operands that a carried value may be after the loop, if the body only passes values around.

    Args:
      body: the sources of the body's outputs among its inputs: constants, carried, scanned.
      position: of the carried value.
      consts: how many constants there are.
      carry: how many carried values.
      runs: whether the body certainly runs at least once; otherwise the value may be its initial one.
    """
    sources = set() if runs else {consts + position}
    seen: set[int] = set()
    pending = [position]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        # Computed, or a slice of a scanned operand, which differs in every iteration.
        if not body[current] or max(body[current]) >= consts + carry:
            return frozenset()
        sources |= body[current]
        # A value from another carried one may be, one iteration later, whatever that one is.
        pending.extend(source - consts for source in body[current] if source >= consts)
    return frozenset(sources)


_THROUGH: dict[str, Callable[[Any], tuple[_Sources, ...]]] = {
    primitives.SCAN: _through_scan,
    primitives.WHILE: _through_while,
    primitives.COND: _through_cond,
    primitives.SELECT: _through_select,
    **dict.fromkeys(primitives.CALLS, _through_call),
}
