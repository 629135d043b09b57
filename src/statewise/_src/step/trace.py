"""Traces a function over a state: one trace determines everything about it.

The user's function is called once for each signature, on fresh modules made of tracers, inside `jax.make_jaxpr`.  The
result is a jaxpr from the arrays of the state and the arguments to the function's output and the arrays' new values.
From it `effects` determines what is read and what is written; the structure of the module before and after shows which
Variables the function made, removed or replaced.  The whole contract is checked here, before anything is compiled, so
it costs nothing in the compiled step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import ImmutableVariableError, TraceContextError

from statewise._src.common import compat
from statewise._src.common.compat import jaxprs
from statewise._src.common.narrowing import check_given
from statewise._src.common.nested_state import is_state
from statewise._src.common.nnx_graph import (
    ArraySpec,
    arrays_of,
    check_plain,
    is_object,
    raw_value,
    read_graph,
    rebuild,
    row_of,
    spec_of,
    value_of,
)
from statewise._src.common.paths import Leaf, Path, format_dtype, format_shape
from statewise._src.common.problems import Problems
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_fits
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.tables import PlanTables
from statewise._src.step.arguments import Args, Kwargs
from statewise._src.step.capture import Capture
from statewise._src.step.compute import ComputeCasts, casts_of, compute_specs
from statewise._src.step.effects import Effects, effects_of
from statewise._src.step.lost_writes import dropped_inputs
from statewise._src.step.microbatches import Batch
from statewise._src.step.object_changes import assigned, leaf_of
from statewise._src.step.outside_writes import written_outside, written_variable
from statewise._src.step.passed_objects import Passed, WrittenArgument, holds_leaves
from statewise.errors import StructureError

__all__ = ["Call", "Traced", "check_not_model", "check_output", "evaluating", "objects_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Traced:
    """One traced call.

    Attributes:
      effects: what is read and written; the jaxpr maps the read inputs to the outputs, then the written arrays.
      inputs: the number of arrays in the state; those of the arguments follow them among the inputs.
      out_tree: the structure of the function's output.
      outputs: the number of arrays in the output.
      written: (kind, position) of each written array, in the order in which the jaxpr returns them.
      closes_over_tracers: whether the function used a tracer of an outer trace that is not an argument.
      lost_writes: (kind, position) of each array whose only new value is lost.
      passed: what is written to objects among the arguments.
      eager: what runs instead of the jaxpr, under `jax.disable_jit`.
      casts: the dtypes in which the function sees the arrays of the state, by number.
      batch: how the step's arguments are split into the parts that the trace was made for; None if they are not.
      result_tree: the structure of the step's output, if it differs from the function's.
    """

    effects: Effects
    inputs: int
    out_tree: Any
    outputs: int
    written: tuple[tuple[str, int], ...]
    closes_over_tracers: bool
    lost_writes: tuple[tuple[str, int], ...] = ()
    passed: tuple[WrittenArgument, ...] = ()
    eager: Callable[[Sequence[Any]], tuple[list[Any], list[Any]]] | None = None
    casts: ComputeCasts | None = None
    batch: Batch | None = None
    result_tree: Any = None

    def result(self, outputs: Sequence[Any]) -> Any:
        """Returns the step's output, from its arrays in order."""
        return jax.tree.unflatten(self.out_tree if self.result_tree is None else self.result_tree, outputs)

    def run(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns the outputs and the written arrays, from the values of all inputs (None for those not read)."""
        if self.casts is not None:
            flat = self.casts.to_compute(flat)
        if self.eager is not None:
            outputs, written = self.eager(flat)
        else:
            results = self.effects.run(flat)
            outputs, written = results[: self.outputs], results[self.outputs :]
        return outputs, written if self.casts is None else self.casts.to_stored(written)


@dataclasses.dataclass(frozen=True)
class Call:
    """A step's function, as it is called on the planned objects.

    Attributes:
      plan: the plan.
      fn: the function, with its static arguments bound.
      capture: collects the values that it sows or assigns.
      name: the step's name.
    """

    plan: PlanTables
    fn: Callable[..., Any]
    capture: Capture
    name: str

    def trace(self, state: State, args: Args, kwargs: Kwargs) -> Traced:
        """Traces `fn(*objects, *args, **kwargs)` over a state.

        Raises:
          StructureError: the state does not fit its plan; the function returns the model, or makes, removes or replaces
            Variables, or changes their shapes or dtypes.
        """
        plan = self.plan
        check_fits(
            state,
            plan.kinds,
            hint="inside jax.vmap the mapped axis is missing: jax.vmap(step, in_axes=(plan.axes(params=0), ...))\n"
            "for other dtypes: state.cast(params='bfloat16')",
        )
        # Of a packed or `PerDevice` part a trace gets only shapes and dtypes: it sees the arrays as the model has them.
        arrays: list[Any] = []
        for (kind, specs), part in zip(plan.specs.items(), state.parts, strict=True):
            is_as_stored = kind not in plan.packing and plan.per_device is None
            arrays += part.arrays if is_as_stored else itertools.starmap(jax.ShapeDtypeStruct, specs)
        box: dict[str, Any] = {}

        def flat_call(arrays: Any, args: Any, kwargs: Any) -> tuple[list[Any], list[Any], list[Any]]:
            passed = box["passed"] = Passed(args, kwargs)
            out, after = self.run(arrays, args, kwargs, passed)
            leaves, box["out_tree"] = jax.tree.flatten(out)
            check_output(leaves, self.name)
            return leaves, after, passed.after(out)

        closed = jax.make_jaxpr(flat_call)(compute_specs(plan, arrays), args, kwargs)
        for variable in jaxprs.written_variables(closed):
            raise written_variable(variable, self.fn, objects_of(plan), self.name, bool(plan.optimizers))
        outputs, inputs = box["out_tree"].num_leaves, len(arrays)
        unclear = [number for _, number in box["passed"].unclear]
        # The function's output is followed by the new values: of the state's arrays, then of unclear arguments.
        sources = [*range(inputs), *(inputs + number for number in unclear)]
        effects = effects_of(closed, [(outputs + index, source) for index, source in enumerate(sources)])
        # Parameters are not considered, as optimizers write them.
        unwritten = [
            array.number
            for array, is_written in zip(plan.arrays, effects.written, strict=False)
            if not is_written and not issubclass(array.leaf.type, nnx.Param)
        ]
        dropped = dropped_inputs(closed, unwritten) if unwritten else ()
        written = _spots(itertools.compress(plan.arrays, effects.written[:inputs]))
        return Traced(
            effects=effects,
            inputs=inputs,
            out_tree=box["out_tree"],
            outputs=outputs,
            written=written,
            closes_over_tracers=any(isinstance(const, compat.Tracer) for const in effects.consts),
            lost_writes=_spots(plan.arrays[number] for number in sorted(dropped)),
            passed=box["passed"].lost(effects.written[inputs:]),
            casts=casts_of(plan, plan.numbers(written)),
        )

    def eager(self, traced: Traced, state: State, dynamic: tuple[Args, Kwargs]) -> Traced:
        """Returns the traced call of (args, kwargs) so that it runs the function itself: for `jax.disable_jit`."""
        unpacked = zip(self.plan.kinds, state.parts, strict=True)
        stored = [array for kind, part in unpacked for array in self.plan.unpack(kind, part.arrays)]
        structure = jax.tree.structure(dynamic)

        def run(flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            # The program passes None for arrays that the jaxpr does not read; the function itself takes all of them.
            arrays = [old if given is None else given for old, given in zip(stored, flat, strict=False)]
            if traced.casts is not None:
                arrays = traced.casts.to_compute(arrays)
            out, after = self.run(arrays, *jax.tree.unflatten(structure, flat[traced.inputs :]))
            return jax.tree.leaves(out), [after[number] for number in self.plan.numbers(traced.written)]

        return dataclasses.replace(traced, eager=run)

    def run(self, arrays: list[Any], args: Args, kwargs: Kwargs, passed: Passed | None = None) -> tuple[Any, list[Any]]:
        """Calls the function on fresh objects that hold these arrays; returns its output and the arrays afterwards."""
        plan = self.plan
        values = [
            value_of([arrays[number] for number in numbers], row.structure)
            for row, numbers in zip(plan.rows, _numbers_of_rows(plan), strict=True)
        ]
        objects = rebuild(plan.graphdef, values, plan.several)
        before = plan.read(objects)
        try:
            # What the function makes is plain too, whatever the default: `nnx.capture` does not recognize hijax
            # Variables, and no version of Flax can write them in every trace.
            with nnx.var_defaults(hijax=False, ref=False):
                out, sown = self.capture.call(self.fn, objects, args, kwargs)
        except (TraceContextError, ImmutableVariableError) as error:  # the second of hijax Variables
            known = Passed((), {}) if passed is None else passed
            outside = written_outside(error, self.fn, objects, before, known, self.name, bool(plan.optimizers))
            if outside is None:
                raise
            raise outside from error
        check_not_model(out, before.leaves, self.name)
        after = plan.read(objects)
        check_plain(after, self.name)
        live = dict(zip(after.paths, after.leaves, strict=True))
        replaced = assigned(plan, objects, before.leaves, live, self.capture, self.name)
        captured = self.capture.collect(plan, live, replaced, out, sown)
        return captured, self._arrays_after(arrays, live, replaced)

    def _arrays_after(self, arrays: Sequence[Any], live: dict[Path, Any], captured: frozenset[Path]) -> list[Any]:
        """Returns the new arrays of the state; those of captured leaves stay as they were."""
        plan, changed, compute = self.plan, dict[int, Any](), self.plan.compute_dtypes
        problems, given = Problems(), []
        for row, numbers in zip(plan.rows, _numbers_of_rows(plan), strict=True):
            if row.path in captured:
                continue
            new, structure = arrays_of(raw_value(live[row.path]))
            specs = tuple(map(spec_of, new))
            if compute:
                specs = tuple(
                    _as_stored(spec, plan.arrays[n], compute) for spec, n in zip(specs, numbers, strict=False)
                )
            if structure != row.structure:
                problems.add(leaf_of(row, "becomes a value of another structure"))
            elif specs != row.specs:
                shown = (f"{format_shape(spec.shape)} {format_dtype(spec.dtype)}" if spec else "- -" for spec in specs)
                problems.add(leaf_of(row, "becomes " + ", ".join(shown)))
            else:
                for number, array, spec in zip(numbers, new, row.specs, strict=True):
                    changed[number] = array
                    if not isinstance(array, jax.Array):
                        given.append((leaf_of(row, ""), array, spec.dtype))
        hint = "assign a value of the leaf's own shape and dtype: leaf[...] = value.astype(leaf.dtype)"
        sown = [leaf.kind for leaf in problems.leaves if not plan.kinds[leaf.kind or ""].saved and leaf.shape is None]
        if sown:  # `sow` appends to what an earlier call left there
            hint = f"capture={sown[0]!r}  # in the step's decorator, where it is sown\nor, {hint}"
        problems.raise_as(
            StructureError,
            f"{self.name} changes the shape or dtype of leaves; a state keeps both from step to step.",
            hint,
        )
        check_given(given, before=f"{self.name} assigns numbers that JAX cannot represent. ")
        return [jnp.asarray(changed[number]) if number in changed else array for number, array in enumerate(arrays)]


def _as_stored(spec: ArraySpec | None, array: ArrayInfo, compute: Mapping[int, Any]) -> ArraySpec | None:
    """Returns the shape and dtype that a new value has in the state: what a cast leaf becomes is cast back."""
    if spec is None or array.number not in compute or not jnp.issubdtype(spec.dtype, jnp.floating):
        return spec
    return spec._replace(dtype=array.spec.dtype)


def _numbers_of_rows(plan: PlanTables) -> list[list[int]]:
    """Returns, for each row of a plan, the numbers of its arrays."""
    return [[array.number for array in plan.by_kind[span.kind][span.start : span.stop]] for span in plan.spans]


def _spots(arrays: Iterable[ArrayInfo]) -> tuple[tuple[str, int], ...]:
    return tuple((array.kind, array.position) for array in arrays)


def check_not_model(out: object, leaves: Sequence[object], name: str) -> None:
    """Checks that an output does not hold the model itself, or one of its Variables."""
    own = {id(leaf) for leaf in leaves if isinstance(leaf, nnx.Variable)}
    returned = Problems()
    for value in jax.tree.leaves(out, is_leaf=lambda node: holds_leaves(node) or _is_data(node)):
        if not is_object(value):
            continue
        held = read_graph([[value]])
        for path, leaf in zip(held.paths, held.leaves, strict=True):
            if id(leaf) in own:
                returned.add(row_of(path[1:], leaf))
        if isinstance(value, nnx.Module) and not held.leaves:
            returned.add(Leaf((), None, type(value), None, None, note="a module"))
    returned.raise_as(
        StructureError,
        f"{name} returns the model, or Variables of it; they exist only inside the step.",
        "return arrays: model.kernel[...]; the step returns the state by itself",
    )


def _is_data(value: object) -> bool:
    """Returns whether a value is what `nnx.state` returns, which is data: a step returns it, with new Variables."""
    return isinstance(value, compat.state_type()) and is_state(value)


def check_output(leaves: Sequence[object], name: str) -> None:
    """Checks that all parts of an output are arrays or numbers, and no references."""
    for leaf in leaves:
        if spec_of(leaf) is None:
            raise StructureError(
                f"{name} returns {type(leaf).__name__}, which is not an array.",
                hint="return arrays, numbers, or tuples, lists and dicts of them",
            )
        if isinstance(leaf, jax.Ref):
            raise StructureError(
                f"{name} returns a reference, which JAX does not return from a compiled function.",
                hint="return variable[...]  # what it holds; what is written into a reference is in it after the call",
            )


def evaluating(fn: Callable[..., Any], objects: int) -> Callable[..., Any]:
    """Returns the function with `model.eval()` as its first line."""

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        for planned in args[:objects]:
            if isinstance(planned, nnx.Module):
                with nnx.set_graph_mode(True):  # in tree mode Flax refuses tied weights here too
                    planned.eval()
        return fn(*args, **kwargs)

    return evaluated


def objects_of(plan: PlanTables) -> tuple[Any, ...]:
    """Returns the planned objects, with empty leaves."""
    return rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)
