"""The rows of a plan: what it knows of each leaf, and which leaves get none.

A row is static: path, kind, type, and the shapes and dtypes of the arrays in the leaf's value.  Leaves that an
earlier `sow` left in the model get no row, and leaves that hold neither arrays nor numbers are refused.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from statewise._src.common import compat
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
    kinds: Mapping[str, Kind], objects: Sequence[Any], found: ModelGraph, claims: list[str]
) -> tuple[ModelGraph, list[str], tuple[Leaf, ...]]:
    """Takes what an earlier `sow` left in the model out of the plan: a step would find it there, and add to it."""
    paths = _sown(kinds, found, claims, objects)
    if not paths:
        return found, claims, ()
    dropped = tuple(
        row_of(path, leaf, kind)
        for path, leaf, kind in zip(found.paths, found.leaves, claims, strict=True)
        if path in paths
    )
    copies = rebuild(found.graphdef, [raw_value(leaf) for leaf in found.leaves], found.several)
    while paths:  # what other paths reach too is still there, at the next of them
        sown = frozenset(map(found.numbered, paths))
        nnx.pop(copies if found.several else copies[0], lambda path, _, sown=sown: tuple(path) in sown)
        found = read_graph(copies, found.names)
        claims = claim(kinds, found, there=False)  # a kind all of whose leaves were sown has claimed them before
        paths = _sown(kinds, found, claims, copies)
    return found, claims, dropped


def _sown(
    kinds: Mapping[str, Kind], found: ModelGraph, claims: Sequence[str], objects: Sequence[Any]
) -> frozenset[Path]:
    """The paths of ephemeral leaves that `sow` made: it makes attributes of modules, never items of a list."""
    ephemeral = {name for name, kind in kinds.items() if not kind.saved}
    paths = [
        path
        for path, leaf, kind in zip(found.paths, found.leaves, claims, strict=True)
        if kind in ephemeral and is_sown(compat.variable_type(leaf)) and isinstance(path[-1], str)
    ]
    if not paths:
        return frozenset()
    root: Any = tuple(objects) if found.several else objects[0]
    modules = {named(tuple(path), found.names) for path, _ in nnx.iter_modules(root)}
    return frozenset(path for path in paths if path[:-1] in modules)
