"""Which optimizer trains which leaves: the optimizers of a plan, and every `nnx.Optimizer` among the objects."""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import make_leaf
from statewise._src.common.paths import Leaf, Path, format_path, plain_key
from statewise._src.filters.combinators import predicate
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.tables import OPTIMIZER
from statewise.errors import FilterError

__all__ = ["Training", "label_of", "trainings"]


class Training(NamedTuple):
    """One optimizer.

    Attributes:
      label: its description at the start of a sentence: by the kinds that it updates, or by its path.
      kinds: the kinds that it updates; empty for an `nnx.Optimizer`.
      trained: the leaves that it updates, each with its path in the optimizer's state.
      moments: its state, a row for each array.
      orphans: moments of leaves that the model does not have.
      overwrites: whether it stores the gradients as new values.
    """

    label: str
    kinds: tuple[str, ...]
    trained: dict[int, Path]
    moments: tuple[Leaf, ...]
    orphans: tuple[Leaf, ...] = ()
    overwrites: bool = False


def trainings(subject: Subject) -> list[Training]:
    """Returns every optimizer of a subject."""
    if subject.trainings is None:
        subject.trainings = [
            *(_of_object(subject, path, optimizer) for path, optimizer in subject.nodes_of(nnx.Optimizer)),
            *_of_plan(subject),
        ]
    return subject.trainings


def label_of(path: Path) -> str:
    """Returns the description of the `nnx.Optimizer` at a path."""
    return f"The nnx.Optimizer at {format_path(path)}" if path else "The nnx.Optimizer"


def _of_plan(subject: Subject) -> list[Training]:
    trainings = []
    for group in subject.plan.optimizers if subject.plan else ():
        trained = {number: subject.paths[number] for number, kind in enumerate(subject.claims) if kind in group.kinds}
        moments = tuple(
            make_leaf((OPTIMIZER, group.label, *path), jax.Array, [spec], True, OPTIMIZER)
            for path, spec in zip(group.layout.paths, group.layout.specs, strict=True)
        )
        label = f"The optimizer of {group.label}"
        trainings.append(Training(label, group.kinds, trained, moments, overwrites=group.overwrites))
    return trainings


def _of_object(subject: Subject, root: Path, optimizer: Any) -> Training:
    """Describes the `nnx.Optimizer` at a path.

    It has a filter, and its moments have the paths of the leaves that it updates, but it does not know the model.
    """
    paths, label = subject.paths, label_of(root)
    state = [number for number in subject.below(root) if issubclass(subject.types[number], nnx.OptState)]
    moments = subject.rows(state)
    # Only moments that are shaped like a parameter have its path: the end of their own, below the optimizer's.
    like = _of_parameters(subject, root, optimizer, state)
    depth = len(root) + 1
    tails = {number: [paths[number][start:] for start in range(depth, len(paths[number]))] for number in like}
    if not like and subject.graph.several and len(subject.objects) > 2:
        return Training(label, (), {}, moments)  # nothing says which of the models it updates
    candidates = _candidates(subject, root)
    updated = {tail for ends in tails.values() for tail in ends}
    try:
        matches = predicate(optimizer.wrt)
        trained = {
            number: path
            for number, path in candidates.items()
            if (not like or path in updated) and matches(path, subject.graph.leaves[number])
        }
    except FilterError:
        trained = {}
    known = set(candidates.values())
    orphans = [number for number, ends in tails.items() if known and known.isdisjoint(ends)]
    return Training(label, (), trained, moments, subject.rows(orphans))


def _of_parameters(subject: Subject, root: Path, optimizer: Any, state: Sequence[int]) -> list[int]:
    """Returns the moments that are shaped like a parameter."""
    # Flax marks them by their type, except those of hijax Variables, whose arrays are in an `nnx.State` all the same.
    places = jax.tree_util.tree_flatten_with_path(optimizer.opt_state, is_leaf=compat.is_nnx_state)[0]
    states = [(*root, "opt_state", *map(plain_key, keys)) for keys, value in places if compat.is_nnx_state(value)]
    return [
        number
        for number in state
        if subject.types[number].__name__ == "OptVariable"
        or any(subject.paths[number][: len(path)] == path for path in states)
    ]


def _candidates(subject: Subject, root: Path) -> dict[int, Path]:
    """Returns the leaves that the optimizer at a path may update, each with its path in its model.

    The model is beside the optimizer (`trainer.model`, or another of several objects), or in it (ModelAndOptimizer).
    """
    parent = root[:-1]
    candidates = {}
    for number in subject.below(parent):
        path = subject.paths[number]
        if issubclass(subject.types[number], nnx.OptState) or number in subject.averages:
            continue
        if path[: len(root)] == root:  # in the optimizer, under `model`
            if len(path) > len(root) + 1 and path[len(root)] == "model":
                candidates[number] = path[len(root) + 1 :]
        elif len(path) > len(parent) + 1:  # beside it: the first key below the parent is the model's
            candidates[number] = path[len(parent) + 1 :]
    return candidates
