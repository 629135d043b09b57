"""The two sides of `sw.diff`: models, states, plans and checkpoints as a `Side`; and the comparison of two arrays.

A side has its leaves as records, without reading an array, and reads a few leaves at a time on request.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.checkpoint.format.keys import PathId, path_id, words_of
from statewise._src.checkpoint.format.load import read_leaves
from statewise._src.checkpoint.format.locate import find_with_base, leaves_with_base
from statewise._src.checkpoint.format.manifest import LeafRecord
from statewise._src.checkpoint.format.records import records_of, unpacked
from statewise._src.common.narrowing import as_jax
from statewise._src.common.nnx_graph import arrays_of, is_abstract, is_traced, raw_value, read_graph
from statewise._src.common.paths import Leaf
from statewise._src.core.plan import Plan, State
from statewise._src.core.state_data import check_fits, check_not_donated
from statewise._src.core.usable import check_model_arrays, check_untraced
from statewise._src.plan.kind import Kind
from statewise._src.plan.resolve import resolve_plan
from statewise._src.plan.tables import PlanTables

__all__ = ["Arrays", "Change", "Side", "compare", "is_path", "side_of"]

Arrays = list[Any] | None

# The number of elements per step: their differences, in double precision, fit a core's cache.
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two things that are compared.

    Attributes:
      name: what it is, in words; for a checkpoint its path.
      records: its leaves, by the ids of their paths.
      kinds: the kinds that it declares, in order, each with whether it has that kind's leaves.
      on_disk: whether it is a checkpoint.
      read: reads leaves, given by their records: for each its arrays on the host, or None if there are no values.
    """

    name: str
    records: Mapping[PathId, LeafRecord]
    kinds: Mapping[str, bool]
    on_disk: bool
    read: Callable[[Sequence[LeafRecord]], list[Arrays]]

    @functools.cached_property
    def tied(self) -> dict[PathId, LeafRecord]:
        """Returns the leaves by the ids of their other paths."""
        return {path_id(alias): leaf for leaf in self.records.values() for alias in leaf.aliases}


def is_path(source: object) -> bool:
    """Returns whether something is a path: text, or an object that stands for one."""
    return isinstance(source, (str, os.PathLike))


def side_of(source: object, kinds: Mapping[str, Kind]) -> Side:
    """Makes the side of a model, a state, a plan, or a checkpoint on disk.

    Args:
      source: one of these; for several objects that are planned together, a tuple or list.
      kinds: the kinds to plan a model by.

    Raises:
      RestoreError: there is no such checkpoint, or not its base.
      CorruptedError: a manifest is not what was written.
      StructureError: the state was donated or is being traced; the model is not one, or its arrays are gone.
      UnclaimedError: leaves of a model that no kind claims.
      OverlapError: leaves of a model that several kinds claim.
    """
    if is_path(source):
        return _on_disk(source)
    if isinstance(source, State):
        return _of_state(source, "a state")
    if isinstance(source, Plan):
        return _of_state(source.abstract(), "a plan")
    return _of_model(source, kinds)


def _on_disk(path: object) -> Side:
    folders, manifests = find_with_base(path)
    leaves = leaves_with_base(manifests)
    kinds = {name: kind.saved for name, kind in manifests[0].kinds.items()}
    kinds |= {leaf.kind: True for _, leaf in leaves.values()}  # also those that its base has
    checked = False

    def read(records: Sequence[LeafRecord]) -> list[Arrays]:
        nonlocal checked
        wanted = [(leaves[record.id][0], (record, [None] * len(record.arrays))) for record in records]
        arrays = read_leaves(folders, manifests, wanted, checked)
        checked = True  # the files are checked once, not for each batch
        return [list(map(words_of, of_leaf)) for of_leaf in arrays]

    return Side(str(path), {identity: leaf for identity, (_, leaf) in leaves.items()}, kinds, True, read)


def _saved(plan: PlanTables) -> dict[str, bool]:
    """Returns for each kind whether a checkpoint of this plan would have it."""
    return {name: kind.saved for name, kind in plan.kinds.items()}


def _of_state(state: State, name: str) -> Side:
    check_untraced(jax.tree.leaves(state), "compare", "return the state from the function, and compare what comes back")
    check_not_donated(state, state.tables.kinds)
    check_fits(state, state.tables.kinds)
    placed = {record.id: (record, start) for record, start in records_of(state.tables)}

    @functools.cache  # once for each kind, and not for each of its leaves
    def part(kind: str) -> Sequence[Any] | None:
        return None if is_abstract(state.part(kind).arrays) else unpacked(state, kind)

    def arrays(record: LeafRecord) -> Arrays:
        own, start = part(record.kind), placed[record.id][1]
        return None if own is None else list(map(words_of, own[start : start + len(record.arrays)]))

    records = {identity: record for identity, (record, _) in placed.items()}
    return Side(name, records, _saved(state.tables), False, lambda asked: list(map(arrays, asked)))


def _of_model(model: Any, kinds: Mapping[str, Kind]) -> Side:
    """Makes the side of a model as it is: it is planned, but nothing is taken from it or copied."""
    objects = tuple(model) if isinstance(model, (tuple, list)) else (model,)
    plan = resolve_plan(kinds, objects)
    graph = read_graph(objects)
    live = dict(zip(graph.paths, graph.leaves, strict=True))
    check_model_arrays(
        ((record.leaf(), _values(live[record.path])) for record, _ in records_of(plan)),
        "compare",
        abstract=None,  # an abstract model is compared without values
        donated="plan.put(state, model) gives it the present arrays; or compare the state",
    )

    def arrays(record: LeafRecord) -> Arrays:
        values = _values(live[record.path])
        if is_abstract(values) or is_traced(values):
            return None
        return list(map(_as_taken, values))

    names = " and ".join(type(source).__name__ for source in objects)
    records = {record.id: record for record, _ in records_of(plan)}
    return Side(f"a model ({names})", records, _saved(plan), False, lambda asked: list(map(arrays, asked)))


def _as_taken(value: Any) -> np.ndarray:
    """Returns a value as a state would have it; unchanged if JAX would lose numbers."""
    lost: list[Leaf] = []
    array = as_jax(Leaf((), None, type(value), None, None), value, lost)
    return np.asarray(value) if lost else words_of(array)


def _values(leaf: Any) -> list[Any]:
    return arrays_of(raw_value(leaf))[0]


# --- two arrays --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """How the values of two leaves differ.

    Attributes:
      elements: how many elements differ; NaN is the same as NaN, and 0.0 as -0.0.
      largest: the largest absolute difference; `nan` if only one of the two is NaN.
    """

    elements: int = 0
    largest: float = 0.0

    def __or__(self, other: Change) -> Change:
        return Change(self.elements + other.elements, float(np.maximum(self.largest, other.largest)))


def compare(one: np.ndarray, other: np.ndarray) -> Change:
    """Compares two arrays of the same shape and any dtypes, a piece at a time."""
    change, one, other = Change(), one.reshape(-1), other.reshape(-1)
    for start in range(0, one.size, _CHUNK):
        change |= _compare(_wide(one[start : start + _CHUNK]), _wide(other[start : start + _CHUNK]))
    return change


def _wide(array: np.ndarray) -> np.ndarray:
    """Returns the same numbers in a dtype of NumPy's, the widest of its family."""
    if array.dtype in (np.int64, np.uint64):
        return array
    if array.dtype == np.bool_ or jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(np.int64)
    return array.astype(np.complex128 if jnp.issubdtype(array.dtype, jnp.complexfloating) else np.float64)


def _compare(one: np.ndarray, other: np.ndarray) -> Change:
    differs = one != other
    if one.dtype.kind not in "iu" or other.dtype.kind not in "iu":
        differs &= ~(np.isnan(one) & np.isnan(other))  # NaN is not equal to itself
    if not differs.any():
        return Change()
    one, other = one[differs], other[differs]
    if one.dtype == other.dtype and one.dtype.kind in "iu":
        # As an unsigned number the difference of two integers always fits; it is right modulo 2**64.
        gaps: np.ndarray = np.maximum(one, other).astype(np.uint64) - np.minimum(one, other).astype(np.uint64)
    else:
        wide = np.result_type(one, other, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = np.abs(one.astype(wide) - other.astype(wide))
    return Change(one.size, float(gaps.max()))
