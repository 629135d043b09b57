"""A scan over stacked layers: one layer's program, run over the arrays of many.

Equal layers can be stacked: one set of leaves, each with one axis more.  `jax.lax.scan` then compiles one layer
instead of all.  What it takes in it reads slice by slice, what it gives out it stacks anew, and what it carries goes
from layer to layer; so what is only read should be taken in, or, where all layers share it, stay outside of the loop,
and only what is written be given out or carried.  Which leaves are written needs no declaration: a step hands on the
very arrays that it does not write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import jax

from statewise._src.common.object_names import names_given
from statewise._src.core.member_view import as_ensemble, as_one
from statewise._src.core.plan import State
from statewise._src.core.state_data import Part, check_not_donated
from statewise._src.filters.combinators import Filter
from statewise._src.plan.kind import unknown_kind
from statewise._src.step.scan_modules import count_layers, scan_module
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

    Leaves that are only read are never stacked anew nor carried.  Use it inside of a step, or of `jax.jit`: like
    `jax.lax.scan` itself it is compiled anew where it is called outside of one.

    Args:
      fn: of a module: a function `(layer, x) -> x`, which may write the layer's Variables.  Of a state: a step, or any
        function of a state of one layer, `(layer, x) -> (layer, x)`, or `-> x` where it writes nothing.  What a layer
        makes, `sow` above all, comes out with a first axis for the layers: in the module, where `nnx.scan` puts it, so
        that `nnx.capture` and a step's `capture=` find it there; of a state, from a step with `capture=`.
      layers: a module whose leaves have a first axis more than its layers have, as `nnx.vmap` makes it
        (with `transform_metadata={nnx.PARTITION_NAME: None}` where Variables say how they are split); or a state
        whose arrays have it, as `jax.vmap` over `plan.take` makes it.
      x: what the first layer gets; of the shapes and dtypes that each layer gives.
      shared: leaves without that axis, one for all layers; where a layer writes them, the next one sees it.  A filter
        of the module's leaves; of a state, the names of kinds.
      reverse: from the last layer to the first.
      unroll: how many layers stand in one turn of the compiled loop.

    Returns:
      what the last layer gives, and the module's Variables are written; of a state, `(state, x)`, or
      `(state, (x, captured))` of a step with `capture=`.

    Raises:
      StructureError: leaves without the axis, or with another number of layers; leaves that a layer removes, or
        shared ones to which it gives another shape or dtype; all of them.
      DeclarationError: `shared` names a kind that is not there.

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
    if isinstance(layers, State) and layers.tables.ensemble is not None:
        # The layers are the members of an ensemble: one of them is a state of the single plan.
        axes = layers.tables.slot_axes
        common = [kind for kind, part in axes.items() if part and set(part) == {None}]
        names = tuple(dict.fromkeys([*_names(layers, shared), *common]))
        after, x = _scan_state(fn, as_one(layers), x, names, reverse, unroll)
        return as_ensemble(layers.tables.ensemble, after), x
    if isinstance(layers, State):
        return _scan_state(fn, layers, x, _names(layers, shared), reverse, unroll)
    return scan_module(fn, layers, x, shared, reverse, unroll)


# --- a state -----------------------------------------------------------------------------------------------------


def _names(state: State, shared: Any) -> tuple[str, ...]:
    names = names_given(() if shared is None else shared, "shared")
    for name in names:
        if name not in state.tables.kinds:
            raise unknown_kind(name, state.tables.kinds)
    return names


def _scan_state(
    fn: Callable[..., Any], state: State, x: Any, shared: Sequence[str], reverse: bool, unroll: int
) -> tuple[State, Any]:
    plan = state.tables
    check_not_donated(state, plan.kinds)
    arrays = [array for part in state.parts for array in part.arrays]
    stacked = [kind not in shared for kind, specs in plan.stored_specs.items() for _ in specs]
    leaves = [leaf for kind in plan.kinds for leaf in plan.leaf_of_slot[kind]]
    specs = [spec for part in plan.stored_specs.values() for spec in part]
    layers = count_layers(list(zip(leaves, arrays, stacked, strict=True)), [spec.shape for spec in specs])

    def layer_of(values: Sequence[Any]) -> State:
        return jax.tree.unflatten(jax.tree.structure(state), values)

    captures = isinstance(fn, Step) and definition_of(fn).captures

    def run(values: Sequence[Any], x: Any) -> tuple[list[Any], Any, Any]:
        layer = layer_of(values)
        after, x = _result(fn(layer, x), layer)
        x, captured = x if captures else (x, None)
        return [array for part in after.parts for array in part.arrays], x, captured

    written: list[bool] = []

    def look(values: Sequence[Any], x: Any) -> None:
        written[:] = [now is not was for now, was in zip(run(values, x)[0], values, strict=True)]

    ones = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs]
    jax.eval_shape(look, ones, x)
    carried = [of and not many for of, many in zip(written, stacked, strict=True)]
    given_out = [of and many for of, many in zip(written, stacked, strict=True)]

    def turn(carry: Any, slices: Sequence[Any]) -> Any:
        values, rest, sliced = [], iter(carry[0]), iter(slices)
        for array, many, goes_on in zip(arrays, stacked, carried, strict=True):
            values.append(next(sliced) if many else next(rest) if goes_on else array)
        after, x, captured = run(values, carry[1])
        return (_chosen(after, carried), x), (_chosen(after, given_out), captured)

    carry, (out, captured) = jax.lax.scan(
        turn,
        (_chosen(arrays, carried), x),
        _chosen(arrays, stacked),
        length=layers,
        reverse=reverse,
        unroll=unroll,
    )
    last, new = iter(carry[0]), iter(out)
    made = [
        next(new) if gives else next(last) if goes else array
        for array, gives, goes in zip(arrays, given_out, carried, strict=True)
    ]
    return _with_arrays(state, made), (carry[1], captured) if captures else carry[1]


def _chosen(values: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    return [value for value, chosen in zip(values, which, strict=True) if chosen]


def _result(result: Any, layer: State) -> tuple[State, Any]:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], State)):
        return layer, result
    if result[0].tables is not layer.tables:
        raise StructureError(
            "The function gives back a state of another plan than its layer's.",
            hint="return the layer that came back from the step: layer, x = step(layer, x)",
        )
    return result


def _with_arrays(state: State, arrays: Sequence[Any]) -> State:
    """The state with other arrays; it shares the parts in which none is another."""
    left, parts = iter(arrays), []
    for part in state.parts:
        mine = tuple(next(left) for _ in part.arrays)
        parts.append(part if all(map(_same, mine, part.arrays)) else Part(mine))
    return State.make(state.tables, parts)


def _same(one: Any, other: Any) -> bool:
    return one is other
