"""One compiled step for one plan and one signature, and how a call gets to it.

An entry picks the arrays that cross out of a state's parts, calls the compiled function, and puts what comes
back into a new state.  Nothing here depends on the size of the model, only on what the step touches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from statewise.plan import Plan
from statewise import _compat
from statewise.arguments import Arguments, merged
from statewise.errors import StructureError
from statewise.programs import Routes
from statewise.state import Part, State, deleted_kinds, make_state, refuse_shared, spent_error

__all__ = ["Entry", "NewSignature", "args_key", "full_key"]


class NewSignature(Exception):
    """JAX began to trace a compiled step anew: the call is of a signature that it was not made for."""


# Which entry may be traced right now, in this thread.
_tracing = threading.local()


class Entry:
    """A compiled step.

    Attributes:
      program: from (donated, kept, args, kwargs) to (written, output); what is compiled.
      routes: which arrays cross.
    """

    def __init__(
        self,
        plan: Plan,
        name: str,
        program: Callable[..., Any],
        routes: Routes,
        arguments: Arguments,
        *,
        returns_state: bool,
        closes_over_tracers: bool,
    ) -> None:
        self.plan = plan
        self.name = name
        self.program = program
        self.routes = routes
        self.arguments = arguments
        self.objects = plan._objects
        self.returns_state = returns_state
        self.closes_over_tracers = closes_over_tracers
        self.ready = False
        self._donates = tuple((route.kind, route.pick) for route in routes.donated)
        self._keeps = tuple((route.kind, route.pick) for route in routes.kept)
        self._touches = tuple({route.kind for route in (*routes.donated, *routes.kept)})
        self._gives = tuple((route.kind, None if route.pick is None else route.positions) for route in routes.donated)
        self._fn = arguments.jit(self._checked)

    def _checked(self, donated: Any, given: Any, kept: Any, args: Any, kwargs: Any) -> Any:
        if getattr(_tracing, "entry", None) is not self:
            raise NewSignature
        return self.program(donated, kept, *merged(args, kwargs, given))

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Lets JAX trace this entry, for the length of a block, in this thread."""
        before = getattr(_tracing, "entry", None)
        _tracing.entry = self
        try:
            yield
        finally:
            _tracing.entry = before

    def operands(self, state: State, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What the compiled function is called with."""
        parts = state._parts
        donated = [parts[kind].arrays if pick is None else pick(parts[kind].arrays) for kind, pick in self._donates]
        kept = [parts[kind].arrays if pick is None else pick(parts[kind].arrays) for kind, pick in self._keeps]
        if self.arguments.plain:
            return donated, {}, kept, args, kwargs
        split = self.arguments.split(args, kwargs, self.objects)
        return donated, split.given, kept, split.args, split.kwargs

    def run(self, state: State, args: Any, kwargs: Any, fn: Callable[..., Any] | None = None) -> Any:
        """Calls the compiled function, or another compilation of it, on a state.

        Raises:
          NewSignature: it was not made for these arguments; nothing has happened then.
          StructureError: the state is spent, or holds one array twice.
        """
        parts = state._parts
        for kind in self._touches:
            if parts[kind].spent is not None:
                self._refuse_spent(state)
        operands = self.operands(state, args, kwargs)
        try:
            written, out = (fn or self._fn)(*operands)
        except (RuntimeError, ValueError) as error:
            self._explain(state, args, kwargs, error)
            raise
        return (self.received(state, written), out) if self.returns_state else out

    def received(self, state: State, written: Any, donated: bool = True) -> State:
        """The state with its written arrays replaced; the one whose arrays were donated for it is marked spent."""
        parts = state._parts
        made = list(parts)
        for (kind, positions), arrays in zip(self._gives, written, strict=True):
            if positions is not None:
                merged_arrays = list(parts[kind].arrays)
                for position, array in zip(positions, arrays, strict=True):
                    merged_arrays[position] = array
                arrays = tuple(merged_arrays)
            made[kind] = Part(arrays)
        if donated and written and not isinstance(written[0][0], _compat.Tracer):
            for kind, _ in self._gives:
                parts[kind].spent = self.name
        return make_state(self.plan, made)

    def _refuse_spent(self, state: State) -> None:
        names = list(self.plan.kinds)
        raise spent_error(state, [names[kind] for kind in sorted(self._touches) if state._parts[kind].spent])

    def _explain(self, state: State, args: Any, kwargs: Any, error: Exception) -> None:
        """Says what the runtime's error means, where it is about arrays that are gone or given twice."""
        gone = deleted_kinds(state)
        if gone:
            raise spent_error(state, gone) from error
        refuse_shared(state)
        leaves = jax.tree.leaves((args, kwargs))
        mine = {
            id(array): (kind, position)
            for kind, part in zip(self.plan.kinds, state._parts, strict=True)
            for position, array in enumerate(part.arrays)
        }
        for leaf in leaves:
            if isinstance(leaf, _compat.Tracer) or not isinstance(leaf, jax.Array):
                continue
            if leaf.is_deleted():
                raise StructureError(
                    f"An argument of {self.name}, {leaf.dtype}{list(leaf.shape)}, was donated by an earlier step.",
                    mend="copy it before that step: kept = jnp.copy(array)",
                ) from error
            if id(leaf) in mine:
                kind, position = mine[id(leaf)]
                raise StructureError(
                    f"An argument of {self.name} is an array of the state, which the step donates.",
                    leaves=[self.plan._row_of_array[kind][position]],
                    kind=kind,
                    mend="pass a copy: jnp.copy(array)",
                ) from error


def args_key(args: Any, kwargs: Any, arguments: Arguments, objects: int) -> Any:
    """What tells the arguments of one signature from another's, cheaply: structure, shapes, dtypes, static values."""
    split = arguments.split(args, kwargs, objects)
    leaves, structure = jax.tree.flatten((split.args, split.kwargs, split.given))
    return structure, tuple(map(_leaf_key, leaves)), tuple(split.static.items())


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf.shape, leaf.dtype, leaf.weak_type
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.shape, leaf.dtype, False
    return type(leaf)


def full_key(state: State, arguments: Any) -> Any:
    """What tells one signature from another in full, as JAX sees it: the types of all arrays."""
    leaves = jax.tree.leaves((state, arguments))
    return tuple(
        _leaf_key(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) or not _is_typed(leaf) else jax.typeof(leaf)
        for leaf in leaves
    )


def _is_typed(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
