"""The rows of a plan: what it knows about each leaf, and which leaves get no row.

A row is static: path, kind, type, and the shapes and dtypes of the arrays in the leaf's value.  Leaves that an earlier
`sow` left in the model get no row, and leaves that hold something other than arrays and numbers are an error.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.graphdef import read_tree
from statewise._src.common.nnx_graph import (
    ONE,
    ArraySpec,
    ModelGraph,
    named,
    numbered,
    raw_value,
    read_graph,
    row_of,
    specs_of,
)
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.problems import Problems
from statewise._src.common.variable_forms import hijax_brought_back, hijax_set_aside
from statewise._src.plan.kind import Kind
from statewise._src.plan.match import claim
from statewise.errors import StructureError

__all__ = ["LeafSpec", "Span", "drop_sown", "is_sown", "rows_of"]


class LeafSpec(NamedTuple):
    """The static facts that a plan knows about one leaf.

    Attributes:
      path: its first path.
      kind: the name of its kind.
      type: the Variable's type, `jax.Array` for a raw array.
      specs: shape and dtype of each array in its value; one for nearly every leaf.
      structure: the structure of its value.
    """

    path: Path
    kind: str
    type: type
    specs: tuple[ArraySpec, ...]
    structure: Any


class Span(NamedTuple):
    """The positions of a leaf's arrays within its kind."""

    kind: str
    start: int
    stop: int
    structure: Any


def rows_of(graph: ModelGraph, claims: Sequence[str]) -> tuple[LeafSpec, ...]:
    """Returns the rows of a plan.

    Raises:
      StructureError: leaves that hold something other than arrays and numbers; lists all of them.
    """
    rows = []
    problems = Problems()
    for path, leaf, kind in zip(graph.paths, graph.leaves, claims, strict=True):
        # As `facts_of` does, but a Variable is recognized once: this loop takes most of the time of a plan.
        is_variable = compat.is_variable(leaf)
        specs, structure = specs_of(leaf.get_raw_value() if is_variable else leaf)
        if structure is not ONE or isinstance(specs[0], type):
            wrong = [spec for spec in specs if isinstance(spec, type)]
            if wrong:
                problems.add(row_of(path, leaf, kind), f"holds {wrong[0].__name__}")
                continue
        type_: type = leaf.var_type if is_variable else jax.Array
        rows.append(LeafSpec(path, kind, type_, specs, structure))  # type: ignore[arg-type]
    problems.raise_as(
        StructureError,
        "Leaves that hold something other than arrays and numbers cannot be part of a state.",
        "keep it as a plain attribute of the module: self.name = value, without nnx.Variable or nnx.data",
    )
    return tuple(rows)


def is_sown(type_: type) -> bool:
    """Returns whether leaves of this type come from `sow`: every call makes new ones, and no state keeps them."""
    return issubclass(type_, nnx.Intermediate) and not issubclass(type_, nnx.Perturbation)


def drop_sown(
    kinds: Mapping[str, Kind], objects: Sequence[Any], graph: ModelGraph, claims: list[str]
) -> tuple[ModelGraph, list[str], tuple[Leaf, ...]]:
    """Removes what an earlier `sow` left in the model from what is planned: a step would find it, and add to it.

    Returns:
      the remaining graph, the kinds of its leaves, and the removed leaves.
    """
    candidates = _candidates(kinds, graph, claims)
    if not candidates:
        return graph, claims, ()
    tree = read_tree(graph.graphdef)
    if tree is None:
        return _drop_shared(kinds, objects, graph, claims)
    sown = {number for number in candidates if issubclass(tree.owner(number), nnx.Module)}
    kept = [number for number in range(len(graph.leaves)) if number not in sown]
    remaining = graph._replace(
        graphdef=tree.without(sown),
        paths=tuple(graph.paths[number] for number in kept),
        leaves=tuple(graph.leaves[number] for number in kept),
    )
    return remaining, [claims[number] for number in kept], _leaves_at(graph, claims, sorted(sown))


def _candidates(kinds: Mapping[str, Kind], graph: ModelGraph, claims: Sequence[str]) -> list[int]:
    """Returns the ephemeral leaves that may come from `sow`: it makes attributes of modules, never items of a list."""
    ephemeral = {name for name, kind in kinds.items() if not kind.saved}
    return [
        number
        for number, (leaf, kind) in enumerate(zip(graph.leaves, claims, strict=True))
        if kind in ephemeral and is_sown(compat.variable_type(leaf)) and isinstance(graph.paths[number][-1], str)
    ]


def _leaves_at(graph: ModelGraph, claims: Sequence[str], numbers: Sequence[int]) -> tuple[Leaf, ...]:
    return tuple(row_of(graph.paths[number], graph.leaves[number], claims[number]) for number in numbers)


def _drop_shared(
    kinds: Mapping[str, Kind], objects: Sequence[Any], graph: ModelGraph, claims: list[str]
) -> tuple[ModelGraph, list[str], tuple[Leaf, ...]]:
    """Does the same for a graph in which several paths reach one object.

    Without the removed leaves, the first path of another leaf may change, and only NNX knows how.  So they are removed
    from a copy of the objects, which NNX then flattens again.
    """
    paths = _sown(kinds, graph, claims, objects)
    if not paths:
        return graph, claims, ()
    dropped = _leaves_at(graph, claims, [number for number, path in enumerate(graph.paths) if path in paths])
    values = [raw_value(leaf) for leaf in graph.leaves]
    # `nnx.pop` does not know hijax Variables; those of `ref=True` hold arrays in the copies.
    objects = nnx.unflatten(hijax_set_aside(graph.graphdef), values)
    copies = tuple(objects) if graph.several else (objects,)
    while paths:  # `nnx.pop` removes one path of a leaf; if others reach it, it reappears at the next of them
        sown = frozenset(numbered(path, graph.names) for path in paths)
        nnx.pop(copies if graph.several else copies[0], lambda path, _, sown=sown: tuple(path) in sown)
        graph = read_graph(copies, graph.names)
        # The paths that kinds spell were checked before: a kind may have claimed nothing but sown leaves.
        claims = claim(kinds, graph, check_paths=False)
        paths = _sown(kinds, graph, claims, copies)
    return graph._replace(graphdef=hijax_brought_back(graph.graphdef)), claims, dropped


def _sown(
    kinds: Mapping[str, Kind], graph: ModelGraph, claims: Sequence[str], objects: Sequence[Any]
) -> frozenset[Path]:
    """Returns the paths of ephemeral leaves that come from `sow`."""
    paths = [graph.paths[number] for number in _candidates(kinds, graph, claims)]
    if not paths:
        return frozenset()
    root: Any = tuple(objects) if graph.several else objects[0]
    modules = {named(tuple(path), graph.names) for path, _ in nnx.iter_modules(root, graph=True)}
    return frozenset(path for path in paths if path[:-1] in modules)
