"""A scan over stacked layers: one layer's program, run over the arrays of many.

Equal layers can be stacked: one set of leaves, each with one more axis.  `jax.lax.scan` then compiles one layer instead
of all.  It slices what it scans, stacks what it returns, and passes what it carries from layer to layer.  So leaves
that are only read should be scanned, or, if all layers share them, stay outside of the loop; and only written leaves
should be returned or carried.  No declaration is needed to know which are written: a step returns the very arrays that
it does not write.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax

from statewise._src.common.object_names import names_given
from statewise._src.core.member_view import as_ensemble, as_one
from statewise._src.core.part import Part
from statewise._src.core.plan import State
from statewise._src.core.plan_difference import in_form_of
from statewise._src.core.state_data import check_not_donated
from statewise._src.core.versions import settle
from statewise._src.filters.combinators import Filter
from statewise._src.plan.kind import unknown_kind
from statewise._src.step.scan_modules import count_layers, replaced, scan_module
from statewise._src.step.step import Step, definition_of
from statewise.errors import StructureError

__all__ = ["scan_layers"]


X = TypeVar("X")
CapturedT = TypeVar("CapturedT")
LayersT = TypeVar("LayersT")


@overload
def scan_layers(
    fn: Callable[[State, X], tuple[State, tuple[X, CapturedT]]],
    layers: State,
    x: X,
    *,
    shared: str | Sequence[str] | None = None,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[State, tuple[X, CapturedT]]: ...
@overload
def scan_layers(
    fn: Callable[[State, X], tuple[State, X]] | Callable[[State, X], X],
    layers: State,
    x: X,
    *,
    shared: str | Sequence[str] | None = None,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[State, X]: ...
@overload
def scan_layers(
    fn: Callable[[LayersT, X], X],
    layers: LayersT,
    x: X,
    *,
    shared: Filter = None,
    reverse: bool = False,
    unroll: int = 1,
) -> X: ...
def scan_layers(
    fn: Callable[..., Any], layers: Any, x: Any, *, shared: Any = None, reverse: bool = False, unroll: int = 1
) -> Any:
    """Runs one layer's function through stacked layers, one after the other, as one `jax.lax.scan`.

    Leaves that are only read are neither copied nor carried.  Use it inside a step or under `jax.jit`: like
    `jax.lax.scan` itself, it is compiled in every call outside of one.

    Args:
      fn: for a module, a function `(layer, x) -> x`, which may write the layer's Variables.  For a state, a step, or
        any function of one layer's state, `(layer, x) -> (layer, x)`, or `-> x` if it writes nothing.  What a layer
        makes, `sow` above all, gets a leading axis for the layers: in the module, where `nnx.scan` puts it, so
        `nnx.capture` and a step's `capture=` find it there; for a state, in the output of a step with `capture=`.
      layers: a module whose leaves have one more leading axis than those of its layers, as `nnx.vmap` makes it (with
        `transform_metadata={nnx.PARTITION_NAME: None}` if Variables declare their sharding); or a state whose arrays
        have it, as `jax.vmap` over `plan.take` makes it.
      x: the input of the first layer; of the shapes and dtypes that each layer returns.
      shared: leaves without that axis, shared by all layers; if a layer writes them, the next one sees it.  For a
        module, a filter of its leaves; for a state, the names of kinds.
      reverse: whether to run from the last layer to the first.
      unroll: how many layers one iteration of the compiled loop runs.

    Returns:
      the output of the last layer, with the module's Variables written; for a state, `(state, x)`, or
      `(state, (x, captured))` for a step with `capture=`.

    Raises:
      StructureError: leaves lack the axis, or have another number of layers; a layer removes leaves, or changes the
        shape or dtype of shared ones; lists all of them.
      DeclarationError: `shared` names a kind that does not exist.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> layers = nnx.Dict(
      ...     scale=nnx.Param(jnp.array([2.0, 3.0, 4.0])), calls=nnx.Variable(jnp.zeros(3, int))
      ... )
      >>> def run(layer, x):
      ...     layer.calls[...] += 1
      ...     return x * layer.scale[...]
      >>> print(sw.scan_layers(run, layers, jnp.array(1.0)), layers.calls[...])
      24.0 [1 1 1]
    """
    scan = functools.partial(jax.lax.scan, reverse=reverse, unroll=unroll)
    if not isinstance(layers, State):
        return scan_module(fn, layers, x, shared, scan)
    names = _names(layers, shared)
    if layers.tables.ensemble is None:
        return _scan_state(fn, layers, x, names, scan)
    # The layers are the members of an ensemble: one member is a state of the plan for a single model.
    common = [kind for kind, axes in layers.tables.slot_axes.items() if axes and set(axes) == {None}]
    after, x = _scan_state(fn, as_one(layers), x, (*names, *common), scan)
    return as_ensemble(layers.tables.ensemble, after), x


# --- a state -----------------------------------------------------------------------------------------------------


def _names(state: State, shared: Any) -> tuple[str, ...]:
    names = names_given(() if shared is None else shared, "shared")
    for name in names:
        if name not in state.tables.kinds:
            raise unknown_kind(name, state.tables.kinds)
    return names


def _scan_state(
    fn: Callable[..., Any], state: State, x: Any, shared: Sequence[str], scan: Callable[..., Any]
) -> tuple[State, Any]:
    plan = state.tables
    check_not_donated(state, plan.kinds)
    arrays, structure = [array for part in state.parts for array in part.arrays], jax.tree.structure(state)
    slots = [slot for part in plan.stored.values() for slot in part]
    many = [slot.kind not in shared for slot in slots]
    leaves = [slot.leaf for slot in slots]
    layers = count_layers(list(zip(leaves, arrays, many, strict=True)), [slot.spec.shape for slot in slots])
    captures = isinstance(fn, Step) and definition_of(fn).captures

    def run(values: Sequence[Any], x: Any) -> tuple[list[Any], Any, Any]:
        layer: State = jax.tree.unflatten(structure, values)
        after, x = _result(fn(layer, x), layer)
        x, captured = x if captures else (x, None)
        return [array for part in after.parts for array in part.arrays], x, captured

    # A dry run on one slice finds the written leaves: a step returns the others unchanged.
    written: list[int] = []

    def find_written(values: Sequence[Any], x: Any) -> None:
        pairs = enumerate(zip(run(values, x)[0], values, strict=True))
        written[:] = [number for number, (new, old) in pairs if new is not old]

    jax.eval_shape(find_written, [jax.ShapeDtypeStruct(*slot.spec) for slot in slots], x)
    # Arrays by number: stacked ones are scanned, and returned if they are written; shared ones that are written are
    # carried; the rest are constants of the loop.
    sliced = [number for number, is_stacked in enumerate(many) if is_stacked]
    carried = [number for number in written if not many[number]]
    returned = [number for number in written if many[number]]

    def run_layer(carry: Any, slices: Sequence[Any]) -> Any:
        after, x, captured = run(replaced(arrays, (sliced, slices), (carried, carry[0])), carry[1])
        return (_chosen(after, carried), x), (_chosen(after, returned), captured)

    start = _chosen(arrays, carried), x
    (values, x), (new, captured) = scan(run_layer, start, _chosen(arrays, sliced), length=layers)
    after = _with_arrays(state, replaced(arrays, (carried, values), (returned, new)))
    return after, (x, captured) if captures else x


def _chosen(values: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [values[number] for number in numbers]


def _result(result: Any, layer: State) -> tuple[State, Any]:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], State)):
        return layer, result
    returned = in_form_of(layer.tables, result[0])
    if returned.tables is not layer.tables:
        raise StructureError(
            "The function returns a state of a plan other than its layer's.",
            hint="return the layer that the step returned: layer, x = step(layer, x)",
        )
    return returned, result[1]


def _with_arrays(state: State, arrays: Sequence[Any]) -> State:
    """Returns the state with other arrays; it shares the parts whose arrays are all the same."""
    left, parts = iter(arrays), []
    for part in state.parts:
        new = tuple(itertools.islice(left, len(part.arrays)))
        parts.append(part if all(map(operator.is_, new, part.arrays)) else Part(new))
    # Whether a layer reads what it writes is not known here: what was stale stays so.
    settle(state.tables, state.parts, parts)
    return State.make(state.tables, parts)
