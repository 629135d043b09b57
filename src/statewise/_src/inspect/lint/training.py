"""What trains what: the optimizers of a plan, and every `nnx.Optimizer` among the objects."""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from typing import Any, NamedTuple

import jax
from flax import nnx

from statewise._src.common.nnx_graph import make_leaf
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.filters.combinators import predicate
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.tables import OPTIMIZER
from statewise.errors import FilterError

__all__ = ["Training", "trainings"]


class Training(NamedTuple):
    """One optimizer.

    Attributes:
      label: what to call it at the start of a sentence: by the kinds that it updates, or by its path.
      kinds: the kinds that it updates; empty for an `nnx.Optimizer`.
      trained: the leaves that it updates, each with its path in the optimizer's state.
      moments: its state, a row for each array.
      orphans: moments of leaves that the model does not have.
    """

    label: str
    kinds: tuple[str, ...]
    trained: dict[int, Path]
    moments: tuple[Leaf, ...]
    orphans: tuple[Leaf, ...] = ()


def trainings(subject: Subject) -> list[Training]:
    """Every optimizer of a subject."""
    if subject.trainings is None:
        subject.trainings = _found(subject)
    return subject.trainings


def _found(subject: Subject) -> list[Training]:
    found = [_of_object(subject, path, node) for path, node in _optimizers(subject)]
    for group in subject.plan.optimizers if subject.plan else ():
        trained = {
            number: subject.found.paths[number] for number, kind in enumerate(subject.claims) if kind in group.kinds
        }
        moments = tuple(
            make_leaf((OPTIMIZER, group.label, *path), jax.Array, [spec], True, OPTIMIZER)
            for path, spec in zip(group.layout.paths, group.layout.specs, strict=True)
        )
        found.append(Training(f"The optimizer of {group.label}", group.kinds, trained, moments))
    return found


def _optimizers(subject: Subject) -> list[tuple[Path, Any]]:
    if not subject.has(nnx.Optimizer):
        return []
    return [(path, node) for path, node in subject.nodes if isinstance(node, nnx.Optimizer)]


def _of_object(subject: Subject, at: Path, optimizer: Any) -> Training:
    """An `nnx.Optimizer`: it knows a filter, and by its moments the paths of what it updates, but not the model."""
    paths, several = subject.found.paths, subject.found.several
    label = f"The nnx.Optimizer at {format_path(at)}" if at else "The nnx.Optimizer"
    state = [number for number in subject.below(at) if issubclass(subject.types[number], nnx.OptState)]
    moments = subject.rows(state)
    # Its model stands beside it (`trainer.model`, or another of several objects), or in it (ModelAndOptimizer).
    parent = at[:-1]
    beside = len(parent) + 1
    candidates = {}
    for number in subject.below(parent):
        path = paths[number]
        inside = path[: len(at)] == at
        if issubclass(subject.types[number], nnx.OptState) or number in subject.averages:
            continue
        if len(path) > len(at) + 1 and inside and path[len(at)] == "model":
            candidates[number] = path[len(at) + 1 :]
        elif len(path) > beside and not inside:
            candidates[number] = path[beside:]
    # Only moments that are shaped like a parameter carry its path.
    depth = len(at) + 1
    like = [number for number in state if subject.types[number].__name__ == "OptVariable"]
    tails = {paths[number][start:] for number in like for start in range(depth, len(paths[number]))}
    if not like and several and len(subject.objects) > 2:
        return Training(label, (), {}, moments)  # which of the models it updates, nothing tells
    try:
        matches = predicate(optimizer.wrt)
        trained = {
            number: path
            for number, path in candidates.items()
            if (not like or path in tails) and matches(path, subject.found.leaves[number])
        }
    except FilterError:
        trained = {}
    known = set(candidates.values())
    orphans = [
        number
        for number in like
        if candidates and not any(paths[number][start:] in known for start in range(depth, len(paths[number])))
    ]
    return Training(label, (), trained, moments, subject.rows(orphans))
