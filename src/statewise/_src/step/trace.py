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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError

from statewise._src.common import compat
from statewise._src.common.narrowing import check_given
from statewise._src.common.nnx_graph import (
    arrays_of,
    numbered,
    raw_value,
    read_graph,
    rebuild,
    row_of,
    spec_of,
    value_of,
)
from statewise._src.common.paths import Leaf, Path, format_dtype, format_path, format_shape
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_fits
from statewise._src.plan.tables import PlanTables
from statewise._src.step.capture import Capture
from statewise._src.step.effects import Effects, effects_of
from statewise._src.step.lost_writes import dropped_inputs
from statewise._src.step.object_changes import assigned, leaf_of
from statewise._src.step.outside_writes import written_outside
from statewise._src.step.passed_objects import Passed, WrittenArgument
from statewise.errors import StructureError, UndeclaredWriteError

__all__ = ["Eager", "Traced", "call_once", "check_not_model", "check_output", "check_writes", "evaluating", "trace"]


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
    """

    effects: Effects
    inputs: int
    out_tree: Any
    outputs: int
    written: tuple[tuple[str, int], ...]
    closes_over_tracers: bool
    lost_writes: tuple[tuple[str, int], ...] = ()
    passed: tuple[WrittenArgument, ...] = ()

    def run(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns the outputs and the written arrays, from the values of all inputs (None for those not read)."""
        reads = [value for value, read in zip(flat, self.effects.read, strict=True) if read]
        results = compat.eval_jaxpr(self.effects.jaxpr, self.effects.consts, reads)
        return results[: self.outputs], results[self.outputs :]


def _logical(plan: PlanTables, kind: str, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a kind's arrays in order; of a packed or `PerDevice` part only shapes and dtypes, which a trace needs."""
    if kind not in plan.packing and not plan.per_device:
        return arrays
    return tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in plan.specs[kind])


@dataclasses.dataclass(frozen=True, slots=True)
class Eager(Traced):
    """A traced call that runs the user's function itself, on values, instead of the jaxpr: for `jax.disable_jit`."""

    call: Callable[[Sequence[Any], Any, Any], tuple[list[Any], list[list[Any]]]] = dataclasses.field(kw_only=True)
    arrays: Sequence[Any] = dataclasses.field(kw_only=True)
    dynamic: Any = dataclasses.field(kw_only=True)

    @classmethod
    def of(
        cls,
        traced: Traced,
        plan: PlanTables,
        fn: Callable[..., Any],
        state: State,
        dynamic: tuple[Any, Any],
        capture: Capture,
        name: str,
    ) -> Eager:
        """Makes the eager form of a traced call; `dynamic` is its (args, kwargs)."""

        def call(parts: Sequence[Any], args: Any, kwargs: Any) -> tuple[list[Any], list[list[Any]]]:
            out, after = call_once(plan, fn, parts, args, kwargs, capture, name)
            return jax.tree.leaves(out), after

        unpacked = zip(plan.kinds, state.parts, strict=True)
        arrays = [array for kind, part in unpacked for array in plan.unpack(kind, part.arrays)]
        fields = {field.name: getattr(traced, field.name) for field in dataclasses.fields(Traced)}
        return cls(**fields, call=call, arrays=arrays, dynamic=(plan, dynamic))

    def run(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns the outputs and the written arrays; arrays that are not read come from the state."""
        plan, dynamic = self.dynamic
        arrays = iter(stored if given is None else given for stored, given in zip(self.arrays, flat, strict=False))
        parts = [list(itertools.islice(arrays, len(specs))) for specs in plan.specs.values()]
        args, kwargs = jax.tree.unflatten(jax.tree.structure(dynamic), flat[self.inputs :])
        outputs, after = self.call(parts, args, kwargs)
        return outputs, [after[plan.kind_index[kind]][position] for kind, position in self.written]


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
    parts = [_logical(plan, kind, part.arrays) for kind, part in zip(plan.kinds, state.parts, strict=True)]
    box: dict[str, Any] = {}

    def flat_call(parts: Any, args: Any, kwargs: Any) -> tuple[list[Any], list[Any], list[Any]]:
        passed = box["passed"] = Passed(args, kwargs)
        out, after = call_once(plan, fn, parts, args, kwargs, capture, name, passed)
        leaves, box["out_tree"] = jax.tree.flatten(out)
        check_output(leaves, name)
        return leaves, [array for part in after for array in part], passed.after(out)

    closed = jax.make_jaxpr(flat_call)(parts, args, kwargs)
    where = [(kind, position) for kind, part in zip(plan.kinds, parts, strict=True) for position in range(len(part))]
    outputs = box["out_tree"].num_leaves
    unclear = [number for _, number in box["passed"].unclear]
    # The function's output is followed by the new values: of the state's arrays, then of unclear arguments.
    sources = [*range(len(where)), *(len(where) + number for number in unclear)]
    effects = effects_of(closed, [(outputs + index, source) for index, source in enumerate(sources)])
    written = effects.written[: len(where)]
    return Traced(
        effects=effects,
        inputs=len(where),
        out_tree=box["out_tree"],
        outputs=outputs,
        written=tuple(spot for spot, is_written in zip(where, written, strict=True) if is_written),
        closes_over_tracers=any(isinstance(const, compat.Tracer) for const in effects.consts),
        lost_writes=_dropped(plan, closed, where, written),
        passed=box["passed"].lost(effects.written[len(where) :]),
    )


def _dropped(
    plan: PlanTables, closed: Any, where: Sequence[tuple[str, int]], written: Sequence[bool]
) -> tuple[tuple[str, int], ...]:
    """Returns the arrays whose only new value is lost; parameters are not considered, as optimizers write them."""
    numbers = [
        number
        for number, (kind, position) in enumerate(where)
        if not written[number] and not issubclass(_type_at(plan, kind, position), nnx.Param)
    ]
    dropped = dropped_inputs(closed, numbers) if numbers else frozenset()
    return tuple(spot for number, spot in enumerate(where) if number in dropped)


def _type_at(plan: PlanTables, kind: str, position: int) -> type:
    type_: type = plan.leaf_of_array[kind][position].type
    return type_


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
    problems, given = [], []
    for row, span in zip(plan.rows, plan.spans, strict=True):
        if row.path in captured:
            continue
        arrays, structure = arrays_of(raw_value(live[row.path]))
        specs = tuple(map(spec_of, arrays))
        if structure != row.structure:
            problems.append(leaf_of(row, "becomes a value of another structure"))
        elif specs != row.specs:
            was = [f"{format_shape(spec.shape) if spec else '-'} {format_dtype(spec and spec.dtype)}" for spec in specs]
            problems.append(leaf_of(row, "becomes " + ", ".join(was)))
        else:
            pairs = zip(arrays, row.specs, strict=True)
            given += [
                (leaf_of(row, ""), array, spec.dtype) for array, spec in pairs if not isinstance(array, jax.Array)
            ]
            values[span.kind, span.start] = arrays
    if problems:
        hint = "assign a value of the leaf's own shape and dtype: leaf[...] = value.astype(leaf.dtype)"
        sown = [leaf.kind for leaf in problems if not plan.kinds[leaf.kind or ""].saved and leaf.shape is None]
        if sown:  # `sow` appends to what an earlier call left there
            hint = f"capture={sown[0]!r}  # in the step's decorator, where it is sown\nor, {hint}"
        raise StructureError(
            f"{name} changes the shape or dtype of leaves; a state keeps both from step to step.",
            leaves=problems,
            hint=hint,
        )
    check_given(given, before=f"{name} assigns numbers that JAX cannot represent. ")
    for (kind, start), new in values.items():
        after[plan.kind_index[kind]][start : start + len(new)] = map(jnp.asarray, new)
    return after


def check_not_model(out: Any, leaves: Sequence[Any], name: str) -> None:
    """Checks that an output does not hold the model itself, or one of its Variables."""
    own = {id(leaf) for leaf in leaves if isinstance(leaf, nnx.Variable)}

    def is_object(obj: Any) -> bool:
        return isinstance(obj, (nnx.Variable, nnx.Pytree, nnx.State))

    returned = []
    for value in jax.tree.leaves(out, is_leaf=is_object):
        if isinstance(value, nnx.State) or not is_object(value):
            continue  # an nnx.State of Variables is data: it is returned as an nnx.State
        held = read_graph([[value]])
        returned += [
            row_of(path[1:], leaf) for path, leaf in zip(held.paths, held.leaves, strict=True) if id(leaf) in own
        ]
        if isinstance(value, nnx.Module) and not held.leaves:
            returned.append(Leaf((), None, type(value), None, None, note="a module"))
    if returned:
        raise StructureError(
            f"{name} returns the model, or Variables of it; they exist only inside the step.",
            leaves=returned,
            hint="return arrays: model.kernel[...]; the step returns the state by itself",
        )


def check_output(leaves: Sequence[Any], name: str) -> None:
    """Checks that all parts of an output are arrays or numbers."""
    for leaf in leaves:
        if spec_of(leaf) is None:
            raise StructureError(
                f"{name} returns {type(leaf).__name__}, which is not an array.",
                hint="return arrays, numbers, or tuples, lists and dicts of them",
            )


# Why the function of a train step may not write a kind.
ITS_OPTIMIZER = "written by its optimizer alone"


def check_writes(
    plan: PlanTables,
    traced: Traced,
    allowed: frozenset[str],
    named: Sequence[str],
    why: dict[str, str],
    name: str,
    hint: str,
    evaluated: Callable[[], Traced],
) -> None:
    """Checks that the function writes only kinds that it may write.

    Args:
      plan: the plan.
      traced: the traced call.
      allowed: the kinds that may be written.
      named: the kinds among them that the user named.
      why: for some other kinds, why they may not be written.
      name: the step's name.
      hint: the decorator with other writes; `{kinds}` stands for them.
      evaluated: traces the same call after `model.eval()`; called only if there is something to reject.
    """
    undeclared = [(kind, position) for kind, position in traced.written if kind not in allowed]
    if not undeclared:
        return
    owners = _owners(plan)
    leaves: dict[Path, Leaf] = {}
    for kind, position in undeclared:
        leaf = plan.leaf_of_array[kind][position]
        note = f"written in {owners[leaf.path]}" + (f"; {why[kind]}" if kind in why else "")
        leaves[leaf.path] = dataclasses.replace(leaf, note=note)
    kinds = tuple(dict.fromkeys(kind for kind, _ in undeclared))
    order = list(plan.kinds).index
    free = [kind for kind in kinds if kind not in why]
    lines = [hint.format(kinds=repr(tuple(sorted({*named, *free}, key=order))))] if free else []
    trained = [kind for kind in kinds if why.get(kind) == ITS_OPTIMIZER]
    if trained:
        # nnx.SpectralNorm and nnx.WeightNorm do this; the update is then applied on top of the function's writes.
        also = hint.format(kinds=repr(tuple(sorted({*named, *trained}, key=order))))
        lines.append(f"if a layer normalizes its own weights: {also}")
    lines += _eval_hint(plan, undeclared, evaluated, hint, named, why)
    raise UndeclaredWriteError(
        f"{name} writes {', '.join(kinds)}, which it does not declare.",
        leaves=leaves.values(),
        kind=kinds[0],
        hint="\nor, ".join(lines),
    )


_RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _eval_hint(
    plan: PlanTables,
    undeclared: Sequence[tuple[str, int]],
    evaluated: Callable[[], Traced],
    hint: str,
    named: Sequence[str],
    why: Mapping[str, str],
) -> list[str]:
    """Returns the hint to evaluate, if the function then writes fewer undeclared kinds, and what is left to declare."""
    try:
        written = set(evaluated().written)
    except _RAISED:  # with other flags the user's function fails: then evaluating does not help
        return []
    left = {kind for kind, position in undeclared if (kind, position) in written}
    if left & set(why) or all(spot in written for spot in undeclared):
        return []
    line = "if the function only evaluates: model.eval() as its first line"
    kinds = tuple(sorted({*named, *left}, key=list(plan.kinds).index))
    return [f"{line}, and {hint.format(kinds=repr(kinds))}" if left else line]


def evaluating(fn: Callable[..., Any], objects: int) -> Callable[..., Any]:
    """Returns the function with `model.eval()` as its first line."""

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        for planned in args[:objects]:
            if isinstance(planned, nnx.Module):
                planned.eval()
        return fn(*args, **kwargs)

    return evaluated


def _owners(plan: PlanTables) -> dict[Path, str]:
    """Returns, for each leaf, a description of the module that holds it."""
    owners = {}
    objects: Any = rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)
    for row in plan.rows:
        current, at = (objects if plan.several else objects[0]), 0
        owner = type(current).__name__
        for depth, key in enumerate(numbered(row.path, plan.names)[:-1], start=1):
            current = getattr(current, key) if isinstance(key, str) and hasattr(current, key) else current[key]
            first = plan.several and depth == 1  # one of several objects, which need not be a module
            if first or (isinstance(current, nnx.Module) and not isinstance(current, (nnx.Rngs, nnx.RngStream))):
                owner, at = type(current).__name__, depth
        owners[row.path] = f"{owner} {format_path(row.path[:at])}" if at else owner
    return owners
