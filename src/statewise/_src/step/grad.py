"""Gradients of any NNX model with respect to the leaves that a filter matches.

`nnx.grad` differentiates with respect to `nnx.Param`, and to anything else through `nnx.DiffState`, which Flax plans to
retire.  These functions take the filter directly, need no plan and no state, and work inside steps, under `nnx.jit`,
and eagerly.  As with `nnx.grad`, the model keeps what the function writes to it (statistics, counters).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.narrowing import check_given
from statewise._src.common.nested_state import nested
from statewise._src.common.nnx_graph import (
    ModelGraph,
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
from statewise._src.common.paths import Path
from statewise._src.common.problems import Problems
from statewise._src.common.write_values import put_values
from statewise._src.filters.combinators import Filter, describe, predicate
from statewise._src.plan.spelled_paths import Reading, nearest, spelled
from statewise._src.sharding.explicit_axes import explained
from statewise._src.step.function import named_like
from statewise._src.step.outside_writes import plain_variables
from statewise.errors import FilterError, StructureError

__all__ = ["grad", "value_and_grad"]

P = ParamSpec("P")
R = TypeVar("R")
Aux = TypeVar("Aux")
# Of Variables, by path.
Grads = compat.NestedState


def value_and_grad(fn: Callable[P, R], wrt: Filter = nnx.Param, has_aux: bool = False) -> Callable[P, tuple[R, Grads]]:
    """Makes a function that returns the loss of a model and its gradients by a filter.

    Args:
      fn: a function of a model and other arguments; returns a real scalar, or `(loss, aux)`.  Other NNX objects among
        the arguments (`nnx.Rngs`, metrics) are also written, but not differentiated.
      wrt: which leaves of the model to differentiate: any filter.
      has_aux: whether `fn` returns `(loss, aux)`.

    Returns:
      a function of the same arguments that returns `(loss, grads)` or `((loss, aux), grads)`; `grads` are
      Variables nested by path, of the leaves' own types, as `nnx.Optimizer.update` takes it.

    Raises:
      FilterError: `wrt` is not a filter, or matches no leaf.
      StructureError: a matched leaf does not hold floating-point numbers; the loss is not a real scalar;
        the model holds NumPy numbers that JAX cannot represent.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> loss_of = sw.value_and_grad(lambda model, x: model(x).sum(), wrt=sw.Path("bias"))
      >>> loss, grads = loss_of(model, jnp.ones((3, 2)))
      >>> grads["bias"][...]
      Array([3.], dtype=float32)
    """
    matches = predicate(wrt)

    def differentiated(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        others, arguments = _objects_among((args, kwargs))
        graph = read_graph([model, *others])
        chosen = [
            _of_model(graph, path) and bool(matches(graph.relative(path), leaf))
            for path, leaf in zip(graph.paths, graph.leaves, strict=True)
        ]
        _check_chosen(graph, chosen, wrt)
        flat = [arrays_of(raw_value(leaf)) for leaf in graph.leaves]
        diff = [arrays for arrays, _ in itertools.compress(flat, chosen)]
        check_given(
            (row_of(graph.relative(path), leaf), array, spec.dtype)
            for path, leaf, (arrays, _) in zip(graph.paths, graph.leaves, flat, strict=True)
            for array in arrays
            if not isinstance(array, jax.Array) and (spec := spec_of(array)) is not None
        )

        new_paths: list[Path] = []
        name = getattr(fn, "__name__", type(fn).__name__)

        # JAX differentiates with respect to all of `diff`, so the other arrays are constants.
        def pure(diff: Sequence[Sequence[Any]]) -> tuple[Any, Any]:
            given = iter(diff)
            values = [
                value_of(next(given) if is_chosen else arrays, structure)
                for (arrays, structure), is_chosen in zip(flat, chosen, strict=True)
            ]
            objects = rebuild(graph.graphdef, values, graph.several)
            own_args, own_kwargs = arguments(objects[1:])
            with plain_variables(fn, objects[:1], name):
                out = fn(objects[0], *own_args, **own_kwargs)
            loss, aux = _loss_of(out, has_aux)
            after = read_graph(objects)
            check_plain(after, name)
            changed, new = _changes(graph, values, after)
            # Paths cannot leave a trace, and do not sort as keys of a dict may have to: only the Variables are outputs.
            new_paths[:] = new
            return loss, (aux, changed, list(new.values()))

        with explained(name, diff, flat, args, kwargs):
            (loss, (aux, changed, new_leaves)), grads = jax.value_and_grad(pure, has_aux=True)(diff)
        root = (model, *others) if graph.several else model
        writes = [(graph.paths[number], graph.leaves[number], value) for number, value in changed.items()]
        put_values(root, graph.leaves, writes)
        if new_leaves:
            nnx.update(root, nested(zip(new_paths, new_leaves, strict=True)))
        return ((loss, aux) if has_aux else loss), _gradients(graph, chosen, flat, grads)

    return named_like(differentiated, fn)


def _objects_among(arguments: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Returns the NNX objects among the other arguments, and a function that rebuilds the arguments with other objects.

    `nnx.Rngs` or metrics that are passed beside the model are written like the model.
    """
    leaves, structure = jax.tree.flatten(arguments, is_leaf=is_object)

    def with_objects(objects: Sequence[Any]) -> Any:
        given = iter(objects)
        return jax.tree.unflatten(structure, [next(given) if is_object(leaf) else leaf for leaf in leaves])

    return list(filter(is_object, leaves)), with_objects


def _of_model(graph: ModelGraph, path: Path) -> bool:
    return not graph.several or path[0] == 0


@overload
def grad(fn: Callable[P, Any], wrt: Filter = nnx.Param, has_aux: Literal[False] = False) -> Callable[P, Grads]: ...
@overload
def grad(
    fn: Callable[P, tuple[Any, Aux]], wrt: Filter = nnx.Param, *, has_aux: Literal[True]
) -> Callable[P, tuple[Grads, Aux]]: ...
@overload
def grad(fn: Callable[P, Any], wrt: Filter = nnx.Param, has_aux: bool = False) -> Callable[P, Any]: ...
def grad(fn: Callable[..., Any], wrt: Filter = nnx.Param, has_aux: bool = False) -> Callable[..., Any]:
    """Makes a function that returns a model's gradients by a filter: `value_and_grad` without the loss.

    Args:
      fn: a function of a model and other arguments; returns a real scalar, or `(loss, aux)`.
      wrt: which leaves to differentiate: any filter.
      has_aux: whether `fn` returns `(loss, aux)`; then `(grads, aux)` is returned.

    Raises:
      FilterError: `wrt` is not a filter, or matches no leaf.
      StructureError: a matched leaf does not hold floating-point numbers; the loss is not a real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> sw.grad(lambda model: model.kernel.sum())(model)["kernel"][...]
      Array([[1.],
             [1.]], dtype=float32)
    """
    both = value_and_grad(fn, wrt=wrt, has_aux=has_aux)

    def gradient(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        value, grads = both(model, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return named_like(gradient, fn)


def _check_chosen(graph: ModelGraph, chosen: Sequence[bool], wrt: Any) -> None:
    if not any(chosen):
        # Only the model's leaves: other objects among the arguments are not differentiated.
        of_model = [_of_model(graph, path) for path in graph.paths]
        own = graph._replace(
            paths=tuple(map(graph.relative, itertools.compress(graph.paths, of_model))),
            leaves=tuple(itertools.compress(graph.leaves, of_model)),
            several=False,
        )
        near = [text for part in spelled(wrt) if not part.negated for text in nearest(Reading(own, {}), part.filter)]
        also = f"  The nearest paths are {', '.join(dict.fromkeys(near))}." if near else ""
        raise FilterError(
            f"wrt={describe(wrt)} matches no leaf of the model, so there is nothing to differentiate.{also}",
            hint="sw.explain(model, wrt) shows what it matches",
        )
    problems = Problems()
    for path, leaf, is_chosen in zip(graph.paths, graph.leaves, chosen, strict=True):
        if is_chosen and not all(map(_is_float, arrays_of(raw_value(leaf))[0])):
            problems.add(row_of(graph.relative(path), leaf), "cannot be differentiated")
    problems.raise_as(
        StructureError,
        f"wrt={describe(wrt)} matches leaves that do not hold floating-point numbers.",
        "wrt=nnx.All(..., sw.Where(lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)))",
    )


def _is_float(array: object) -> bool:
    spec = spec_of(array)
    return spec is not None and bool(jnp.issubdtype(spec.dtype, jnp.inexact))


def _loss_of(out: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise StructureError("has_aux=True, but the function does not return (loss, aux).", hint="return loss, aux")
    loss, aux = out if has_aux else (out, None)
    spec = spec_of(loss)
    if spec is None or spec.shape != () or not jnp.issubdtype(spec.dtype, jnp.floating):
        shown = type(loss).__name__ if spec is None else f"{spec.dtype}{list(spec.shape)}"
        hint = "has_aux=True" if isinstance(loss, tuple) else "return loss.mean()"
        raise StructureError(f"The loss is {shown}, not a real scalar.", hint=hint)
    return loss, aux


def _changes(graph: ModelGraph, before: Sequence[Any], after: ModelGraph) -> tuple[dict[int, Any], dict[Path, Any]]:
    """Returns what the function wrote: new values by the leaf's position, and the Variables that it made, by path."""
    now = dict(zip(after.paths, after.leaves, strict=True))
    changed: dict[int, Any] = {}
    for position, (path, old) in enumerate(zip(graph.paths, before, strict=True)):
        if path not in now:
            raise StructureError(
                "The function removes a leaf of the model.",
                leaves=[row_of(path, graph.leaves[position])],
                hint="keep the model's structure, and call nnx.pop on the model outside of the function",
            )
        value = raw_value(now.pop(path))
        # By identity: an unwritten leaf holds the very value that it was rebuilt from.
        if value is not old:
            changed[position] = value
    return changed, now


def _gradients(graph: ModelGraph, chosen: Sequence[bool], flat: Sequence[Any], grads: Sequence[Sequence[Any]]) -> Any:
    leaves: list[tuple[Any, Any]] = []
    of_chosen = itertools.compress(zip(graph.paths, graph.leaves, flat, strict=True), chosen)
    for (path, leaf, (_, structure)), arrays in zip(of_chosen, grads, strict=True):
        value = value_of(arrays, structure)
        if compat.is_variable(leaf):
            # As `nnx.grad` has it: never a reference, and with the metadata that `jax.tree.map` compares.
            value = leaf.var_type.from_metadata(value, leaf.get_metadata())
        leaves.append((graph.relative(path), value))
    if not leaves[0][0]:
        return leaves[0][1]  # the model is one Variable, and so is its gradient
    return nested(leaves)
