"""What `sw.diff` compares: models, states, plans and checkpoints as one thing, `Side`; and the arrays of two of them.

A side knows its leaves as records, without having read an array, and reads a few leaves at a time when it is asked to.
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

from statewise._src.checkpoint.format.keys import PathId, path_id
from statewise._src.checkpoint.format.load import read_arrays
from statewise._src.checkpoint.format.locate import find_with_base
from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
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

# Elements at a time: their differences, in double precision, fit a core's cache.
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two things that are compared.

    Attributes:
      name: what it is, in words; of a checkpoint its path.
      records: its leaves, by the text of their paths.
      kinds: the kinds that it declares, in order, each with whether it holds that kind's leaves.
      on_disk: whether it is a checkpoint.
      read: reads leaves, given by their records: for each its arrays on the host, or None where there are no values.
    """

    name: str
    records: Mapping[PathId, LeafRecord]
    kinds: Mapping[str, bool]
    on_disk: bool
    read: Callable[[Sequence[LeafRecord]], list[Arrays]]

    @functools.cached_property
    def tied(self) -> dict[PathId, LeafRecord]:
        """The leaves by the texts of their other paths."""
        return {path_id(alias): leaf for leaf in self.records.values() for alias in leaf.aliases}


def is_path(thing: Any) -> bool:
    """Whether something is a path: text, or an object that stands for one."""
    return isinstance(thing, (str, os.PathLike))


def side_of(thing: Any, kinds: Mapping[str, Kind]) -> Side:
    """Looks at a model, a state, a plan, or a checkpoint on disk.

    Args:
      thing: one of these; of several objects that are planned together, a tuple or list.
      kinds: the kinds to plan a model by.

    Raises:
      RestoreError: there is no such checkpoint, or not its base.
      CorruptedError: a manifest that is not what was written.
      StructureError: a state that was donated or being traced; a model that is none, or whose arrays are gone.
      UnclaimedError: leaves of a model that no kind claims.
      OverlapError: leaves of a model that several kinds claim.
    """
    if is_path(thing):
        return _on_disk(thing)
    if isinstance(thing, State):
        return _of_state(thing, "a state")
    if isinstance(thing, Plan):
        return _of_state(thing.abstract(), "a plan")
    return _of_model(thing, kinds)


def _on_disk(path: Any) -> Side:
    folders, manifests = find_with_base(path)
    own = manifests[0]
    kinds = {name: kind.saved for name, kind in own.kinds.items()}
    held: dict[PathId, tuple[int, LeafRecord]] = {}
    for number, manifest in reversed(list(enumerate(manifests))):
        lent = [leaf for leaf in manifest.leaves if number == 0 or not kinds.get(leaf.kind)]
        held |= {leaf.id: (number, leaf) for leaf in lent}
    kinds |= {leaf.kind: True for _, leaf in held.values()}
    checked: set[int] = set()

    def read(records: Sequence[LeafRecord]) -> list[Arrays]:
        found: dict[PathId, Arrays] = {}
        for number, (folder, manifest) in enumerate(zip(folders, manifests, strict=True)):
            mine = [record for record in records if held[record.id][0] == number]
            arrays = _from_disk(folder, manifest, mine, files_checked=number in checked)
            checked.add(number)
            found |= {record.id: one for record, one in zip(mine, arrays, strict=True)}
        return [found[record.id] for record in records]

    return Side(str(path), {name: leaf for name, (_, leaf) in held.items()}, kinds, True, read)


def _from_disk(folder: Any, manifest: Manifest, records: Sequence[LeafRecord], *, files_checked: bool) -> list[Arrays]:
    wanted = [(record, [None] * len(record.arrays)) for record in records]
    read = read_arrays(folder, manifest, wanted, files_checked=files_checked) if wanted else []
    return [[_on_host(array) for array in arrays] for arrays in read]


def _on_host(array: Any) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def _held(plan: PlanTables) -> dict[str, bool]:
    """Of each kind, whether a checkpoint of this plan would hold it."""
    return {name: kind.saved for name, kind in plan.kinds.items()}


def _of_state(state: State, name: str) -> Side:
    check_untraced(jax.tree.leaves(state), "compare", "return the state from the function, and compare what comes back")
    check_not_donated(state, state.tables.kinds)
    check_fits(state, state.tables.kinds)
    placed = {record.id: (record, start) for record, start in records_of(state.tables)}
    parts: dict[str, tuple[Any, ...]] = {}

    def arrays(record: LeafRecord) -> Arrays:
        if is_abstract(state.part(record.kind).arrays):
            return None
        if record.kind not in parts:
            parts[record.kind] = unpacked(state, record.kind)
        start = placed[record.id][1]
        return [_on_host(array) for array in parts[record.kind][start : start + len(record.arrays)]]

    records = {identity: record for identity, (record, _) in placed.items()}
    return Side(name, records, _held(state.tables), False, lambda asked: list(map(arrays, asked)))


def _of_model(model: Any, kinds: Mapping[str, Kind]) -> Side:
    """A model as it is: planned, but nothing taken out of it or copied."""
    objects = tuple(model) if isinstance(model, (tuple, list)) else (model,)
    plan = resolve_plan(kinds, objects)
    found = read_graph(objects)
    live = dict(zip(found.paths, found.leaves, strict=True))
    check_model_arrays(
        ((record.leaf(), _values(live[record.path])) for record, _ in records_of(plan)),
        "compare",
        abstract=None,  # it is compared without values
        donated="plan.put(state, model) gives it those of now; or compare the state",
    )

    def arrays(record: LeafRecord) -> Arrays:
        values = _values(live[record.path])
        if is_abstract(values) or is_traced(values):
            return None
        return list(map(_as_taken, values))

    names = " and ".join(type(thing).__name__ for thing in objects)
    records = {record.id: record for record, _ in records_of(plan)}
    return Side(f"a model ({names})", records, _held(plan), False, lambda asked: list(map(arrays, asked)))


def _as_taken(value: Any) -> np.ndarray:
    """A value as a state would have it; as it is, where JAX would lose numbers of it."""
    lost: list[Leaf] = []
    made = as_jax(Leaf((), None, type(value), None, None), value, lost)
    return np.asarray(value) if lost else _on_host(made)


def _values(leaf: Any) -> list[Any]:
    return arrays_of(raw_value(leaf))[0]


# --- two arrays --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """How the values of two leaves differ.

    Attributes:
      elements: how many elements differ; NaN is the same as NaN, and 0.0 as -0.0.
      largest: the largest absolute difference; `nan` where one of the two alone is NaN.
    """

    elements: int = 0
    largest: float = 0.0

    def __or__(self, other: Change) -> Change:
        return Change(self.elements + other.elements, float(np.maximum(self.largest, other.largest)))


def compare(one: np.ndarray, other: np.ndarray) -> Change:
    """Compares two arrays of one shape, of whatever dtypes, a piece at a time."""
    change, one, other = Change(), one.reshape(-1), other.reshape(-1)
    for start in range(0, one.size, _CHUNK):
        change |= _compare(_wide(one[start : start + _CHUNK]), _wide(other[start : start + _CHUNK]))
    return change


def _wide(array: np.ndarray) -> np.ndarray:
    """The same numbers in a dtype that NumPy knows, the widest of its family."""
    if array.dtype in (np.int64, np.uint64):
        return array
    if array.dtype == np.bool_ or jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(np.int64)
    return array.astype(np.complex128 if jnp.issubdtype(array.dtype, jnp.complexfloating) else np.float64)


def _compare(one: np.ndarray, other: np.ndarray) -> Change:
    differs = one != other
    if one.dtype.kind not in "iu" or other.dtype.kind not in "iu":
        differs &= ~(np.isnan(one) & np.isnan(other))
    if not differs.any():
        return Change()
    one, other = one[differs], other[differs]
    if one.dtype == other.dtype and one.dtype.kind in "iu":
        # Without sign the difference of two integers always fits, and is right modulo 2**64.
        gaps: np.ndarray = np.maximum(one, other).astype(np.uint64) - np.minimum(one, other).astype(np.uint64)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = np.abs(one.astype(_float(one)) - other.astype(_float(other)))
    return Change(one.size, float(gaps.max()))


def _float(array: np.ndarray) -> Any:
    return np.float64 if array.dtype.kind in "iu" else array.dtype
