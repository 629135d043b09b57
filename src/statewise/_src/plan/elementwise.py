"""Is an optimizer elementwise?  Told from its jaxpr, never from its name.

An elementwise optimizer treats every element of a parameter alike: its update is made of the element's own
parameter, gradient and moments, and of scalars that all elements share (a step count, a learning rate, a
global norm).  Such an update may run on a buffer in which many leaves stand one after the other, which is what
makes packed training cheap.  Whether a transformation is of that sort is proven on the program that it traces
to, for the very leaves that it will update:

- every variable of the jaxpr is given a *node*: an expression over roles (`param`, `grad`, and each moment by
  where it stands in the optimizer's state), over shared values, and elementwise primitives;
- an output that belongs to a leaf must be such an expression of that leaf alone;
- leaves whose outputs are the same expressions may share a buffer; others (of a masked weight decay, say) get
  one of their own.

What is shared may come from anywhere but the moments of leaves: a norm over all gradients is computed from the
gradients as the backward pass leaves them, before they are packed.  Anything else (factored moments, matrix
methods, trust ratios, noise) makes the proof fail, and the update then runs leaf by leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.paths import Path
from statewise._src.plan.derived import Derived

__all__ = ["Elementwise", "prove_elementwise"]

PARAM, GRAD = "param", "grad"

_NAMES = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt
    integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision rem round
    rsqrt select_n sign sin sqrt square sub tan tanh xor
"""
_ELEMENTWISE = frozenset(_NAMES.split())
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


class _Refused(Exception):
    """The proof does not go through."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Value:
    """What is known of one variable.

    Attributes:
      node: its expression, by number.
      leaf: which leaf it belongs to; None for a shared value.
      shape: its shape.
      uniform: whether it is one scalar, however broadcast.
    """

    node: int
    leaf: int | None
    shape: tuple[int, ...]
    uniform: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise:
    """The proof, in a form that can be run.

    Attributes:
      signatures: per leaf (in the group's order), what its update computes; leaves of equal ones may be packed.
      roles: per array of the optimizer's state its role and its leaf; None for a shared one.
    """

    signatures: tuple[tuple[tuple[str, int], ...], ...]
    roles: tuple[tuple[str, int] | None, ...]
    _nodes: list[tuple[Any, ...]]
    _shared_out: tuple[int | None, ...]

    def shared(self, params: Sequence[Any], grads: Sequence[Any], moments: Sequence[Any], loss: Any) -> _Run:
        """Starts a run: shared values are computed from these, as they are needed, leaf by leaf.

        Args:
          params: the parameters, one array per leaf.
          grads: the gradients, one array per leaf.
          moments: the optimizer's state, one entry per array; only the shared ones are looked at.
          loss: the loss.
        """
        return _Run(self, params, grads, moments, loss)


class _Run:
    """One update in the making; values of shared nodes are computed once."""

    def __init__(self, proof: Elementwise, params: Any, grads: Any, moments: Any, loss: Any) -> None:
        self.proof = proof
        self.inputs = {PARAM: params, GRAD: grads, "moments": moments, "loss": [loss]}
        self.known: dict[tuple[int, int | None], Any] = {}

    def leaf(self, signature: Sequence[tuple[str, int]], arrays: dict[str, Any]) -> dict[str, Any]:
        """The new arrays by role, from the arrays by role: of one leaf, or of many in a buffer."""
        made: dict[int, Any] = {}
        shape = arrays[PARAM].shape
        return {role: jnp.broadcast_to(self._on(node, arrays, made, shape), shape) for role, node in signature}

    def shared_moments(self) -> list[Any]:
        """The new value of each shared array of the optimizer's state; None for those that belong to leaves."""
        return [None if node is None else self._absolute(node, None) for node in self.proof._shared_out]

    def _on(self, node: int, arrays: dict[str, Any], made: dict[int, Any], shape: tuple[int, ...]) -> Any:
        if node not in made:
            what, *rest = self.proof._nodes[node]
            if what == "role":
                made[node] = arrays[rest[0]]
            elif what == "op":
                primitive, params, operands, _ = rest
                values = [self._on(operand, arrays, made, shape) for operand in operands]
                made[node] = _bind(primitive, params, values, shape)
            else:  # the same for all leaves
                made[node] = self._absolute(node, None)
        return made[node]

    def _absolute(self, node: int, leaf: int | None) -> Any:
        """The value of a shared node, or of a leaf's own node where something shared is made from it."""
        key = node, leaf
        if key not in self.known:
            what, *rest = self.proof._nodes[node]
            if what == "role":
                assert leaf is not None
                if rest[0] not in (PARAM, GRAD):
                    raise _Refused("a shared value is made from a leaf's moments")
                self.known[key] = self.inputs[rest[0]][leaf]
            elif what == "input":
                self.known[key] = self.inputs[rest[0]][rest[1]]
            elif what == "literal":
                self.known[key] = rest[0]
            elif what == "op":
                primitive, params, operands, _ = rest
                values = [self._absolute(operand, leaf) for operand in operands]
                shape = jnp.broadcast_shapes(*(jnp.shape(value) for value in values))
                self.known[key] = _bind(primitive, params, values, shape)
            else:  # any other equation, on values of several leaves
                eqn, operands, position = rest
                values = [self._absolute(operand, of) for operand, of in operands]
                shaped = [
                    jnp.broadcast_to(value, var.aval.shape) for value, var in zip(values, eqn.invars, strict=True)
                ]
                results = eqn.primitive.bind(*shaped, **eqn.params)
                self.known[key] = results[position] if eqn.primitive.multiple_results else results
        return self.known[key]


def _bind(primitive: Any, params: dict[str, Any], values: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """Applies an elementwise primitive; scalars are spread to the shape of the others."""
    if any(jnp.shape(value) for value in values):
        values = [value if jnp.shape(value) else jnp.broadcast_to(value, shape) for value in values]
    return primitive.bind(*values, **params)


def prove_elementwise(group: Derived, tx: Any) -> Elementwise | None:
    """Tries to prove that a transformation is elementwise on the leaves that it updates; None where it is not."""
    specs = [spec for _, row_specs, _ in group.rows for spec in row_specs]
    try:
        return _Proof(group, tx, specs).conclude()
    except _Refused:
        return None


class _Proof:
    """The nodes of one optimizer's jaxpr."""

    def __init__(self, group: Derived, tx: Any, specs: list[ArraySpec]) -> None:
        self.group = group
        self.tx = tx
        self.specs = specs
        self.nodes: list[tuple[Any, ...]] = []
        self.numbers: dict[Any, int] = {}
        self.values: dict[Any, _Value] = {}
        self.checked: set[int] = set()
        self.checked_shared: set[int] = set()
        self.roles = _roles(group, specs)

    def conclude(self) -> Elementwise:
        closed = _traced(self.group, self.tx, self.specs)
        jaxpr = compat.inner_jaxpr(closed)
        # In the order of `_traced`: params, grads, moments, loss.
        inputs = iter(jaxpr.invars)
        for role in (PARAM, GRAD):
            for leaf, spec in enumerate(self.specs):
                self.values[next(inputs)] = _Value(self.node("role", role), leaf, spec.shape, False)
        for position, (owner, spec) in enumerate(zip(self.roles, self.group.layout.specs, strict=True)):
            var = next(inputs)
            if owner is None:
                node = self.node("input", "moments", position)
                self.values[var] = _Value(node, None, spec.shape, spec.shape == ())
            else:
                self.values[var] = _Value(self.node("role", owner[0]), owner[1], spec.shape, False)
        self.values[next(inputs)] = _Value(self.node("input", "loss", 0), None, (), True)
        self.run(jaxpr, closed.consts)
        return self.outputs([self.value(var) for var in jaxpr.outvars])

    def outputs(self, outs: Sequence[_Value]) -> Elementwise:
        """Checks that each output belongs where it must, and collects the leaves' signatures."""
        count = len(self.specs)
        of_leaf: list[list[tuple[str, int]]] = [[] for _ in self.specs]
        shared: list[int | None] = []
        owners: list[tuple[str, int] | None] = [*((PARAM, leaf) for leaf in range(count)), *self.roles]
        for position, (owner, out) in enumerate(zip(owners, outs, strict=True)):
            if owner is None:
                if out.leaf is not None:
                    raise _Refused("a shared moment is made from one leaf")
                self.check_shared(out.node)
                shared.append(out.node)
                continue
            # A new value of a leaf may depend on that leaf and on shared scalars, and on nothing else.
            if out.leaf not in (owner[1], None) or (out.leaf is None and not out.uniform):
                raise _Refused("a leaf's output is not its own")
            self.check_leaf(out.node)
            of_leaf[owner[1]].append((owner[0], out.node))
            # Parameters come first; `shared` has an entry for each moment only.
            if position >= count:
                shared.append(None)
        return Elementwise(tuple(map(tuple, of_leaf)), self.roles, self.nodes, tuple(shared))

    def check_leaf(self, node: int) -> None:
        if node in self.checked:
            return
        self.checked.add(node)
        what, *rest = self.nodes[node]
        if what == "op":
            for operand in rest[2]:
                self.check_leaf(operand)
        elif what == "eqn":
            self.check_shared(node)

    def check_shared(self, node: int) -> None:
        """What is shared must not need a leaf's moments, which are packed by then."""
        if node in self.checked_shared:
            return
        self.checked_shared.add(node)
        what, *rest = self.nodes[node]
        if what == "role" and rest[0] not in (PARAM, GRAD):
            raise _Refused("a shared value is made from a leaf's moments")
        if what == "op":
            for operand in rest[2]:
                self.check_shared(operand)
        elif what == "eqn":
            for operand, _ in rest[1]:
                self.check_shared(operand)

    # --- from equations to nodes -------------------------------------------------------------------------------

    def node(self, *key: Any) -> int:
        """The number of an expression; equal expressions have one."""
        if key not in self.numbers:
            self.numbers[key] = len(self.nodes)
            self.nodes.append(key)
        return self.numbers[key]

    def value(self, var: Any) -> _Value:
        if isinstance(var, compat.Literal):
            aval: Any = var.aval
            # Literals are scalars; equal ones of different dtypes are different.
            number = self.node("literal", _Literal(var.val, str(aval.dtype)))
            # NumPy's: an array of JAX would become a hidden argument of every program that it stands in.
            self.nodes[number] = ("literal", np.asarray(var.val, aval.dtype))
            return _Value(number, None, (), True)
        return self.values[var]

    def run(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            number = self.node("constant", id(const))
            self.nodes[number] = ("literal", _on_host(const))
            self.values[var] = _Value(number, None, jnp.shape(const), jnp.shape(const) == ())
        for eqn in jaxpr.eqns:
            if eqn.effects:
                raise _Refused("it has side effects")
            if eqn.primitive.name in _INLINED:
                body = eqn.params[_INLINED[eqn.primitive.name]]
                # Inlined: the variables of the body get the values of the call.
                inner = compat.inner_jaxpr(body)
                for var, outer in zip(inner.invars, eqn.invars, strict=True):
                    self.values[var] = self.value(outer)
                self.run(inner, getattr(body, "consts", ()))
                for var, made in zip(eqn.outvars, inner.outvars, strict=True):
                    self.values[var] = self.value(made)
            else:
                for position, var in enumerate(eqn.outvars):
                    self.values[var] = self.applied(eqn, position)

    def applied(self, eqn: Any, position: int) -> _Value:
        name, shape = eqn.primitive.name, eqn.outvars[position].aval.shape
        operands = [self.value(var) for var in eqn.invars]
        if name in ("broadcast_in_dim", "reshape", "squeeze") and (operands[0].uniform or operands[0].shape == shape):
            return dataclasses.replace(operands[0], shape=shape)
        # Elementwise on one leaf: each operand is a scalar or has the shape of the result, and no other leaf is
        # involved.
        leaves = {operand.leaf for operand in operands if operand.leaf is not None}
        fits = all(operand.uniform or operand.shape == shape for operand in operands)
        own = all(operand.uniform or operand.leaf is not None for operand in operands)
        uniform = all(operand.uniform for operand in operands)
        if name in _ELEMENTWISE and fits and len(leaves) <= 1 and (own or not leaves) and (uniform or leaves):
            key = tuple(operand.node for operand in operands)
            # The dtypes are part of the expression: leaves of other dtypes are updated by another program.
            dtypes = tuple(str(getattr(var.aval, "dtype", "")) for var in eqn.invars)
            node = self.node("op", eqn.primitive, _Params(eqn.params), key, dtypes)
            return _Value(node, next(iter(leaves), None), shape, uniform)
        # Anything else (a norm over all leaves, a step count) is shared: computed once, on the unpacked arrays.
        node = self.node("eqn", _Same(eqn), tuple((operand.node, operand.leaf) for operand in operands), position)
        return _Value(node, None, shape, shape == ())


def _on_host(const: Any) -> Any:
    """A constant as NumPy's, where NumPy knows its dtype."""
    is_key = jnp.issubdtype(const.dtype, jax.dtypes.extended)
    return const if is_key or isinstance(const, jax.core.Tracer) else np.asarray(const)


class _Params(dict):
    """An equation's parameters, hashable: they are compared by value."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self)))


@dataclasses.dataclass(frozen=True)
class _Literal:
    """A scalar constant with its dtype; NaN is itself, and 0.0 is not -0.0."""

    val: Any
    dtype: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Literal) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class _Same:
    """An equation, compared by identity, that lends its parts."""

    def __init__(self, eqn: Any) -> None:
        self.eqn = eqn
        self.primitive, self.params, self.invars = eqn.primitive, eqn.params, eqn.invars

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.eqn is other.eqn

    def __hash__(self) -> int:
        return id(self.eqn)


def _traced(group: Derived, tx: Any, specs: Sequence[ArraySpec]) -> Any:
    """The jaxpr of one update: (params, grads, moments, loss) -> (new params, new moments)."""

    def refuse(*_: Any) -> Any:
        raise _Refused("it evaluates the loss again")

    def update(params: Any, grads: Any, moments: Any, loss: Any) -> Any:
        nested, gradients = group.params(params), group.params(grads)
        state = jax.tree.unflatten(group.layout.structure, moments)
        updates, state = tx.update(gradients, state, nested, value=loss, grad=gradients, value_fn=refuse)
        new = optax.apply_updates(nested, updates)
        return group.arrays(new), group.layout.structure.flatten_up_to(state)

    shapes = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs]
    moments = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in group.layout.specs]
    return jax.make_jaxpr(update)(shapes, shapes, moments, jax.ShapeDtypeStruct((), jnp.float32))


def _roles(group: Derived, specs: Sequence[ArraySpec]) -> tuple[tuple[str, int] | None, ...]:
    """For each array of the optimizer's state, the leaf whose path its own ends with, and what stands before it."""
    by_path = {path: leaf for leaf, path in enumerate(group.paths)}
    lengths = sorted({len(path) for path in by_path}, reverse=True)
    return tuple(
        next(_owners(path, spec, by_path, lengths, specs), None)
        for path, spec in zip(group.layout.paths, group.layout.specs, strict=True)
    )


def _owners(
    path: Path, spec: ArraySpec, by_path: dict[Path, int], lengths: Sequence[int], specs: Sequence[ArraySpec]
) -> Iterator[tuple[str, int]]:
    for length in lengths:
        leaf = by_path.get(path[len(path) - length :]) if length <= len(path) else None
        if leaf is not None and specs[leaf].shape == spec.shape:
            yield "/".join(map(str, path[: len(path) - length])), leaf
