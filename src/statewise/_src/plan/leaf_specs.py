"""The rows of a plan: what it knows of each leaf, and which leaves get none.

A row is static: path, kind, type, and the shapes and dtypes of the arrays in the leaf's value.  Leaves that an
earlier `sow` left in the model get no row, and leaves that hold neither arrays nor numbers are refused.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.graphdef import read_tree
from statewise._src.common.nnx_graph import (
    ONE,
    ArraySpec,
    ModelGraph,
    arrays_of,
    named,
    raw_value,
    read_graph,
    rebuild,
    row_of,
    spec_of,
)
from statewise._src.common.paths import Leaf, Path
from statewise._src.plan.kind import Kind
from statewise._src.plan.match import claim
from statewise.errors import StructureError

__all__ = ["LeafSpec", "Span", "drop_sown", "is_sown", "rows_of"]


class LeafSpec(NamedTuple):
    """One leaf, static: what a plan knows of it.

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
    """Where a leaf's arrays stand within its kind's part of a state."""

    kind: str
    start: int
    stop: int
    structure: Any


def rows_of(found: ModelGraph, claims: Sequence[str]) -> tuple[LeafSpec, ...]:
    """The rows of a plan.

    Raises:
      StructureError: leaves that hold something else than arrays and numbers, all of them.
    """
    rows, wrong = [], []
    for path, leaf, kind in zip(found.paths, found.leaves, claims, strict=True):
        arrays, structure = arrays_of(raw_value(leaf))
        first = spec_of(arrays[0]) if structure is ONE else None
        specs = (first,) if first else tuple(spec for spec in map(spec_of, arrays) if spec is not None)
        if len(specs) == len(arrays):
            rows.append(LeafSpec(path, kind, compat.variable_type(leaf), specs, structure))
        else:
            odd = next(array for array in arrays if spec_of(array) is None)
            wrong.append(row_of(path, leaf, kind, note=f"holds {type(odd).__name__}"))
    if wrong:
        raise StructureError(
            "Leaves that hold something else than arrays and numbers cannot be part of a state.",
            leaves=wrong,
            hint="keep it as a plain attribute of the module: self.name = value, without nnx.Variable or nnx.data",
        )
    return tuple(rows)


def is_sown(type_: type) -> bool:
    """Whether leaves of this type come from `sow`: they are new in every call, and no state keeps them."""
    return issubclass(type_, nnx.Intermediate) and not issubclass(type_, nnx.Perturbation)


def drop_sown(
    kinds: Mapping[str, Kind], objects: Sequence[Any], graph: ModelGraph, claims: list[str]
) -> tuple[ModelGraph, list[str], tuple[Leaf, ...]]:
    """Takes what an earlier `sow` left in the model out of the plan: a step would find it there, and add to it."""
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
    return remaining, [claims[number] for number in kept], _rows_at(graph, claims, sorted(sown))


def _candidates(kinds: Mapping[str, Kind], graph: ModelGraph, claims: Sequence[str]) -> list[int]:
    """Returns the ephemeral leaves that may come from `sow`: it makes attributes of modules, never items of a list."""
    ephemeral = {name for name, kind in kinds.items() if not kind.saved}
    return [
        number
        for number, (leaf, kind) in enumerate(zip(graph.leaves, claims, strict=True))
        if kind in ephemeral and is_sown(compat.variable_type(leaf)) and isinstance(graph.paths[number][-1], str)
    ]


def _rows_at(graph: ModelGraph, claims: Sequence[str], numbers: Sequence[int]) -> tuple[Leaf, ...]:
    return tuple(row_of(graph.paths[number], graph.leaves[number], claims[number]) for number in numbers)


def _drop_shared(
    kinds: Mapping[str, Kind], objects: Sequence[Any], graph: ModelGraph, claims: list[str]
) -> tuple[ModelGraph, list[str], tuple[Leaf, ...]]:
    """Does the same where several paths reach one object, by a copy of the objects: NNX tells what is then first."""
    paths = _sown(kinds, graph, claims, objects)
    if not paths:
        return graph, claims, ()
    dropped = _rows_at(graph, claims, [number for number, path in enumerate(graph.paths) if path in paths])
    copies = rebuild(graph.graphdef, [raw_value(leaf) for leaf in graph.leaves], graph.several)
    while paths:  # what other paths reach too is still there, at the next of them
        sown = frozenset(map(graph.numbered, paths))
        nnx.pop(copies if graph.several else copies[0], lambda path, _, sown=sown: tuple(path) in sown)
        graph = read_graph(copies, graph.names)
        claims = claim(kinds, graph, there=False)  # a kind all of whose leaves were sown has claimed them before
        paths = _sown(kinds, graph, claims, copies)
    return graph, claims, dropped


def _sown(
    kinds: Mapping[str, Kind], graph: ModelGraph, claims: Sequence[str], objects: Sequence[Any]
) -> frozenset[Path]:
    """Returns the paths of ephemeral leaves that `sow` made."""
    paths = [graph.paths[number] for number in _candidates(kinds, graph, claims)]
    if not paths:
        return frozenset()
    root: Any = tuple(objects) if graph.several else objects[0]
    modules = {named(tuple(path), graph.names) for path, _ in nnx.iter_modules(root)}
    return frozenset(path for path in paths if path[:-1] in modules)
