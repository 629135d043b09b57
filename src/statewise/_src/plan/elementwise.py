"""Whether an optimizer is elementwise: determined from its jaxpr, never from its name.

An elementwise optimizer handles each element of a parameter alone: the update is computed from the element's own
parameter, gradient and moments, and from scalars that all elements share (a step count, a learning rate, a global
norm).  Such an update may run on a buffer that holds many leaves one after the other, which is what makes packed
training cheap.  Whether a transformation is elementwise is proved on the program that it traces to, for exactly the
leaves that it will update:

- every variable of the jaxpr gets a *node*: an expression over roles (`param`, `grad`, and each moment by its prefix in
  the optimizer's state), shared values, and elementwise primitives;
- an output that belongs to a leaf must be such an expression of that leaf alone;
- leaves whose outputs are the same expressions may share a buffer; other leaves (under a masked weight decay, say) get
  a buffer of their own.

Shared values may come from anything but the moments of leaves: a norm over all gradients is computed from the gradients
as the backward pass returns them, before they are packed.  Anything else (factored moments, matrix methods, trust
ratios, noise) makes the proof fail, and the update then runs leaf by leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from statewise._src.common import compat
from statewise._src.common.compat import jaxprs, primitives
from statewise._src.plan.derived import Derived

__all__ = ["Elementwise", "prove_elementwise"]

PARAM, GRAD = "param", "grad"

# The primitives whose body is inlined.
_INLINED = primitives.PLAIN_CALLS | {primitives.CUSTOM_JVP}

# A role (`param`, `grad`, or the prefix of a moment) and a leaf by its index.
_Owner = tuple[str, int]


class _Refused(Exception):
    """Raised where the proof fails."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Value:
    """The facts that are known about one variable.

    Attributes:
      node: the number of its expression.
      leaf: the index of the leaf that it belongs to; None for a shared value.
      shape: its shape.
      uniform: whether all its elements are one scalar, broadcast.
    """

    node: int
    leaf: int | None
    shape: tuple[int, ...]
    uniform: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise:
    """The proof, in a form that can be run.

    Attributes:
      signatures: for each leaf (in the group's order), each role that the update writes and the number of its
        expression; leaves with equal signatures may share a buffer.
      roles: for each array of the optimizer's state its role and its leaf; None for a shared one.
    """

    signatures: tuple[tuple[tuple[str, int], ...], ...]
    roles: tuple[_Owner | None, ...]
    _nodes: list[tuple[Any, ...]]
    _shared_out: tuple[int | None, ...]

    def shared(self, params: Sequence[Any], grads: Sequence[Any], moments: Sequence[Any], loss: Any) -> _Run:
        """Starts a run, which computes shared values from these as they are needed.

        Args:
          params: the parameters, one array per leaf.
          grads: the gradients, one array per leaf.
          moments: the optimizer's state, one entry per array; only the shared ones are read.
          loss: the loss.
        """
        return _Run(self, params, grads, moments, loss)


class _Run:
    """One update while it is computed; each shared node is computed once."""

    def __init__(self, proof: Elementwise, params: Any, grads: Any, moments: Any, loss: Any) -> None:
        self.proof = proof
        self.inputs = {PARAM: params, GRAD: grads, "moments": moments, "loss": [loss]}
        self.known: dict[tuple[int, int | None], Any] = {}

    def leaf(self, signature: Sequence[tuple[str, int]], arrays: dict[str, Any]) -> dict[str, Any]:
        """Returns the new arrays by role, from the arrays by role: those of one leaf, or of many in a buffer."""
        known: dict[int, Any] = {}
        shape = arrays[PARAM].shape
        return {role: jnp.broadcast_to(self._on(node, arrays, known, shape), shape) for role, node in signature}

    def shared_moments(self) -> list[Any]:
        """Returns the new value of each shared array of the optimizer's state; None for those that belong to leaves."""
        return [None if node is None else self._absolute(node, None) for node in self.proof._shared_out]

    def _on(self, node: int, arrays: dict[str, Any], known: dict[int, Any], shape: tuple[int, ...]) -> Any:
        """Returns the value of a node on these arrays, which are one leaf or a buffer."""
        if node not in known:
            match self.proof._nodes[node]:
                case "role", role:
                    known[node] = arrays[role]
                case "op", operation, operands, _:
                    values = [self._on(operand, arrays, known, shape) for operand in operands]
                    known[node] = _apply(operation, values, shape)
                case _:  # the same value for all leaves
                    known[node] = self._absolute(node, None)
        return known[node]

    def _absolute(self, node: int, leaf: int | None) -> Any:
        """Returns the value of a shared node, or of a leaf's own node that a shared value is computed from."""
        key = node, leaf
        if key not in self.known:
            match self.proof._nodes[node]:
                case "role", role:
                    assert leaf is not None
                    value = self.inputs[role][leaf]
                case "input", name, position:
                    value = self.inputs[name][position]
                case "literal", literal:
                    value = literal
                case "op", operation, operands, _:
                    values = [self._absolute(operand, leaf) for operand in operands]
                    value = _apply(operation, values, jnp.broadcast_shapes(*map(jnp.shape, values)))
                case _, eqn, operands, position:  # any other equation, on values of several leaves
                    values = [
                        jnp.broadcast_to(self._absolute(operand, owner), var.aval.shape)
                        for (operand, owner), var in zip(operands, eqn.invars, strict=True)
                    ]
                    value = jaxprs.operation_of(eqn).apply(values)[position]
            self.known[key] = value
        return self.known[key]


def _apply(operation: jaxprs.Operation, values: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """Applies an elementwise operation; scalars are broadcast to the shape of the other operands."""
    if any(jnp.shape(value) for value in values):
        values = [value if jnp.shape(value) else jnp.broadcast_to(value, shape) for value in values]
    (result,) = operation.apply(values)
    return result


def prove_elementwise(group: Derived, tx: Any) -> Elementwise | None:
    """Tries to prove that a transformation is elementwise on the leaves that it updates; returns None if it is not."""
    try:
        return _Proof(group, tx).conclude()
    except _Refused:
        return None


class _Proof:
    """The nodes of one optimizer's jaxpr."""

    def __init__(self, group: Derived, tx: Any) -> None:
        self.group = group
        self.tx = tx
        self.specs = group.source_specs
        self.nodes: list[tuple[Any, ...]] = []
        self.numbers: dict[Any, int] = {}
        self.values: dict[Any, _Value] = {}
        self.checked: set[tuple[int, bool]] = set()
        self.roles = _roles(group)

    def conclude(self) -> Elementwise:
        closed = _traced(self.group, self.tx)
        jaxpr = jaxprs.inner_jaxpr(closed)
        # In the order of `_traced`: params, grads, moments, loss.
        inputs = iter(jaxpr.invars)
        for role in (PARAM, GRAD):
            for leaf, spec in enumerate(self.specs):
                self.values[next(inputs)] = _Value(self.node("role", role), leaf, spec.shape, False)
        for position, (owner, spec) in enumerate(zip(self.roles, self.group.layout.specs, strict=True)):
            if owner is None:
                value = _Value(self.node("input", "moments", position), None, spec.shape, spec.shape == ())
            else:
                value = _Value(self.node("role", owner[0]), owner[1], spec.shape, False)
            self.values[next(inputs)] = value
        self.values[next(inputs)] = _Value(self.node("input", "loss", 0), None, (), True)
        self.run(jaxpr, jaxprs.consts_of(closed))
        return self.outputs([self.value(var) for var in jaxpr.outvars])

    def outputs(self, outs: Sequence[_Value]) -> Elementwise:
        """Checks that each output depends only on what it may, and collects the leaves' signatures."""
        of_leaf: list[list[tuple[str, int]]] = [[] for _ in self.specs]
        shared: list[int | None] = []
        owners: list[_Owner | None] = [*((PARAM, leaf) for leaf in range(len(self.specs))), *self.roles]
        for owner, out in zip(owners, outs, strict=True):
            if owner is None:
                if out.leaf is not None:
                    raise _Refused("a shared moment is computed from one leaf")
                self.check(out.node, shared=True)
                shared.append(out.node)
                continue
            # A new value of a leaf may depend on that leaf and on shared scalars, and on nothing else.
            if out.leaf not in (owner[1], None) or (out.leaf is None and not out.uniform):
                raise _Refused("a leaf's output depends on more than the leaf")
            self.check(out.node, shared=False)
            of_leaf[owner[1]].append((owner[0], out.node))
            shared.append(None)
        # The parameters come first among the owners; `shared` has an entry for each moment only.
        return Elementwise(tuple(map(tuple, of_leaf)), self.roles, self.nodes, tuple(shared[len(self.specs) :]))

    def check(self, node: int, *, shared: bool) -> None:
        """Checks that no shared value depends on a leaf's moments, which are already packed when it is computed."""
        if (node, shared) in self.checked:
            return
        self.checked.add((node, shared))
        match self.nodes[node]:
            case "role", role if shared and role not in (PARAM, GRAD):
                raise _Refused("a shared value is computed from a leaf's moments")
            case "op", _, operands, _:
                for operand in operands:
                    self.check(operand, shared=shared)
            case "eqn", _, operands, _:
                for operand, _ in operands:
                    self.check(operand, shared=True)

    # --- from equations to nodes -------------------------------------------------------------------------------

    def node(self, *key: Any, content: tuple[Any, ...] | None = None) -> int:
        """Returns the number of an expression; equal expressions have the same number.

        Args:
          *key: what makes two expressions equal.
          content: what a run reads of it; the key by default.
        """
        if key not in self.numbers:
            self.numbers[key] = len(self.nodes)
            self.nodes.append(content or key)
        return self.numbers[key]

    def value(self, var: Any) -> _Value:
        if not isinstance(var, jaxprs.Literal):
            return self.values[var]
        aval: Any = var.aval
        # NumPy's array: one of JAX would become a hidden argument of every program that contains it.
        content = ("literal", np.asarray(var.val, aval.dtype))
        # Literals are scalars.  As text, NaN equals itself, and 0.0 differs from -0.0.
        return _Value(self.node("literal", repr(var.val), str(aval.dtype), content=content), None, (), True)

    def run(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            node = self.node("constant", id(const), content=("literal", _on_host(const)))
            self.values[var] = _Value(node, None, jnp.shape(const), jnp.shape(const) == ())
        for eqn in jaxpr.eqns:
            if eqn.effects:
                raise _Refused("it has side effects")
            if jaxprs.name_of(eqn) in _INLINED:
                body = jaxprs.body_of(eqn)
                # The variables of the body get the values of the call's operands.
                inner = jaxprs.inner_jaxpr(body)
                for var, operand in zip(inner.invars, eqn.invars, strict=True):
                    self.values[var] = self.value(operand)
                self.run(inner, jaxprs.consts_of(body))
                for var, result in zip(eqn.outvars, inner.outvars, strict=True):
                    self.values[var] = self.value(result)
            else:
                for position, var in enumerate(eqn.outvars):
                    self.values[var] = self.applied(eqn, position)

    def applied(self, eqn: Any, position: int) -> _Value:
        """Returns the value of one result of an equation that is not inlined."""
        name, shape = jaxprs.name_of(eqn), eqn.outvars[position].aval.shape
        operands = [self.value(var) for var in eqn.invars]
        if name in primitives.RESHAPES and (operands[0].uniform or operands[0].shape == shape):
            return dataclasses.replace(operands[0], shape=shape)
        # Elementwise on one leaf: each operand is a scalar or has the shape of the result, and no other leaf is
        # involved.  Elementwise on shared scalars alone gives a shared scalar.
        leaves = {operand.leaf for operand in operands if operand.leaf is not None}
        fits = all(operand.uniform or operand.shape == shape for operand in operands)
        own = all(operand.uniform or operand.leaf is not None for operand in operands)
        uniform = all(operand.uniform for operand in operands)
        if name in primitives.ELEMENTWISE and fits and len(leaves) <= 1 and (own or not leaves) and (uniform or leaves):
            numbers = tuple(operand.node for operand in operands)
            # The dtypes are part of the expression: leaves of other dtypes are updated by another program.
            dtypes = tuple(str(getattr(var.aval, "dtype", "")) for var in eqn.invars)
            node = self.node("op", jaxprs.operation_of(eqn), numbers, dtypes)
            return _Value(node, next(iter(leaves), None), shape, uniform)
        # Anything else (a norm over all leaves, a step count) is shared: computed once, on the unpacked arrays.
        owned = tuple((operand.node, operand.leaf) for operand in operands)
        # By identity: equations are compared by their parts, which may not be hashable.
        node = self.node("eqn", id(eqn), owned, position, content=("eqn", eqn, owned, position))
        return _Value(node, None, shape, shape == ())


def _on_host(const: Any) -> Any:
    """Returns a constant as a NumPy array, if NumPy has its dtype."""
    is_key = jnp.issubdtype(const.dtype, jax.dtypes.extended)
    return const if is_key or isinstance(const, compat.Tracer) else np.asarray(const)


def _traced(group: Derived, tx: Any) -> Any:
    """Returns the jaxpr of one update: (params, grads, moments, loss) -> (new params, new moments)."""

    def refuse(*_: Any) -> Any:
        raise _Refused("it evaluates the loss again")

    def update(params: Any, grads: Any, moments: Any, loss: Any) -> Any:
        nested, gradients = group.params(params), group.params(grads)
        state = jax.tree.unflatten(group.layout.structure, moments)
        updates, state = tx.update(gradients, state, nested, value=loss, grad=gradients, value_fn=refuse)
        new = optax.apply_updates(nested, updates)
        return group.arrays(new), group.layout.structure.flatten_up_to(state)

    shapes = [jax.ShapeDtypeStruct(*spec) for spec in group.source_specs]
    moments = [jax.ShapeDtypeStruct(*spec) for spec in group.layout.specs]
    return jax.make_jaxpr(update)(shapes, shapes, moments, jax.ShapeDtypeStruct((), jnp.float32))


def _roles(group: Derived) -> tuple[_Owner | None, ...]:
    """Returns for each array of the optimizer's state the leaf whose path its own path ends with, and the prefix."""
    by_path = {path: leaf for leaf, path in enumerate(group.paths)}
    roles: list[_Owner | None] = []
    for path, spec in zip(group.layout.paths, group.layout.specs, strict=True):
        roles.append(None)
        for start in range(len(path)):  # the longest path first: `a/b/kernel` before `kernel`
            leaf = by_path.get(path[start:])
            if leaf is not None and group.source_specs[leaf].shape == spec.shape:
                roles[-1] = "/".join(map(str, path[:start])), leaf
                break
    return tuple(roles)
