"""From a traced call to the function that gets compiled.

Two programs are made of the same trace.  `forward` runs it.  `train` differentiates it with respect to the
arrays of some optimizers and applies them: the jaxpr is the function that is differentiated, so the user's
code is traced once.  Both go from `(donated, kept, args, kwargs)` to `(written, output)`, where `donated` and
`written` are the arrays that change and `kept` those that are only read, each grouped by kind; which is which
is a `Routes`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from statewise.errors import StructureError
from statewise.moments import Group
from statewise.plan import Plan
from statewise.scan import spec_of
from statewise.tracing import Traced

__all__ = ["Routes", "forward_program", "routes_of", "train_program"]

Program = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Some arrays of one kind: all of them, or those at some positions.

    Attributes:
      kind: the position of the kind.
      offset: where the kind's arrays start among all arrays of a state.
      positions: which of its arrays.
      pick: takes them out of a part's arrays; None where it is all of them.
    """

    kind: int
    offset: int
    positions: tuple[int, ...]
    pick: Callable[[Sequence[Any]], Any] | None

    @classmethod
    def of(cls, kind: int, offset: int, positions: Sequence[int], size: int) -> Route:
        pick: Callable[[Sequence[Any]], Any] | None = None
        if len(positions) == 1 and size > 1:
            only = positions[0]
            pick = lambda arrays: (arrays[only],)  # noqa: E731 - itemgetter gives a bare item for one
        elif len(positions) < size:
            pick = operator.itemgetter(*positions)
        return cls(kind, offset, tuple(positions), pick)


@dataclasses.dataclass(frozen=True, slots=True)
class Routes:
    """Which arrays cross into the compiled function, and how.

    Attributes:
      donated: those that are written; their buffers are given away, and the new values come back so.
      kept: those that are only read.
      size: how many arrays a state has.
    """

    donated: tuple[Route, ...]
    kept: tuple[Route, ...]
    size: int

    def spread(self, donated: Any, kept: Any) -> list[Any]:
        """All arrays of a state in order, None for those that do not cross."""
        flat: list[Any] = [None] * self.size
        for routes, parts in ((self.donated, donated), (self.kept, kept)):
            for route, arrays in zip(routes, parts, strict=True):
                for position, array in zip(route.positions, arrays, strict=True):
                    flat[route.offset + position] = array
        return flat

    def gather(self, flat: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        """The donated arrays' new values, grouped by kind."""
        return tuple(tuple(flat[route.offset + at] for at in route.positions) for route in self.donated)


def routes_of(plan: Plan, traced: Traced, groups: Sequence[Group]) -> Routes:
    """The routes of a traced call, with the arrays that these optimizers read and write besides."""
    offsets = _offsets(plan)
    written = {offsets[kind] + position for kind, position in traced.written}
    for group in groups:
        written.update(params_of(plan, group))
        written.update(moments_of(plan, group))
    read = {index for index in range(traced.inputs) if traced.effects.read[index]} - written
    return Routes(_routes(plan, written), _routes(plan, read), traced.inputs)


def _offsets(plan: Plan) -> dict[str, int]:
    offsets, total = {}, 0
    for kind, size in zip(plan.kinds, plan._sizes, strict=True):
        offsets[kind] = total
        total += size
    return offsets


def _routes(plan: Plan, indices: set[int]) -> tuple[Route, ...]:
    routes = []
    for number, offset in enumerate(_offsets(plan).values()):
        size = plan._sizes[number]
        positions = [position for position in range(size) if offset + position in indices]
        if positions:
            routes.append(Route.of(number, offset, positions, size))
    return tuple(routes)


def params_of(plan: Plan, group: Group) -> list[int]:
    """Where the arrays that an optimizer updates stand among all arrays of a state, in its order."""
    offsets = _offsets(plan)
    return [
        offsets[span.kind] + position
        for span in plan._spans
        if span.kind in group.kinds
        for position in range(span.start, span.stop)
    ]


def moments_of(plan: Plan, group: Group) -> range:
    """Where an optimizer's state stands among all arrays of a state."""
    start, stop = plan._moment_spans[plan._groups.index(group)]
    offset = _offsets(plan)["optimizer"]
    return range(offset + start, offset + stop)


def forward_program(traced: Traced, routes: Routes, plan: Plan) -> Program:
    """Runs the traced call."""
    spots = _spots(plan, traced)

    def program(donated: Any, kept: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        flat = routes.spread(donated, kept)
        outputs, written = traced.run(flat + jax.tree.leaves((args, kwargs)))
        for spot, array in zip(spots, written, strict=True):
            flat[spot] = array
        return routes.gather(flat), jax.tree.unflatten(traced.out_tree, outputs)

    return program


def _spots(plan: Plan, traced: Traced) -> list[int]:
    offsets = _offsets(plan)
    return [offsets[kind] + position for kind, position in traced.written]


def train_program(traced: Traced, routes: Routes, plan: Plan, groups: Sequence[Group]) -> Program:
    """Differentiates the traced call and applies the optimizers.

    The output is the loss, or (loss, aux); `captured` beside it if the step captures.
    """
    spots = _spots(plan, traced)
    params = [params_of(plan, group) for group in groups]

    def program(donated: Any, kept: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        flat = routes.spread(donated, kept)
        rest = jax.tree.leaves((args, kwargs))

        def loss_of(wrt: list[list[Any]]) -> tuple[Any, Any]:
            values = list(flat)
            for indices, arrays in zip(params, wrt, strict=True):
                for index, array in zip(indices, arrays, strict=True):
                    values[index] = array
            outputs, written = traced.run(values + rest)
            return outputs[0], (outputs, written)

        wrt = [[flat[index] for index in indices] for indices in params]
        (_, (outputs, written)), grads = jax.value_and_grad(loss_of, has_aux=True)(wrt)
        # First what the function wrote, then the update on top of it, as `nnx.Optimizer` has it: layers that
        # normalise their own weights are updated from the normalised ones.
        _store(flat, spots, written)
        for number, group in enumerate(groups):

            def loss_of_group(given: Any, number: int = number, group: Group = group) -> Any:
                return loss_of([*wrt[:number], group.arrays(given), *wrt[number + 1 :]])[0]

            current = [flat[index] for index in params[number]]
            new, state = update(plan, group, flat, current, grads[number], outputs[0], loss_of_group)
            _store(flat, params[number], new)
            _store(flat, moments_of(plan, group), state)
        return routes.gather(flat), jax.tree.unflatten(traced.out_tree, outputs)

    return program


def _store(flat: list[Any], indices: Sequence[int], arrays: Sequence[Any]) -> None:
    for index, array in zip(indices, arrays, strict=True):
        flat[index] = array


def update(
    plan: Plan,
    group: Group,
    flat: Sequence[Any],
    arrays: Sequence[Any],
    grads: Sequence[Any],
    loss: Any,
    loss_of: Callable[[Any], Any],
) -> tuple[list[Any], list[Any]]:
    """One update by Optax: the new parameters and the new optimizer state, as arrays in order.

    Extra arguments (`value`, `grad`, `value_fn`) go to the transformations that take them, as `optax.chain` and
    `optax.with_extra_args_support` see to it.
    """
    layout = group.layout
    params, gradients = group.params(arrays), group.params(grads)
    state = jax.tree.unflatten(layout.structure, [flat[index] for index in moments_of(plan, group)])
    updates, state = group.tx.update(gradients, state, params, value=loss, grad=gradients, value_fn=loss_of)
    new = group.arrays(optax.apply_updates(params, updates))
    moments = [jnp.asarray(leaf) for leaf in layout.structure.flatten_up_to(state)]
    _check_update(plan, group, moments)
    return new, moments


def _check_update(plan: Plan, group: Group, moments: Sequence[Any]) -> None:
    changed = [
        f"{'/'.join(map(str, path))}: {spec.shape} {spec.dtype} becomes {array.shape} {array.dtype}"
        for path, spec, array in zip(group.layout.paths, group.layout.specs, moments, strict=True)
        if spec_of(array) != spec
    ]
    if changed:
        raise StructureError(
            f"The optimizer of {group.label} changes the shape or dtype of its own state:\n  " + "\n  ".join(changed),
            kind="optimizer",
            mend="an optimizer whose state keeps its dtypes; optax.adam(..., mu_dtype=...) fixes the moments'",
        )
