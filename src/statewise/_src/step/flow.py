"""Follows values forward through a jaxpr: from facts about its inputs to facts about its outputs.

A fact is a bool, such as "depends on a chosen input", or a set, such as "the mesh axes over which it varies".  The fact
about a computed value is the join (`|`) of the facts about its operands, unless a subclass knows better.  Loops are
followed until the facts about what they carry no longer grow.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from statewise._src.common.compat import jaxprs, primitives

__all__ = ["Flow"]

FactT = TypeVar("FactT")  # a bool, or a set


class Flow(Generic[FactT]):
    """Facts about the values of a jaxpr and of the bodies that it calls.

    Args:
      nothing: the fact about a constant.
      everything: the join of all facts.
    """

    def __init__(self, nothing: FactT, everything: FactT) -> None:
        self.nothing, self.everything = nothing, everything
        self._known: dict[tuple[int, tuple[FactT, ...]], tuple[FactT, ...]] = {}

    def outputs(self, closed: Any, inputs: tuple[FactT, ...]) -> tuple[FactT, ...]:
        """Returns the facts about the outputs of a closed or open jaxpr, given those about its inputs."""
        jaxpr = jaxprs.inner_jaxpr(closed)
        key = id(jaxpr), inputs  # ids stay valid: the outer jaxpr keeps its bodies alive
        if key not in self._known:
            facts = dict(zip(jaxpr.invars, inputs, strict=True))
            for eqn in jaxpr.eqns:
                self.follow(eqn, tuple(self._fact(facts, var) for var in eqn.invars), facts)
            self._known[key] = tuple(self._fact(facts, var) for var in jaxpr.outvars)
        return self._known[key]

    def _fact(self, facts: dict[Any, FactT], var: Any) -> FactT:
        return self.nothing if isinstance(var, jaxprs.Literal) else facts.get(var, self.nothing)

    def join(self, facts: Iterable[FactT]) -> FactT:
        """Returns the join of facts."""
        joined: FactT = functools.reduce(operator.or_, facts, self.nothing)
        return joined

    def follow(self, eqn: Any, ins: tuple[FactT, ...], facts: dict[Any, FactT]) -> None:
        """Adds the facts about the results of one equation, given those about its operands."""
        facts.update(zip(eqn.outvars, self.through(eqn, ins), strict=True))

    def through(self, eqn: Any, ins: tuple[FactT, ...]) -> tuple[FactT, ...]:
        """Returns the facts about the results of one equation."""
        name = jaxprs.name_of(eqn)
        if name == primitives.SCAN:
            return self._through_scan(jaxprs.scan_of(eqn), ins)
        if name == primitives.WHILE:
            return self._through_while(jaxprs.while_of(eqn), ins)
        if name == primitives.COND:
            # Operand 0 is the branch index: what is known of it is known of every result.
            branches = [self.outputs(branch, ins[1:]) for branch in jaxprs.branches_of(eqn)]
            return tuple(self.join((ins[0], *of_branches)) for of_branches in zip(*branches, strict=True))
        # A body's inputs may differ from the operands in number (custom rules); then it is not known.
        body = self.body(eqn)
        if body is not None and len(jaxprs.inner_jaxpr(body).invars) == len(ins):
            return self.outputs(body, ins)
        return (self.computed(eqn, ins),) * len(eqn.outvars)

    def body(self, eqn: Any) -> Any:
        """Returns the jaxpr that an equation calls once on its operands; None if there is none, or it is not known."""
        return jaxprs.body_of(eqn)

    def computed(self, eqn: Any, ins: tuple[FactT, ...]) -> FactT:
        """Returns the fact about each result of an equation without a known body."""
        return self.join(ins)

    def _through_scan(self, scan: jaxprs.Scan, ins: tuple[FactT, ...]) -> tuple[FactT, ...]:
        # Operands: constants, carried, scanned.  Results: carried, stacked.
        consts, carry = scan.consts, scan.carry
        carried = slice(consts, consts + carry)
        # Without an iteration the carry comes out as it went in, and the stacked outputs are empty.
        results = (*ins[carried], *[self.nothing] * (len(jaxprs.output_types(scan.body)) - carry))
        for _ in range(scan.length):
            results = self.outputs(scan.body, ins)
            # What is carried is an input of the next iteration.
            after = tuple(map(self.join, zip(ins[carried], results, strict=False)))
            if after == ins[carried]:
                break
            ins = (*ins[:consts], *after, *ins[consts + carry :])
        return results

    def _through_while(self, loop: jaxprs.While, ins: tuple[FactT, ...]) -> tuple[FactT, ...]:
        # Operands: the condition's constants, the body's constants, the carried values.
        cond_consts, consts = loop.cond_consts, loop.body_consts
        of_cond, of_body, carried = ins[:cond_consts], ins[cond_consts:][:consts], ins[cond_consts + consts :]
        while True:
            # What is known of the number of iterations is known of everything that is carried.
            (count,) = self.outputs(loop.cond, (*of_cond, *carried))
            results = self.outputs(loop.body, (*of_body, *carried))
            after = tuple(self.join((count, *pair)) for pair in zip(carried, results, strict=True))
            if after == carried:
                return carried
            carried = after
