"""A scan over stacked layers: one layer's program, run over the arrays of many.

Equal layers can be stacked: one set of leaves, each with one axis more.  `jax.lax.scan` then compiles one layer
instead of all.  What it takes in it reads slice by slice, what it gives out it stacks anew, and what it carries goes
from layer to layer; so what is only read should be taken in, or, where all layers share it, stay outside of the loop,
and only what is written be given out or carried.  Which leaves are written needs no declaration: a step hands on the
very arrays that it does not write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._compat import is_variable
from statewise.claims import claim
from statewise.errors import StructureError
from statewise.kinds import Kind, Kinds, unknown_kind
from statewise.paths import Leaf, format_shape
from statewise.plan import Plan, make_plan
from statewise.putting import put_values
from statewise.scan import arrays_of, raw_value, rebuild, row_of, scan, spec_of, value_of
from statewise.state import Part, State, check_unspent, make_state
from statewise.steps import step

__all__ = ["scan_layers"]


def scan_layers(
    fn: Callable[..., Any] | Any, layers: Any, x: Any, *, shared: Any = None, reverse: bool = False, unroll: int = 1
) -> Any:
    """Runs one layer's function through stacked layers, one after the other, as one `jax.lax.scan`.

    Leaves that are only read are never stacked anew nor carried.  Use it inside of a step, or of `jax.jit`: like
    `jax.lax.scan` itself it is compiled anew where it is called outside of one.

    Args:
      fn: of a module: a function `(layer, x) -> x`, which may write the layer's Variables.  Of a state: a step, or any
        function of a state of one layer, `(layer, x) -> (layer, x)`, or `-> x` where it writes nothing.
      layers: a module whose leaves have a first axis more than its layers have, as `nnx.vmap` makes it
        (with `transform_metadata={nnx.PARTITION_NAME: None}` where Variables say how they are split); or a state
        whose arrays have it, as `jax.vmap` over `plan.take` makes it.
      x: what the first layer gets; of the shapes and dtypes that each layer gives.
      shared: leaves without that axis, one for all layers; where a layer writes them, the next one sees it.  A filter
        of the module's leaves; of a state, the names of kinds.
      reverse: from the last layer to the first.
      unroll: how many layers stand in one turn of the compiled loop.

    Returns:
      what the last layer gives, and the module's Variables are written; of a state, `(state, x)`.

    Raises:
      StructureError: leaves without the axis, or with another number of layers; all of them.
      KindError: `shared` names a kind that is not there.

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
    if isinstance(layers, State):
        return _scan_state(fn, layers, x, _names(layers, shared), reverse, unroll)
    return _scan_module(fn, layers, x, shared, reverse, unroll)


# --- a state -----------------------------------------------------------------------------------------------------


def _names(state: State, shared: Any) -> tuple[str, ...]:
    names = (shared,) if isinstance(shared, str) else tuple(shared or ())
    for name in names:
        if name not in state._plan.kinds:
            raise unknown_kind(name, state._plan.kinds)
    return names


def _scan_state(
    fn: Callable[..., Any], state: State, x: Any, shared: Sequence[str], reverse: bool, unroll: int
) -> tuple[State, Any]:
    plan = state._plan
    check_unspent(state, plan.kinds)
    arrays = [array for part in state._parts for array in part.arrays]
    stacked = [kind not in shared for kind, specs in plan._stored.items() for _ in specs]
    leaves = [leaf for kind in plan.kinds for leaf in plan._leaf_of_slot[kind]]
    specs = [spec for part in plan._stored.values() for spec in part]
    layers = _count(list(zip(leaves, arrays, stacked, strict=True)), [spec.shape for spec in specs])

    def layer_of(values: Sequence[Any]) -> State:
        return jax.tree.unflatten(jax.tree.structure(state), values)

    def run(values: Sequence[Any], x: Any) -> tuple[list[Any], Any]:
        layer = layer_of(values)
        after, x = _result(fn(layer, x), layer)
        return [array for part in after._parts for array in part.arrays], x

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
        after, x = run(values, carry[1])
        return (_chosen(after, carried), x), _chosen(after, given_out)

    carry, out = jax.lax.scan(
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
    return _with_arrays(state, made), carry[1]


def _chosen(values: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    return [value for value, chosen in zip(values, which, strict=True) if chosen]


def _result(result: Any, layer: State) -> tuple[State, Any]:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], State)):
        return layer, result
    if result[0]._plan is not layer._plan:
        raise StructureError(
            "The function gives back a state of another plan than its layer's.",
            mend="return the layer that came back from the step: layer, x = step(layer, x)",
        )
    return result


def _with_arrays(state: State, arrays: Sequence[Any]) -> State:
    """The state with other arrays; it shares the parts in which none is another."""
    left, parts = iter(arrays), []
    for part in state._parts:
        mine = tuple(next(left) for _ in part.arrays)
        parts.append(part if all(map(_same, mine, part.arrays)) else Part(mine))
    return make_state(state._plan, parts)


def _same(one: Any, other: Any) -> bool:
    return one is other


def _count(rows: Sequence[tuple[Leaf, Any, bool]], shapes: Sequence[tuple[int, ...]] | None) -> int:
    """How many layers there are; every leaf that has another number, or no axis for them, is listed.

    Args:
      rows: each array with its leaf, and whether it is stacked.
      shapes: the shape of each in one layer; None if that is not known.
    """
    counts: list[int] = []
    odd: list[Leaf] = []
    for number, (leaf, array, many) in enumerate(rows):
        spec = spec_of(array)
        shape = spec.shape if spec else ()
        own = None if shapes is None else shapes[number]
        if many and (not shape or (own is not None and shape[1:] != own)):
            odd.append(dataclasses.replace(leaf, note=f"is {format_shape(shape)}, without an axis for the layers"))
        elif not many and own is not None and shape != own:
            odd.append(dataclasses.replace(leaf, note=f"is {format_shape(shape)}, but shared by the layers"))
        elif many:
            counts.append(shape[0])
            if shape[0] != counts[0]:
                odd.append(dataclasses.replace(leaf, note=f"{shape[0]} layers, others have {counts[0]}"))
    if odd:
        raise StructureError(
            "Not every leaf has one slice for each layer.",
            leaves=list(dict.fromkeys(odd)),
            mend="stack them: layers = nnx.vmap(make_layer, transform_metadata={nnx.PARTITION_NAME: None})(keys)\n"
            "or jax.vmap(lambda key: plan.take(...))(keys)\n"
            "or say what is one for all: sw.scan_layers(fn, layers, x, shared=...)",
        )
    if not counts:
        raise StructureError(
            "There is nothing that tells how many layers there are: every leaf is shared.",
            mend="x = jax.lax.fori_loop(0, layers, lambda _, x: fn(layer, x), x)",
        )
    return counts[0]


# --- a module ----------------------------------------------------------------------------------------------------


def _scan_module(fn: Callable[..., Any], module: Any, x: Any, shared: Any, reverse: bool, unroll: int) -> Any:
    kinds = Kinds(layers=Kind(...)) if shared is None else Kinds(layers=Kind(...), shared=Kind(shared))
    found = scan((module,))
    stacked = [kind == "layers" for kind in claim(kinds, found)]
    held = [arrays_of(raw_value(leaf)) for leaf in found.leaves]
    rows = [row_of(path, leaf) for path, leaf in zip(found.paths, found.leaves, strict=True)]
    _count(
        [(row, array, many) for row, (arrays, _), many in zip(rows, held, stacked, strict=True) for array in arrays],
        None,
    )
    one = [
        value_of([_slice(array, is_variable(leaf)) if many else array for array in arrays], structure)
        for leaf, (arrays, structure), many in zip(found.leaves, held, stacked, strict=True)
    ]
    plan = make_plan(kinds, rebuild(found.graphdef, one, several=False), None)
    parts: dict[str, list[Any]] = {kind: [] for kind in plan.kinds}
    by_path = dict(zip(found.paths, held, strict=True))
    for row in plan._rows:
        parts[row.kind] += [jnp.asarray(array) for array in by_path[row.path][0]]
    before = State.of(plan, parts.values())
    layer = step(fn, writes=[kind for kind in plan.kinds if plan._specs[kind]])
    after, x = _scan_state(layer, before, x, _names(before, ["shared"] if shared is not None else ()), reverse, unroll)
    _write(plan, before, after, module, dict(zip(found.paths, found.leaves, strict=True)))
    return x


def _slice(array: Any, in_variable: bool) -> Any:
    """One layer's part of an array, by shape and dtype."""
    if in_variable or not array.shape[0]:
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
    # In a list, a dict or a tuple NNX takes a mere shape for something static: the layers would see it, and no array.
    return jnp.asarray(array)[0]


def _write(plan: Plan, before: State, after: State, module: Any, leaves: dict[Any, Any]) -> None:
    """Puts what was written back into the module."""
    writes = []
    for row, span in zip(plan._rows, plan._spans, strict=True):
        was, now = (state.part(span.kind).arrays[span.start : span.stop] for state in (before, after))
        if all(map(_same, was, now)):
            continue
        writes.append((row.path, leaves[row.path], value_of(now, span.structure)))
    put_values(module, leaves.values(), writes)
