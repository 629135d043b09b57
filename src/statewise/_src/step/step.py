"""`Step`: a compiled pure function on a state, with the kinds that it may write declared.

A call does the following:

- The first time with a plan and a signature (the shapes and dtypes of the arguments), the function is traced once, its
  reads and writes are determined, the contract is checked, and a `jax.jit` function is made that takes only the leaves
  that are read or written and returns only those written.
- Every other time, the arrays are taken from the state's parts, that function is called, and the new arrays are put
  into a new state that shares all other parts.

JAX itself distinguishes signatures: the compiled function is called without looking at them, and if JAX starts to trace
it again, then the signature (or JAX's configuration) is new, and the call starts over.  So the Python work of a call
does not grow with the model.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.core.member_view import as_ensemble, as_one, is_of_one_member, single_of
from statewise._src.core.plan import State
from statewise._src.sharding.explicit_axes import explained
from statewise._src.step.aot import Lowered, no_state
from statewise._src.step.arguments import Args, Arguments, Kwargs
from statewise._src.step.definition import ContractOf, Definition
from statewise._src.step.dispatch import CompiledStep, NewSignature, args_key, full_key
from statewise._src.step.function import called_as, check_function, kind_names, named_like
from statewise._src.step.passed_objects import plain_arguments
from statewise._src.step.training import PLAIN, Training
from statewise.errors import StructureError

__all__ = ["Step", "definition_of"]


P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
# A planned object.  A function whose second parameter takes one has several of them before its own arguments, and how
# many its signature does not say: the arguments of such a step are not checked, its state and its result are.
ObjectT = TypeVar("ObjectT", bound=nnx.Pytree)


class Step(Generic[P, R_co]):
    """A compiled pure function on a state; made by `step` and `train_step`.

    Called as `step(state, *args, **kwargs)`.  The function receives the planned objects instead of the state.

    Attributes:
      fn: the function.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> @sw.step
      ... def forward(model, x):
      ...     return model(x)
      >>> forward
      <sw.step forward>
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        contract_of: ContractOf,
        decorator: str,
        capture: str | Sequence[str] | None,
        jit_options: Mapping[str, Any],
        training: Training = PLAIN,
    ) -> None:
        if not callable(fn):
            check_function(fn, decorator)
        named_like(self, fn)
        if capture is not None and not isinstance(capture, str):
            capture = kind_names(capture, "capture", decorator)
        self._definition = Definition(
            fn,
            getattr(fn, "__name__", type(fn).__name__),
            decorator,
            contract_of,
            capture,
            Arguments(fn, jit_options, in_parts=training.microbatches > 1),
            training,
        )
        self._lock = threading.RLock()
        # By plan: all entries by their full key; the latest entry for each key of the arguments; the only entry, if
        # there is one.
        self._entries: dict[Any, dict[Any, CompiledStep]] = {}
        self._recent: dict[Any, dict[Any, CompiledStep]] = {}
        self._only: dict[Any, CompiledStep] = {}

    @property
    def fn(self) -> Callable[..., Any]:
        """Returns the function; assigning another one is for tests, for example to count traces."""
        return self._definition.fn

    @fn.setter
    def fn(self, fn: Callable[..., Any]) -> None:
        self._definition = dataclasses.replace(self._definition, fn=fn)

    def __repr__(self) -> str:
        return f"<sw.{self._definition.decorator} {self._definition.name}>"

    @overload
    def __call__(self: "Step[Concatenate[ObjectT, ...], R]", state: State, /, *args: object, **kwargs: object) -> R: ...
    @overload
    def __call__(self, state: State, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def __call__(self, state: State, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the step on a state; see `step` and `train_step`."""
        if type(state) is not State:
            raise no_state(self._definition.name, state)
        plan = state.tables
        if plan.ensemble is not None:
            return self._call_on_member(state, args, kwargs)
        entry = self._only.get(plan)
        if entry is None and plan in self._recent:
            entry = self._recent[plan].get(args_key(args, kwargs, self._definition.arguments, plan))
        if entry is not None:
            try:
                return entry.run(state, args, kwargs)
            except NewSignature:
                pass
        return self._call_new(state, args, kwargs)

    def lower(self, state: State, /, *args: object, **kwargs: object) -> Lowered[R_co]:
        """Traces and lowers for these arguments, ahead of time; they may be `jax.ShapeDtypeStruct`s.

        Args:
          state: a state, or an abstract one (`plan.abstract()`).
          *args: the step's other arguments.
          **kwargs: the same by name.

        Returns:
          what `jax.jit(f).lower(...)` returns; its `compile()` gives a function of a state.
        """
        if type(state) is not State:
            raise no_state(self._definition.name, state)
        if state.tables.ensemble is not None:
            raise self._not_mapped(state, args, "jax.jit({}).lower(state{})")
        args, kwargs = plain_arguments(args, kwargs) or (args, kwargs)
        with self._lock, explained(self._definition.name, state, args, kwargs):
            entry = self._entry(state, args, kwargs)
            with entry.tracing():
                return Lowered(entry, entry.lower(state, args, kwargs))

    # --- ensembles ---------------------------------------------------------------------------------------------

    def _call_on_member(self, state: State, args: Args, kwargs: Kwargs) -> Any:
        """Runs the step inside `jax.vmap`, where the arrays are those of one member, under the plan of the ensemble."""
        if not is_of_one_member(state):
            raise self._not_mapped(state, args, "{}(state{})")
        member = as_one(state)
        result: Any = self(member, *args, **kwargs)
        if not self._definition.contract_of(member.tables, self._definition.name).returns_state:
            return result
        after, out = result
        return as_ensemble(state.tables.ensemble, after), out

    def _not_mapped(self, state: State, args: Any, call: str) -> StructureError:
        single, count = single_of(state.tables), state.tables.members
        names = [self._definition.arguments.name_of(place, single.object_count) for place in range(len(args))]
        shapes = [list(map(jnp.shape, jax.tree.leaves(arg))) for arg in args]
        # Map what has an axis of the ensemble's size; the hint says to adjust the rest.
        axes = [str(0 if own and all(shape[:1] == (count,) for shape in own) else None) for own in shapes]
        returns = "(axes, 0)" if self._definition.contract_of(single, self._definition.name).returns_state else "0"
        step = called_as(self._definition.name)
        mapped = f"jax.vmap({step}, in_axes=({', '.join(['axes', *axes])}{',' * (not axes)}), out_axes={returns})"
        return StructureError(
            f"{self._definition.name} is a step of one model, but this state is an ensemble of {count}.",
            hint="axes = state.plan.axes()\n"
            + call.format(mapped, "".join(f", {name}" for name in names))
            + f"\nif an argument has an axis of {count}, one entry for each member: 0 instead of its None",
        )

    # --- a signature not seen before ---------------------------------------------------------------------------

    def _call_new(self, state: State, args: Args, kwargs: Kwargs) -> Any:
        """Calls the step with a signature that may be new: traces, checks and compiles if it is."""
        plain = plain_arguments(args, kwargs)
        if plain is not None:
            return self(state, *plain[0], **plain[1])
        if compat.jit_is_disabled():
            with explained(self._definition.name, state, args, kwargs):
                return self._call_eagerly(state, args, kwargs)
        with self._lock, explained(self._definition.name, state, args, kwargs):
            entry = self._entry(state, args, kwargs)
            if entry.ready:
                try:
                    return self._run(entry, state, args, kwargs)
                except NewSignature:
                    # The same types under another configuration of JAX, such as a mesh or a matmul precision.
                    entry = self._entry(state, args, kwargs, retrace=True)
            with entry.tracing():
                result = self._run(entry, state, args, kwargs)
            entry.ready = True
            return result

    def _run(self, entry: CompiledStep, state: State, args: Args, kwargs: Kwargs) -> Any:
        result = entry.run(state, args, kwargs)
        if not entry.closes_over_tracers:
            plan = state.tables
            recent = self._recent.setdefault(plan, {})
            recent[args_key(args, kwargs, self._definition.arguments, plan)] = entry
            arguments = self._definition.arguments
            if len(recent) == 1 and not (arguments.static or arguments.in_parts or plan.per_device):
                self._only[plan] = entry
            else:
                self._only.pop(plan, None)
        return result

    def _entry(self, state: State, args: Args, kwargs: Kwargs, retrace: bool = False) -> CompiledStep:
        """Returns the entry for this plan and signature; traces the function if it is new."""
        entries = self._entries.setdefault(state.tables, {})
        key = (
            args_key(args, kwargs, self._definition.arguments, state.tables),
            full_key(state, self._definition.arguments.split(args, kwargs, state.tables.object_count)[:3]),
        )
        if not retrace and key in entries:
            return entries[key]
        traced, contract, specs = self._definition.trace_checked(state, args, kwargs)
        self._definition.judge(state.tables, traced, contract)
        entry = self._definition.make_entry(state.tables, traced, contract, specs)
        if not entry.closes_over_tracers:  # otherwise it belongs to the caller's trace, and ends with it
            entries[key] = entry
        return entry

    # --- without compilation, under jax.disable_jit ------------------------------------------------------------

    def _call_eagerly(self, state: State, args: Args, kwargs: Kwargs) -> Any:
        """Runs the user's function on the arrays themselves, so that a debugger and `print` work.

        A trace still determines what it writes and whether it may: without compilation a scan unrolls, and every leaf
        that went through one would look written.
        """
        plan = state.tables
        if plan.per_device:  # a debugger cannot step through code on several devices
            with jax.disable_jit(False):
                return self(state, *args, **kwargs)
        with jax.disable_jit(False):
            traced, contract, _ = self._definition.trace_checked(state, args, kwargs)
            self._definition.judge(plan, traced, contract)
        call, dynamic = self._definition.call(plan, args, kwargs)
        eager = call.eager(traced, state, dynamic)
        entry = self._definition.make_entry(plan, eager, contract)
        state = entry.not_stale(state)
        donated, _, read_only, _, _ = entry.operands_from(state, args, kwargs)
        written, out = entry.program(donated, read_only, *dynamic)
        return (entry.received(state, written, donated=False), out) if contract.returns_state else out


def definition_of(step: Step[..., Any]) -> Definition:
    """Returns the definition of a step."""
    return step._definition
