"""Traces a function over a state: one trace determines everything about it.

The user's function is called once for each signature, on fresh modules made of tracers, inside `jax.make_jaxpr`.  The
result is a jaxpr from the arrays of the state and the arguments to the function's output and the arrays' new values.
From it `effects` determines what is read and what is written; the structure of the module before and after tells which
Variables the function made, removed or replaced.  The whole contract is checked here, before anything is compiled, so
it costs nothing in the compiled step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from statewise._src.common import compat
from statewise._src.common.narrowing import check_given
from statewise._src.common.nnx_graph import (
    arrays_of,
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
from statewise._src.plan.tables import PlanTables
from statewise._src.step.capture import Capture
from statewise._src.step.effects import Effects, effects_of
from statewise._src.step.lost_writes import dropped_inputs
from statewise._src.step.object_changes import assigned, leaf_of
from statewise._src.step.outside_writes import written_outside
from statewise._src.step.passed_objects import Passed, WrittenArgument, is_object
from statewise.errors import StructureError

__all__ = ["Traced", "check_not_model", "check_output", "eager_form", "evaluating", "objects_of", "trace"]


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
      lost_writes: the same of each array whose only new value is lost.
      passed: what is written to objects among the arguments.
      eager: what runs instead of the jaxpr, under `jax.disable_jit`.
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

    def run(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns the outputs and the written arrays, from the values of all inputs (None for those not read)."""
        if self.eager is not None:
            return self.eager(flat)
        results = self.effects.run(flat)
        return results[: self.outputs], results[self.outputs :]


def eager_form(
    traced: Traced,
    plan: PlanTables,
    fn: Callable[..., Any],
    state: State,
    dynamic: tuple[Any, Any],
    capture: Capture,
    name: str,
) -> Traced:
    """Returns a traced call that runs the user's function itself instead of the jaxpr: for `jax.disable_jit`.

    `dynamic` is the call's (args, kwargs).
    """
    unpacked = zip(plan.kinds, state.parts, strict=True)
    stored = [array for kind, part in unpacked for array in plan.unpack(kind, part.arrays)]
    structure = jax.tree.structure(dynamic)

    def run(flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        # The program passes None for arrays that the jaxpr does not read; the function itself takes all of them.
        arrays = iter(old if given is None else given for old, given in zip(stored, flat, strict=False))
        parts = [list(itertools.islice(arrays, len(specs))) for specs in plan.specs.values()]
        args, kwargs = jax.tree.unflatten(structure, flat[traced.inputs :])
        out, after = call_once(plan, fn, parts, args, kwargs, capture, name)
        return jax.tree.leaves(out), [after[plan.kind_index[kind]][position] for kind, position in traced.written]

    return dataclasses.replace(traced, eager=run)


def trace(
    plan: PlanTables, fn: Callable[..., Any], state: State, args: Any, kwargs: Any, capture: Capture, name: str
) -> Traced:
    """Traces `fn(*objects, *args, **kwargs)` over a state.

    Raises:
      StructureError: the state does not fit its plan; the function returns the model, or makes, removes or replaces
        Variables, or changes their shapes or dtypes.
    """
    check_fits(
        state,
        plan.kinds,
        hint="inside jax.vmap the mapped axis is missing: jax.vmap(step, in_axes=(plan.axes(params=0), ...))\n"
        "for other dtypes: state.cast(params='bfloat16')",
    )
    # Of a packed or `PerDevice` part a trace gets only shapes and dtypes: it sees the arrays as the model has them.
    parts = [
        tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs)
        if kind in plan.packing or plan.per_device
        else part.arrays
        for (kind, specs), part in zip(plan.specs.items(), state.parts, strict=True)
    ]
    box: dict[str, Any] = {}

    def flat_call(parts: Any, args: Any, kwargs: Any) -> tuple[list[Any], list[Any], list[Any]]:
        passed = box["passed"] = Passed(args, kwargs)
        out, after = call_once(plan, fn, parts, args, kwargs, capture, name, passed)
        leaves, box["out_tree"] = jax.tree.flatten(out)
        check_output(leaves, name)
        return leaves, [array for part in after for array in part], passed.after(out)

    closed = jax.make_jaxpr(flat_call)(parts, args, kwargs)
    outputs, inputs = box["out_tree"].num_leaves, len(plan.arrays)
    unclear = [number for _, number in box["passed"].unclear]
    # The function's output is followed by the new values: of the state's arrays, then of unclear arguments.
    sources = [*range(inputs), *(inputs + number for number in unclear)]
    effects = effects_of(closed, [(outputs + index, source) for index, source in enumerate(sources)])
    written = effects.written[:inputs]
    return Traced(
        effects=effects,
        inputs=inputs,
        out_tree=box["out_tree"],
        outputs=outputs,
        written=_spots(plan, [number for number, is_written in enumerate(written) if is_written]),
        closes_over_tracers=any(isinstance(const, compat.Tracer) for const in effects.consts),
        lost_writes=_dropped(plan, closed, written),
        passed=box["passed"].lost(effects.written[inputs:]),
    )


def _spots(plan: PlanTables, numbers: Iterable[int]) -> tuple[tuple[str, int], ...]:
    """Returns the kinds and positions of arrays, from their numbers."""
    return tuple((plan.arrays[number].kind, plan.arrays[number].position) for number in numbers)


def _dropped(plan: PlanTables, closed: Any, written: Sequence[bool]) -> tuple[tuple[str, int], ...]:
    """Returns the arrays whose only new value is lost; parameters are not considered, as optimizers write them."""
    numbers = [
        array.number
        for array in plan.arrays
        if not written[array.number] and not issubclass(array.leaf.type, nnx.Param)
    ]
    return _spots(plan, sorted(dropped_inputs(closed, numbers)) if numbers else ())


def call_once(
    plan: PlanTables,
    fn: Callable[..., Any],
    parts: Sequence[Sequence[Any]],
    args: Any,
    kwargs: Any,
    capture: Capture,
    name: str,
    passed: Passed | None = None,
) -> tuple[Any, list[list[Any]]]:
    """Calls the function on fresh objects that hold these arrays; returns its output and the arrays after the call."""
    by_kind = dict(zip(plan.kinds, parts, strict=True))
    values = [value_of(by_kind[span.kind][span.start : span.stop], span.structure) for span in plan.spans]
    objects = rebuild(plan.graphdef, values, plan.several)
    before = read_graph(objects, plan.names)
    try:
        # If hijax Variables are the default, sown values would be hijax too, and `nnx.capture` does not recognize them.
        with nnx.var_defaults(hijax=False, ref=False):
            out, sown = capture.call(fn, objects, args, kwargs)
    except TraceContextError as error:
        known = Passed((), {}) if passed is None else passed
        outside = written_outside(error, fn, objects, before, known, name, bool(plan.optimizers))
        if outside is None:
            raise
        raise outside from error
    check_not_model(out, before.leaves, name)
    after = read_graph(objects, plan.names)
    live = dict(zip(after.paths, after.leaves, strict=True))
    replaced = assigned(plan, objects, before.leaves, live, capture, name)
    captured = capture.collect(plan, live, replaced, out, sown)
    return captured, _arrays_after(plan, parts, live, replaced, name)


def _arrays_after(
    plan: PlanTables, parts: Sequence[Sequence[Any]], live: dict[Path, Any], captured: frozenset[Path], name: str
) -> list[list[Any]]:
    after = [list(part) for part in parts]
    values: dict[tuple[str, int], Sequence[Any]] = {}
    problems, given = Problems(), []
    for row, span in zip(plan.rows, plan.spans, strict=True):
        if row.path in captured:
            continue
        arrays, structure = arrays_of(raw_value(live[row.path]))
        specs = tuple(map(spec_of, arrays))
        if structure != row.structure:
            problems.add(leaf_of(row, "becomes a value of another structure"))
        elif specs != row.specs:
            becomes = [
                f"{format_shape(spec.shape) if spec else '-'} {format_dtype(spec and spec.dtype)}" for spec in specs
            ]
            problems.add(leaf_of(row, "becomes " + ", ".join(becomes)))
        else:
            pairs = zip(arrays, row.specs, strict=True)
            given += [
                (leaf_of(row, ""), array, spec.dtype) for array, spec in pairs if not isinstance(array, jax.Array)
            ]
            values[span.kind, span.start] = arrays
    hint = "assign a value of the leaf's own shape and dtype: leaf[...] = value.astype(leaf.dtype)"
    sown = [leaf.kind for leaf in problems.leaves if not plan.kinds[leaf.kind or ""].saved and leaf.shape is None]
    if sown:  # `sow` appends to what an earlier call left there
        hint = f"capture={sown[0]!r}  # in the step's decorator, where it is sown\nor, {hint}"
    problems.raise_as(
        StructureError, f"{name} changes the shape or dtype of leaves; a state keeps both from step to step.", hint
    )
    check_given(given, before=f"{name} assigns numbers that JAX cannot represent. ")
    for (kind, start), new in values.items():
        after[plan.kind_index[kind]][start : start + len(new)] = map(jnp.asarray, new)
    return after


def check_not_model(out: Any, leaves: Sequence[Any], name: str) -> None:
    """Checks that an output does not hold the model itself, or one of its Variables."""
    own = {id(leaf) for leaf in leaves if isinstance(leaf, nnx.Variable)}
    returned = Problems()
    for value in jax.tree.leaves(out, is_leaf=is_object):
        if isinstance(value, nnx.State) or not is_object(value):
            continue  # an nnx.State of Variables is data: it is returned as an nnx.State
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


def check_output(leaves: Sequence[Any], name: str) -> None:
    """Checks that all parts of an output are arrays or numbers."""
    for leaf in leaves:
        if spec_of(leaf) is None:
            raise StructureError(
                f"{name} returns {type(leaf).__name__}, which is not an array.",
                hint="return arrays, numbers, or tuples, lists and dicts of them",
            )


def evaluating(fn: Callable[..., Any], objects: int) -> Callable[..., Any]:
    """Returns the function with `model.eval()` as its first line."""

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        for planned in args[:objects]:
            if isinstance(planned, nnx.Module):
                planned.eval()
        return fn(*args, **kwargs)

    return evaluated


def objects_of(plan: PlanTables) -> tuple[Any, ...]:
    """Returns the planned objects, with empty leaves."""
    return rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)
