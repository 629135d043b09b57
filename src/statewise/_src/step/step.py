"""`Step`: a pure function on a state, compiled, with the kinds that it may write declared.

What happens in a call:

- the first time with a plan and a signature (the shapes and dtypes of the arguments), the function is traced
  once, its reads and writes are found, the contract is checked, and a `jax.jit` function is made that takes
  just the leaves that are read or written and returns just those written;
- every other time, the arrays are picked out of the state's parts, that function is called, and the new arrays
  are put into a new state that shares all other parts.

JAX itself tells one signature from another: the compiled function is called at once, and should JAX begin to
trace it anew, then it is a signature (or a configuration of JAX) not seen before, and the call starts over.  So
a call does no Python work that grows with the model.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common import compat
from statewise._src.common.nnx_graph import is_array
from statewise._src.core.member_view import as_ensemble, as_one, is_of_one_member, single_of
from statewise._src.core.plan import State
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import explained
from statewise._src.step.aot import Lowered, no_state
from statewise._src.step.arguments import Arguments, merged
from statewise._src.step.capture import Capture
from statewise._src.step.closures import Bound
from statewise._src.step.contract import Contract, check_loss
from statewise._src.step.dispatch import Entry, NewSignature, args_key, full_key
from statewise._src.step.function import called_as, check_capacity, check_function, kind_names
from statewise._src.step.outside_writes import refuse_baked, refuse_written_arguments
from statewise._src.step.passed_objects import refuse_foreign
from statewise._src.step.program import program_of
from statewise._src.step.shard_map import local_arguments, program_on_each, refuse_differences, specs_of, traced_on_one
from statewise._src.step.trace import Eager, Traced, evaluating, refuse_writes, trace
from statewise._src.step.warnings import cautions_of, objects_of, refuse_untrained
from statewise.errors import StructureError

__all__ = ["Step"]

ContractOf = Callable[[PlanTables, str], Contract]


def _is_shape(thing: Any) -> bool:
    return isinstance(thing, tuple) and all(isinstance(size, int) for size in thing)


def _kinds_captured(names: Any, decorator: str) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else kind_names(names, "capture", decorator)


class Step:
    """A compiled pure function on a state; made by `step` and `train_step`.

    Called as `step(state, *args, **kwargs)`.  The function gets the planned objects in the place of the state.

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
        fn: Callable[..., Any] | Any,
        contract_of: ContractOf,
        decorator: str,
        capture: str | Sequence[str] | Any,
        jit_options: dict[str, Any],
    ) -> None:
        if not callable(fn):
            check_function(fn, decorator)
        # Not its annotations: they are of another call, with the model in the place of the state.
        functools.update_wrapper(self, fn, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        del self.__dict__["__wrapped__"]
        self.fn = fn
        self._name = getattr(fn, "__name__", type(fn).__name__)
        self._decorator = decorator
        self._contract_of = contract_of
        self._capture = None if capture is None else _kinds_captured(capture, decorator)
        self._arguments = Arguments(fn, jit_options)
        self._lock = threading.RLock()
        # By plan: every entry by its full key; the latest for each key of the arguments; the one, if there is one.
        self._entries: dict[Any, dict[Any, Entry]] = {}
        self._recent: dict[Any, dict[Any, Entry]] = {}
        self._only: dict[Any, Entry] = {}

    def __repr__(self) -> str:
        return f"<sw.{self._decorator} {self._name}>"

    def __call__(self, state: State | Any, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the step on a state; see `step` and `train_step`."""
        if type(state) is not State:
            raise no_state(self._name, state)
        plan = state.tables
        if plan.ensemble is not None:
            return self._call_on_member(state, args, kwargs)
        entry = self._only.get(plan)
        if entry is None and plan in self._recent:
            entry = self._recent[plan].get(args_key(args, kwargs, self._arguments, plan))
        if entry is not None:
            try:
                return entry.run(state, args, kwargs)
            except NewSignature:
                pass
        return self._call_anew(state, args, kwargs)

    def lower(self, state: State | Any, /, *args: Any, **kwargs: Any) -> Lowered:
        """Traces and lowers for these arguments, ahead of time; they may be `jax.ShapeDtypeStruct`s.

        Args:
          state: a state, or an abstract one (`plan.abstract()`).
          *args: the step's other arguments.
          **kwargs: the same by name.

        Returns:
          what `jax.jit(f).lower(...)` returns; its `compile()` gives a function of a state.
        """
        if type(state) is not State:
            raise no_state(self._name, state)
        if state.tables.ensemble is not None:
            raise self._not_mapped(state, args, "jax.jit({}).lower(state{})")
        with self._lock, explained(self._name, state, args, kwargs):
            entry = self._entry(state, args, kwargs)
            with entry.tracing():
                return Lowered(entry, entry.lower(state, args, kwargs))

    # --- ensembles ---------------------------------------------------------------------------------------------

    def _call_on_member(self, state: State, args: Any, kwargs: Any) -> Any:
        """Inside of `jax.vmap` the arrays are of one member, under the plan of the ensemble; what comes back too."""
        if not is_of_one_member(state):
            raise self._not_mapped(state, args, "{}(state{})")
        one = as_one(state)
        result = self(one, *args, **kwargs)
        if not self._contract_of(one.tables, self._name).returns_state:
            return result
        after, out = result
        return as_ensemble(state.tables.ensemble, after), out

    def _not_mapped(self, state: State, args: Any, call: str) -> StructureError:
        single, count = single_of(state.tables), state.tables.members
        names = [self._arguments.name_of(place, single.object_count) for place in range(len(args))]
        shapes = [jax.tree.leaves(jax.tree.map(jnp.shape, arg, is_leaf=is_array), is_leaf=_is_shape) for arg in args]
        axes = [str(0 if of and all(shape[:1] == (count,) for shape in of) else None) for of in shapes]
        gives = "(axes, 0)" if self._contract_of(single, self._name).returns_state else "0"
        step = called_as(self._name)
        mapped = f"jax.vmap({step}, in_axes=({', '.join(['axes', *axes])}{',' * (not axes)}), out_axes={gives})"
        return StructureError(
            f"{self._name} is a step of one model, and this state is of an ensemble of {count}.",
            hint="axes = state.plan.axes()\n"
            + call.format(mapped, "".join(f", {name}" for name in names))
            + f"\nwhere an argument has an axis of {count}, one for each member, 0 in the place of its None",
        )

    # --- a signature not seen before ---------------------------------------------------------------------------

    def _call_anew(self, state: State, args: Any, kwargs: Any) -> Any:
        if compat.jit_is_disabled():
            with explained(self._name, state, args, kwargs):
                return self._call_eagerly(state, args, kwargs)
        with self._lock, explained(self._name, state, args, kwargs):
            entry = self._entry(state, args, kwargs)
            if entry.ready:
                try:
                    return self._run(entry, state, args, kwargs)
                except NewSignature:
                    # The same types under another configuration of JAX: a mesh, a matmul precision.
                    entry = self._entry(state, args, kwargs, anew=True)
            with entry.tracing():
                result = self._run(entry, state, args, kwargs)
            entry.ready = True
            return result

    def _run(self, entry: Entry, state: State, args: Any, kwargs: Any) -> Any:
        result = entry.run(state, args, kwargs)
        if not entry.closes_over_tracers:
            plan = state.tables
            recent = self._recent.setdefault(plan, {})
            recent[args_key(args, kwargs, self._arguments, plan)] = entry
            if len(recent) == 1 and not self._arguments.static and not plan.per_device:
                self._only[plan] = entry
            else:
                self._only.pop(plan, None)
        return result

    def _entry(self, state: State, args: Any, kwargs: Any, anew: bool = False) -> Entry:
        """The compiled function for this plan and signature; traced now if it is new."""
        entries = self._entries.setdefault(state.tables, {})
        key = (
            args_key(args, kwargs, self._arguments, state.tables),
            full_key(state, self._arguments.split(args, kwargs, state.tables.object_count)[:3]),
        )
        if not anew and key in entries:
            return entries[key]
        traced, contract, specs = self._trace(state, args, kwargs)
        self._judge(state.tables, traced, contract)
        entry = self._make(state.tables, traced, contract, specs)
        if not entry.closes_over_tracers:  # else it belongs to the caller's own trace, and ends with it
            entries[key] = entry
        return entry

    def _trace(self, state: State, args: Any, kwargs: Any) -> tuple[Traced, Contract, Any]:
        """One call traced and checked; where it runs on each device, also how the arguments are split among them."""
        plan = state.tables
        contract = self._contract_of(plan, self._name)
        traced, specs = self._traced(state, args, kwargs)
        self._refuse_writes(traced, contract, state, args, kwargs)
        if contract.trains:
            check_loss(traced, contract, bool(self._capture), self._name)
        return traced, contract, specs

    def _traced(self, state: State, args: Any, kwargs: Any, *, evaluated: bool = False) -> tuple[Traced, Any]:
        """One call traced, with `model.eval()` before it or not; and how the arguments are split among devices."""
        plan, copies = state.tables, state.tables.per_device
        capture = Capture(plan.kinds, self._capture)
        split = self._arguments.split(args, kwargs, plan.object_count)
        dynamic = merged(split.args, split.kwargs, split.given)
        bound = self._bound(split.static, plan.object_count)
        if evaluated:
            bound = evaluating(bound, plan.object_count)
        name_of = functools.partial(self._arguments.name_of, objects=plan.object_count)
        self._check_arguments(plan, args, dynamic, name_of)
        specs: Any = ()
        if copies is None:
            traced = trace(plan, bound, state, *dynamic, capture, self._name)
        else:
            specs = specs_of(copies, jax.tree.leaves(dynamic))
            local = local_arguments(copies, *dynamic, specs, name_of, self._name)
            traced = traced_on_one(copies, lambda: trace(plan, bound, state, *local, capture, self._name))
        refuse_written_arguments(traced.passed, bound, plan.object_count, name_of, self._name, bool(plan.optimizers))
        refuse_baked(traced.effects, bound, self._name)
        return traced, specs

    def _refuse_writes(self, traced: Traced, contract: Contract, state: State, args: Any, kwargs: Any) -> None:
        """Raises where the function writes what its contract does not allow."""
        refuse_writes(
            state.tables,
            traced,
            contract.allowed,
            contract.named,
            contract.why_not,
            self._name,
            contract.hint,
            lambda: self._traced(state, args, kwargs, evaluated=True)[0],
        )

    def _check_arguments(self, plan: PlanTables, args: Any, dynamic: Any, name_of: Callable[[Any], str]) -> None:
        """Refuses arguments that the function does not take, and objects that JAX cannot pass."""
        types = lambda: [type(thing) for thing in objects_of(plan)]  # noqa: E731
        check_capacity(self.fn, plan.object_count, args, self._name, types)
        named = ((name_of(place), value) for place, value in (*enumerate(dynamic[0]), *dynamic[1].items()))
        refuse_foreign(named, self._name)

    def _judge(self, plan: PlanTables, traced: Traced, contract: Contract) -> None:
        """Refuses a train step that trains nothing, and warns of what is probably not meant."""
        refuse_untrained(plan, traced, contract, self.fn, self._name)
        for caution in cautions_of(plan, traced, contract, self.fn, self._name):
            warnings.warn(caution, stacklevel=5)  # where the step is called

    def _bound(self, static: dict[Any, Any], objects: int) -> Callable[..., Any]:
        """The user's function with the static arguments in their places, after so many objects."""
        if not static:
            return self.fn
        names = {place: self._arguments.name_of(place, objects) for place in static}
        return Bound(self.fn, static, objects, names)

    def _make(self, plan: PlanTables, traced: Traced, contract: Contract, specs: Any = None) -> Entry:
        copies = plan.per_device
        program, routes = program_of(plan, traced, contract.groups, copies.axes if copies else ())
        if copies and specs is not None:  # None where only the routes are asked about
            differ = refuse_differences(plan, traced, specs, self._name)
            if contract.trains:
                differ[0] = False  # the loss, which is averaged
            program = program_on_each(plan, program, routes, specs, differ)
        return Entry(
            plan,
            self._name,
            program,
            routes,
            self._arguments,
            returns_state=contract.returns_state,
            closes_over_tracers=traced.closes_over_tracers,
        )

    # --- without compilation, under jax.disable_jit ------------------------------------------------------------

    def _call_eagerly(self, state: State, args: Any, kwargs: Any) -> Any:
        """Runs the user's function on the arrays themselves, so that it can be stepped through and printed from.

        What it may write, and which leaves it does, comes from a trace all the same: without compilation a scan
        unrolls, and every leaf that went through one would look written.
        """
        plan = state.tables
        if plan.per_device:  # no Python code can be stepped through on several devices at once
            with jax.disable_jit(False):
                return self(state, *args, **kwargs)
        with jax.disable_jit(False):
            traced, contract, _ = self._trace(state, args, kwargs)
            self._judge(plan, traced, contract)
        capture = Capture(plan.kinds, self._capture)
        split = self._arguments.split(args, kwargs, plan.object_count)
        dynamic = merged(split.args, split.kwargs, split.given)
        eager = Eager.of(
            traced, plan, self._bound(split.static, plan.object_count), state, dynamic, capture, self._name
        )
        entry = self._make(plan, eager, contract)
        donated, _, kept, _, _ = entry.operands(state, args, kwargs)
        written, out = entry.program(donated, kept, *dynamic)
        return (entry.received(state, written, donated=False), out) if contract.returns_state else out
