"""The data of a state: the tables of its plan, and one part for each kind.

A part is a tuple of arrays.  States share parts: a step that writes one kind makes a new part for it and hands on the
others as they are, and `replace` puts one set of weights beside many caches.  When a step donates arrays of a part, the
part is marked *donated*; whichever state is used next with it says so, by name, instead of failing deep inside the
runtime.

As a pytree a state has one leaf for each array, keyed by kind and path, and its tables as the static part.  JAX may put
anything there (tracers, axes, shapes, shardings): nothing is checked when a state is unflattened, and everything when a
step is traced with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Self, TypeVar

import jax

from statewise._src.common.nnx_graph import is_deleted
from statewise._src.common.paths import Leaf, format_path
from statewise._src.core.batches import misfits, unfitting
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import UNKNOWN, PartShardings, part_shardings_of
from statewise.errors import StructureError

__all__ = [
    "Part",
    "StateData",
    "StateT",
    "check_fits",
    "check_not_donated",
    "check_unshared",
    "deleted_kinds",
    "donated_error",
    "register",
]


class Part:
    """One kind's arrays, shared by the states that have them in common.

    Attributes:
      arrays: the arrays, in the order of the plan.
      donated_by: what donated some of them, in words; None while all are there.
      view: what `state[kind]` gives, once it was asked for.
      lie: where they lie on a mesh; `UNKNOWN` until `places` was asked.
    """

    __slots__ = ("_ids", "arrays", "donated_by", "lie", "view")

    def __init__(self, arrays: tuple[Any, ...], lie: PartShardings | None = UNKNOWN) -> None:
        self.arrays = arrays
        self.donated_by: str | None = None
        self.lie = lie
        self.view: Any = None
        self._ids: frozenset[int] | None = None

    def ids(self) -> frozenset[int]:
        """The identities of the arrays."""
        if self._ids is None:
            self._ids = frozenset(map(id, self.arrays))
        return self._ids

    def places(self) -> PartShardings | None:
        """Where the arrays lie on a mesh; None where none does."""
        if self.lie is UNKNOWN:
            self.lie = part_shardings_of(self.arrays)
        return self.lie


class StateData:
    """The tables of a plan with its arrays: what every module below the public `State` takes and returns.

    Attributes:
      tables: the tables of the plan.
      parts: one part for each kind, in the order of the tables.
    """

    __slots__ = ("__weakref__", "parts", "tables")

    tables: PlanTables
    parts: list[Part]

    @classmethod
    def make(cls, tables: PlanTables, parts: list[Part]) -> Self:
        """Returns a state of these parts; nothing is checked."""
        data = object.__new__(cls)
        data.tables = tables
        data.parts = parts
        return data

    @classmethod
    def of(cls, tables: PlanTables, parts: Iterable[Iterable[Any]]) -> Self:
        """Returns a state of the arrays of each kind, in the order of the plan; nothing is checked."""
        return cls.make(tables, [Part(tuple(part)) for part in parts])

    @classmethod
    def wrap(cls, data: StateData) -> Self:
        """Returns the data of another state as one of this class."""
        return cls.make(data.tables, data.parts)

    def part(self, kind: str) -> Part:
        """Returns one kind's part."""
        index = self.tables.kind_index.get(kind)
        if index is None:
            raise unknown_kind(kind, self.tables.kinds)
        return self.parts[index]


# A function from states to states gives back the class that it was given: what users hold stays what users hold.
StateT = TypeVar("StateT", bound=StateData)


def register(cls: type[StateData]) -> None:
    """Registers a class of states as a pytree: arrays keyed by kind and path, the tables static."""

    def flatten(data: StateData) -> tuple[tuple[Any, ...], PlanTables]:
        return tuple(itertools.chain.from_iterable(part.arrays for part in data.parts)), data.tables

    def flatten_with_keys(data: StateData) -> tuple[list[tuple[Any, Any]], PlanTables]:
        children, tables = flatten(data)
        return list(zip(tables.slot_keys, children, strict=True)), tables

    def unflatten(tables: PlanTables, children: Iterable[Any]) -> StateData:
        arrays = iter(children)
        return cls.make(tables, [Part(tuple(itertools.islice(arrays, size))) for size in tables.sizes])

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


register(StateData)


# --- what can be wrong with a state ----------------------------------------------------------------------------


def check_not_donated(state: StateData, kinds: Iterable[str]) -> None:
    """Raises where a kind's arrays were donated."""
    # Arrays may also have been donated behind a part's back: by the user's own jit, or in a copy of the pytree.
    donated = [kind for kind in kinds if state.part(kind).donated_by or any(map(is_deleted, state.part(kind).arrays))]
    if donated:
        raise donated_error(state, donated)


def donated_error(state: StateData, kinds: Sequence[str]) -> StructureError:
    """The error for a state that is used after its arrays were donated."""
    by = next((state.part(kind).donated_by for kind in kinds if state.part(kind).donated_by), None) or "a step"
    names = ", ".join(kinds)
    return StructureError(
        f"This state was donated: {by} has donated its {names}.",
        kind=kinds[0],
        hint="use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)",
    )


def deleted_kinds(state: StateData) -> list[str]:
    """The kinds with arrays that are no longer there."""
    return [
        kind for kind, part in zip(state.tables.kinds, state.parts, strict=True) if any(map(is_deleted, part.arrays))
    ]


def check_fits(state: StateData, kinds: Iterable[str], hint: str | None = None) -> None:
    """Raises where a kind's arrays have not the shapes and dtypes of the plan (as inside `jax.vmap`, or after it)."""
    odd = misfits(state.tables, {kind: state.part(kind).arrays for kind in kinds})
    if odd:
        raise unfitting(state.tables, {kind: state.part(kind).arrays for kind in state.tables.kinds}, odd, hint)


def check_unshared(state: StateData) -> None:
    """Raises where one array stands in two leaves: a step that writes both would donate it twice."""
    sets = [part.ids() for part in state.parts]
    if len(set().union(*sets)) == sum(len(part.arrays) for part in state.parts):
        return
    seen: dict[int, tuple[str, int]] = {}
    for kind, part in zip(state.tables.kinds, state.parts, strict=True):
        for position, array in enumerate(part.arrays):
            if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
                continue
            other = seen.setdefault(id(array), (kind, position))
            if other != (kind, position):
                rows = state.tables.leaf_of_slot
                _raise_shared(rows[kind][position], rows[other[0]][other[1]])


def _raise_shared(one: Leaf, other: Leaf) -> None:
    raise StructureError(
        f"{format_path(other.path)} and {format_path(one.path)} share one array; a step could not write them apart.",
        leaves=[other, one],
        kind=one.kind,
        hint="give one of them a copy: jax.tree.map(jnp.copy, part)",
    )
