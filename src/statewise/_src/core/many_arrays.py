"""Programs that return many arrays, compiled in pieces.

XLA compiles a program of ten thousand copies in ten seconds, and one of a hundred thousand in an hour: by the square of
their number.  So a program with many results is traced once, and its equations are divided among pieces of a few
hundred results; then it is a cost per array.  Results that depend on common equations stay together.  What is needed by
more results than a piece has, such as a table of random keys, is computed first, once.  Alike results are put side by
side, because pieces that do the same to arrays of the same types are compiled once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from statewise._src.common import compat
from statewise._src.common.compat import jaxprs
from statewise._src.common.nnx_graph import any_is_deleted, is_traced

__all__ = ["ManyArrays"]

_PIECE = 512


class ManyArrays:
    """A compiled function; one that returns many arrays is compiled in pieces.

    Args:
      fn: the function, of arrays; it must not have effects other than its results, or it is compiled as a whole.
      count: about how many arrays it returns.
      shardings: those of the results, or a prefix of them, as for `jax.jit`; None has XLA choose.
      donate: donates the arrays of the first argument, which has the structure of the results; these then use their
        memory, even if `fn` reads only their shapes.  Of several programs the first donates nothing if one cannot.
    """

    def __init__(self, fn: Callable[..., Any], count: int, *, shardings: Any = None, donate: bool = False) -> None:
        self._shardings, self._donates = shardings, donate
        options: dict[str, Any] = {} if shardings is None else {"out_shardings": shardings}
        self._complete = jax.jit(fn, keep_unused=donate, donate_argnums=0 if donate else (), **options)
        self._is_small = count <= _PIECE
        self._pieces: dict[Any, tuple[Any, list[_Piece]]] = {}

    def __call__(self, *args: Any) -> Any:
        if self._is_small or compat.jit_is_disabled():
            return self._complete(*args)
        leaves = jax.tree.leaves(args)
        if is_traced(leaves):
            return self._complete(*args)
        if self._donates:
            _check_donated(leaves)
        traced = self._complete.trace(*args)  # which JAX remembers
        jaxpr: Any = traced.jaxpr
        if jaxpr.effects:
            return self._complete(*args)
        inner = jaxprs.inner_jaxpr(jaxpr)
        if jaxpr not in self._pieces:
            structure = jax.tree.structure(traced.out_info)
            donated = len(jax.tree.leaves(args[0])) if self._donates else 0
            self._pieces[jaxpr] = structure, list(_pieces(inner, self._flat_shardings(traced.out_info), donated))
        structure, pieces = self._pieces[jaxpr]
        values = dict(zip(inner.constvars, jaxprs.consts_of(jaxpr), strict=True))
        values |= zip(inner.invars, leaves, strict=True)
        results: list[Any] = [None] * len(inner.outvars)
        for piece in pieces:
            found = piece.program([values[var] for var in piece.donated], [values[var] for var in piece.inputs])
            for position, value in zip(piece.results, found, strict=False):
                results[position] = value
            values |= zip(piece.passed_on, found[len(piece.results) :], strict=True)
        return jax.tree.unflatten(structure, results)

    def _flat_shardings(self, results: Any) -> list[Any]:
        return jax.tree.leaves(
            jax.tree.broadcast(self._shardings, results, is_leaf=lambda prefix: prefix is None),
            is_leaf=lambda sharding: sharding is None,
        )


def _check_donated(arrays: Sequence[Any]) -> None:
    """Raises, as `jax.jit` does, before the first of several programs donates anything.

    Raises:
      ValueError: an array is deleted, or given twice.
    """
    if any_is_deleted(arrays):
        raise ValueError("an array has been deleted")
    if len(set(map(id, arrays))) < len(arrays):
        raise ValueError("an array is given twice, and can be donated only once")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of the equations of a program.

    Attributes:
      program: the compiled function of two lists, of arrays that are donated and of others.
      donated, inputs: the variables of these arrays.
      results: the positions of the results that it returns.
      passed_on: the variables that it returns after them, which later pieces read.
    """

    program: Any
    donated: Sequence[Any]
    inputs: Sequence[Any]
    results: Sequence[int]
    passed_on: Sequence[Any] = ()


def _pieces(jaxpr: Any, shardings: Sequence[Any], donated: int) -> Iterator[_Piece]:
    """Yields the pieces of a program, in the order in which they run.

    Args:
      jaxpr: the program, an open jaxpr.
      shardings: of each result; None where XLA chooses.
      donated: how many of the inputs are donated, each to the result of its number.
    """
    shared, groups = _divided(jaxpr)
    made = {var for eqn in shared for var in eqn.outvars}
    parts = list(_joined(groups, jaxpr))
    reads = [_reads(eqns, [jaxpr.outvars[position] for position in results]) for eqns, results in parts]
    programs = _Programs(jaxpr)
    if shared:
        passed_on = list(dict.fromkeys(var for each in reads for var in each if var in made))
        inputs = _reads(shared, ())
        yield _Piece(programs.of(shared, (), inputs, passed_on, [None] * len(passed_on)), (), inputs, (), passed_on)
    last = {var: number for number, each in enumerate(reads) for var in each}
    for number, ((eqns, results), each) in enumerate(zip(parts, reads, strict=True)):
        # What a later piece reads is not given away.
        own = [jaxpr.invars[position] for position in results if position < donated]
        given = dict.fromkeys(var for var in own if last.get(var, number) <= number)
        others = [var for var in each if var not in given]
        outs = [jaxpr.outvars[position] for position in results]
        places = [shardings[position] for position in results]
        yield _Piece(programs.of(eqns, list(given), others, outs, places), list(given), others, results)


def _divided(jaxpr: Any) -> tuple[list[Any], dict[int, tuple[list[Any], list[int]]]]:
    """Returns the equations that more results need than one piece has, and the others in groups.

    A group has the equations of some results, and the positions of these: whatever depends on a common equation.
    """
    groups = _Groups(len(jaxpr.outvars))
    # What needs each variable: groups, by any of their results; None stands for a shared equation.
    needed: dict[Any, set[int | None]] = {var: set() for eqn in jaxpr.eqns for var in eqn.outvars}
    for position, var in enumerate(jaxpr.outvars):
        if not isinstance(var, jaxprs.Literal) and var in needed:
            needed[var].add(position)
    owners: list[tuple[Any, int | None]] = []
    for eqn in reversed(jaxpr.eqns):
        needing = {each if each is None else groups.of(each) for var in eqn.outvars for each in needed[var]}
        if not needing:
            continue  # nothing reads it
        owner = None if None in needing else groups.join(needing)
        owners.append((eqn, owner))
        for var in eqn.invars:
            if not isinstance(var, jaxprs.Literal) and var in needed:
                needed[var].add(owner)
    found: dict[int, tuple[list[Any], list[int]]] = {}
    for position in range(len(jaxpr.outvars)):
        found.setdefault(groups.of(position), ([], []))[1].append(position)
    shared: list[Any] = []
    for eqn, owner in reversed(owners):
        (shared if owner is None else found[groups.of(owner)][0]).append(eqn)
    return shared, found


class _Groups:
    """Results that belong together, by union-find."""

    def __init__(self, count: int) -> None:
        self._parents, self._sizes = list(range(count)), [1] * count

    def of(self, result: Any) -> int:
        """Returns the first of the group of a result."""
        while self._parents[result] != result:
            self._parents[result] = result = self._parents[self._parents[result]]
        return result

    def join(self, groups: set[Any]) -> int | None:
        """Makes one group of several; returns None, and changes nothing, if it would be too large."""
        size = sum(self._sizes[group] for group in groups)
        if size > _PIECE and len(groups) > 1:
            return None
        first = min(groups)
        for group in groups:
            self._parents[group] = first
        self._sizes[first] = size
        return first


def _joined(groups: dict[int, tuple[list[Any], list[int]]], jaxpr: Any) -> Iterator[tuple[list[Any], list[int]]]:
    """Yields groups joined to pieces, alike ones side by side."""
    alike: dict[Hashable, list[tuple[list[Any], list[int]]]] = {}
    for group in groups.values():
        kind = len(group[0]), *(jaxpr.outvars[position].aval for position in group[1])
        alike.setdefault(kind, []).append(group)
    eqns: list[Any] = []
    results: list[int] = []
    for group in (group for same in alike.values() for group in same):
        if results and len(results) + len(group[1]) > _PIECE:
            yield eqns, results
            eqns, results = [], []
        eqns.extend(group[0])
        results.extend(group[1])
    if results:
        yield eqns, results


def _reads(eqns: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """Returns the variables that some equations and results read, and that the equations do not make."""
    made = {var for eqn in eqns for var in eqn.outvars}
    every = (*(var for eqn in eqns for var in eqn.invars), *results)
    return [var for var in dict.fromkeys(v for v in every if not isinstance(v, jaxprs.Literal)) if var not in made]


class _Programs:
    """The compiled functions of the pieces of one program, each of two lists of arrays: donated ones, and others."""

    def __init__(self, jaxpr: Any) -> None:
        self._jaxpr = jaxpr
        self._known: dict[Hashable, Any] = {}

    def of(
        self,
        eqns: Sequence[Any],
        donated: Sequence[Any],
        inputs: Sequence[Any],
        results: Sequence[Any],
        shardings: Sequence[Any],
    ) -> Any:
        """Returns the compiled function of some equations, one for all that do the same."""
        part = jaxprs.Part(self._jaxpr, eqns, [*donated, *inputs], results)
        key = part, len(donated), tuple(shardings)
        if key not in self._known:
            options: dict[str, Any] = {"out_shardings": list(shardings)} if any(shardings) else {}
            self._known[key] = jax.jit(
                lambda given, others: part.run([*given, *others]),
                keep_unused=bool(donated),
                donate_argnums=0 if donated else (),
                **options,
            )
        return self._known[key]
