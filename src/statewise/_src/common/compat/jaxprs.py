"""What an equation of a jaxpr says: the classes, the parameters and the bodies, under names of our own.

Nothing else reads `eqn.primitive` or `eqn.params`, whose names and contents differ between versions of JAX: jax 0.10
has closed and open jaxprs, 0.12 has one class for both; what a `scan` carries is a parameter of one and not of the
other.  The grammar of a jaxpr is read everywhere: `eqns`, `invars`, `outvars`, `constvars`, and a variable's `aval`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

from statewise._src.common.compat import primitives

__all__ = [
    "Literal",
    "Operation",
    "Part",
    "Scan",
    "While",
    "axes_of",
    "bodies_of",
    "body_of",
    "branches_of",
    "consts_of",
    "dce",
    "eval_jaxpr",
    "has_axis_groups",
    "inner_jaxpr",
    "input_types",
    "is_reference",
    "keeps_order",
    "name_of",
    "operation_of",
    "output_types",
    "permutation_of",
    "scan_of",
    "specs_of",
    "while_of",
    "written_variables",
]

Literal = jex_core.Literal


# --- a jaxpr ----------------------------------------------------------------------------------------------------


def inner_jaxpr(jaxpr: Any) -> Any:
    """Returns the open jaxpr: parameters of primitives hold closed ones on jax 0.10 and open ones on 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def consts_of(jaxpr: Any) -> Sequence[Any]:
    """Returns the values of the constants of a closed jaxpr; none for an open one."""
    consts: Sequence[Any] = getattr(jaxpr, "consts", ())
    return consts


def input_types(jaxpr: Any) -> list[Any]:
    """Returns the types of the inputs."""
    return [var.aval for var in inner_jaxpr(jaxpr).invars]


def output_types(jaxpr: Any) -> list[Any]:
    """Returns the types of the outputs."""
    return [var.aval for var in inner_jaxpr(jaxpr).outvars]


def dce(jaxpr: Any, used: Sequence[bool]) -> tuple[Any, list[bool]]:
    """Removes what the used outputs do not need; returns the reduced open jaxpr and which inputs it reads."""
    smaller, reads = partial_eval.dce_jaxpr(jaxpr, list(used))
    return smaller, list(reads)


def eval_jaxpr(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs an open jaxpr on values or tracers."""
    return jax.core.eval_jaxpr(jaxpr, consts, *args)


def is_reference(var: Any) -> bool:
    """Returns whether a variable of a jaxpr is a reference to an array that changes in place (`jax.new_ref`)."""
    return hasattr(var.aval, "inner_aval")


def written_variables(jaxpr: Any, operands: Sequence[Any] = ()) -> Iterator[Any]:
    """Yields the hijax Variables among a program's constants that it writes; only flax 0.12.8 lets a trace do so.

    Args:
      jaxpr: the program, closed or open.
      operands: the Variables among its inputs, None for every other input.
    """
    inner = inner_jaxpr(jaxpr)
    known = dict(zip(inner.constvars, consts_of(jaxpr), strict=False)) | dict(zip(inner.invars, operands, strict=False))
    for eqn in inner.eqns:
        given = [var.val if isinstance(var, Literal) else known.get(var) for var in eqn.invars]
        if name_of(eqn) == primitives.SET_VARIABLE and given[0] is not None:
            yield given[0]
        for body in bodies_of(eqn):
            same = len(inner_jaxpr(body).invars) == len(given)
            yield from written_variables(body, given if same else ())


class Part:
    """Some equations of an open jaxpr, as a function of their own; two parts are equal if they do the same.

    Args:
      jaxpr: the open jaxpr.
      eqns: the equations, in its order.
      inputs: the variables that they read and do not make.
      results: the variables or literals to return.
    """

    __slots__ = ("_does", "_jaxpr")

    def __init__(self, jaxpr: Any, eqns: Sequence[Any], inputs: Sequence[Any], results: Sequence[Any]) -> None:
        self._jaxpr = jaxpr.replace(constvars=[], invars=list(inputs), outvars=list(results), eqns=list(eqns))
        numbers = {var: number for number, var in enumerate(inputs)}

        def named(var: Any) -> Any:
            return (var.aval, np.asarray(var.val).tobytes()) if isinstance(var, Literal) else numbers[var]

        does: list[Any] = [len(inputs)]
        for eqn in eqns:
            does.append((operation_of(eqn), eqn.ctx, *map(named, eqn.invars)))
            numbers |= {var: len(numbers) + index for index, var in enumerate(eqn.outvars)}
        self._does = (*does, *map(named, results))

    def __hash__(self) -> int:
        return hash(self._does)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and self._does == other._does

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Returns the results of other inputs, which may be tracers."""
        return eval_jaxpr(self._jaxpr, (), inputs)


# --- an equation ------------------------------------------------------------------------------------------------


def name_of(eqn: Any) -> str:
    """Returns the name of the primitive that an equation applies."""
    name: str = eqn.primitive.name
    return name


class _Params(dict):
    """An equation's parameters, compared by value (arrays by identity), and hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and self.keys() == other.keys() and all(_same(self[k], other[k]) for k in self)


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if isinstance(first, np.ndarray | jax.Array) or isinstance(second, np.ndarray | jax.Array):
        return False
    if isinstance(first, list | tuple) and type(first) is type(second) and len(first) == len(second):
        return all(map(_same, first, second))
    return bool(first == second)


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """What an equation applies to its operands; two operations are equal if they do the same."""

    primitive: Any
    params: dict[str, Any]

    def apply(self, operands: Sequence[Any]) -> list[Any]:
        """Returns the results on other operands, which may be tracers."""
        results = self.primitive.bind(*operands, **self.params)
        return list(results) if self.primitive.multiple_results else [results]


def operation_of(eqn: Any) -> Operation:
    """Returns what an equation applies to its operands."""
    return Operation(eqn.primitive, _Params(eqn.params))


def permutation_of(eqn: Any) -> tuple[int, ...]:
    """Returns the order of the axes that a `transpose` makes."""
    return tuple(eqn.params["permutation"])


def keeps_order(eqn: Any) -> bool:
    """Returns whether an equation that reshapes keeps the elements in order and adds none."""
    if eqn.invars[0].aval.size != eqn.outvars[0].aval.size:
        return False
    if name_of(eqn) == primitives.RESHAPE:
        return eqn.params["dimensions"] is None  # otherwise it transposes first
    # A broadcast keeps the order if it keeps the order of the operand's axes.
    axes = eqn.params.get("broadcast_dimensions", ())
    return tuple(axes) == tuple(sorted(axes))


def axes_of(eqn: Any) -> set[Any]:
    """Returns the axes that an equation names: the mesh axes of a collective or of `axis_index`."""
    values = (eqn.params.get(key, ()) for key in ("axes", "axis_name"))
    return {name for value in values for name in (value if isinstance(value, tuple) else (value,))}


def has_axis_groups(eqn: Any) -> bool:
    """Returns whether a collective joins groups of the devices along its axes, each on its own."""
    return eqn.params.get("axis_index_groups") is not None


# --- the bodies of an equation ----------------------------------------------------------------------------------

# The parameters that may hold the body of a call.
_BODIES = ("jaxpr", "call_jaxpr", "call")


def body_of(eqn: Any) -> Any:
    """Returns the jaxpr that an equation calls once, on its own operands; None if it does not."""
    if name_of(eqn) not in primitives.CALLS:
        return None
    return next(eqn.params[name] for name in _BODIES if name in eqn.params)


def bodies_of(eqn: Any) -> Iterator[Any]:
    """Yields every jaxpr, closed or open, in the parameters of an equation, whatever calls it and how."""
    for value in eqn.params.values():
        for body in value if isinstance(value, list | tuple) else (value,):
            if hasattr(inner_jaxpr(body), "eqns"):
                yield body


def branches_of(eqn: Any) -> Sequence[Any]:
    """Returns the bodies of a `cond`; operand 0 is the index of the one that runs, the others are their inputs."""
    branches: Sequence[Any] = eqn.params["branches"]
    return branches


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
    """A `scan`: its operands and the body's inputs are constants, carried, scanned; its results carried, stacked.

    Attributes:
      body: the jaxpr of one iteration.
      consts: how many operands are constants.
      carry: how many are carried.
      length: how many iterations there are.
    """

    body: Any
    consts: int
    carry: int
    length: int


def scan_of(eqn: Any) -> Scan:
    """Returns what a `scan` runs.

    jax 0.10 has the numbers of constants and of carried values among the parameters, 0.12 does not.  On both, a scanned
    operand (or result) has one more axis outside the body than inside, and the operands are in the order constants,
    carry, scanned.
    """
    body = inner_jaxpr(eqn.params["jaxpr"])
    scanned, stacked = (
        sum(len(outer.aval.shape) != len(inner.aval.shape) for outer, inner in zip(outside, inside, strict=True))
        for outside, inside in ((eqn.invars, body.invars), (eqn.outvars, body.outvars))
    )
    carry = len(eqn.outvars) - stacked
    return Scan(eqn.params["jaxpr"], len(eqn.invars) - scanned - carry, carry, eqn.params["length"])


@dataclasses.dataclass(frozen=True, slots=True)
class While:
    """A `while`: its operands are the condition's constants, the body's constants, the carried values.

    Attributes:
      cond: the jaxpr of the condition, of its constants and the carried values.
      body: the jaxpr of one iteration, of its constants and the carried values.
      cond_consts: how many constants the condition has.
      body_consts: how many constants the body has.
    """

    cond: Any
    body: Any
    cond_consts: int
    body_consts: int


def while_of(eqn: Any) -> While:
    """Returns what a `while` runs."""
    params = eqn.params
    return While(params["cond_jaxpr"], params["body_jaxpr"], params["cond_nconsts"], params["body_nconsts"])


def specs_of(eqn: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns how the operands and the results of a `shard_map` are split."""
    return eqn.params["in_specs"], eqn.params["out_specs"]
