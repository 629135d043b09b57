"""The data of a state: the tables of its plan, and one part for each kind.

A part is a tuple of arrays.  States share parts: a step that writes one kind makes a new part for it and passes on the
others unchanged, and `replace` combines one set of weights with many caches.  When a step donates arrays of a part, the
part is marked *donated*; whichever state is used next with it then raises an error that names the step, instead of
failing deep inside the runtime.

As a pytree a state has one leaf for each array, keyed by kind and path, and its tables as the static part.  JAX may put
anything there (tracers, axes, shapes, shardings): nothing is checked when a state is unflattened, and everything when a
step is traced with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax

from statewise._src.common import compat
from statewise._src.common.nnx_graph import any_is_deleted
from statewise._src.common.paths import Leaf, format_path
from statewise._src.core.batches import misfit_error, misfits
from statewise._src.core.part import Part
from statewise._src.core.versions import Seen, settle
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.part_shardings import PartShardings
from statewise.errors import StructureError

__all__ = [
    "StateData",
    "StateT",
    "check_fits",
    "check_not_donated",
    "check_unshared",
    "deleted_kinds",
    "donated_error",
    "kind_arrays",
    "kind_places",
    "mesh_of",
    "register",
    "with_arrays",
]


class StateData:
    """The tables of a plan with its arrays: the form of a state that every module below the public `State` uses.

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


# A function from states to states returns the class that it was given: a user's `State` remains a `State`.
StateT = TypeVar("StateT", bound=StateData)


def kind_arrays(state: StateData, kinds: Iterable[str]) -> list[tuple[Any, ...]]:
    """Returns the arrays of some kinds."""
    return [state.part(kind).arrays for kind in kinds]


def kind_places(state: StateData, kinds: Iterable[str]) -> tuple[PartShardings | None, ...]:
    """Returns the shardings of some kinds' arrays."""
    return tuple([state.part(kind).places() for kind in kinds])


def mesh_of(places: Iterable[PartShardings | None]) -> jax.sharding.Mesh | None:
    """Returns the mesh that some parts are on; None if they are on none, or are being traced."""
    shardings = (sharding for place in places if place is not None for sharding in place.shardings)
    return next((sharding.mesh for sharding in shardings if sharding is not None), None)


def with_arrays(
    state: StateT,
    arrays: Mapping[str, Iterable[Any]],
    plan: PlanTables | None = None,
    *,
    fresh: Collection[str] = (),
    seen: Mapping[str, Seen] | None = None,
) -> StateT:
    """Returns a state with other arrays for some kinds; it shares the parts of all other kinds.

    Args:
      state: the state; it does not change.
      arrays: for each of these kinds, what its part stores.
      plan: the plan of the new state, with the same kinds, if it is another one.
      fresh: those of the kinds that were not made from the state's own values of them.
      seen: what is known of the arrays of fresh kinds, if they were in a state before.
    """
    parts = [
        Part(tuple(arrays[kind])) if kind in arrays else part
        for kind, part in zip(state.tables.kinds, state.parts, strict=True)
    ]
    tables = plan or state.tables
    settle(tables, state.parts, parts, fresh, seen)
    return state.make(tables, parts)


def register(cls: type[StateData]) -> None:
    """Registers a class of states as a pytree: arrays keyed by kind and path, the tables static."""

    def flatten(data: StateData) -> tuple[tuple[Any, ...], PlanTables]:
        return tuple(itertools.chain.from_iterable(part.arrays for part in data.parts)), data.tables

    def flatten_with_keys(data: StateData) -> tuple[list[tuple[Any, Any]], PlanTables]:
        children, tables = flatten(data)
        return list(zip(tables.slot_keys, children, strict=True)), tables

    def unflatten(tables: PlanTables, children: Iterable[Any]) -> StateData:
        # JAX may pass anything as children, so nothing is checked; `islice` cuts them at the sizes of the parts.
        arrays = iter(children)
        return cls.make(tables, [Part(tuple(itertools.islice(arrays, size))) for size in tables.sizes])

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


register(StateData)


# --- checks ----------------------------------------------------------------------------------------------------


def check_not_donated(state: StateData, kinds: Iterable[str]) -> None:
    """Checks that no array of these kinds was donated."""
    # Arrays may also have been donated behind a part's back: by the user's own jit, or in a copy of the pytree.
    donated = [kind for kind in kinds if state.part(kind).donated_by or any_is_deleted(state.part(kind).arrays)]
    if donated:
        raise donated_error(state, donated)


def donated_error(state: StateData, kinds: Sequence[str]) -> StructureError:
    """Returns the error for a state that is used after its arrays were donated."""
    by = next((state.part(kind).donated_by for kind in kinds if state.part(kind).donated_by), None) or "a step"
    return StructureError(
        f"This state was donated: {by} has donated its {', '.join(kinds)}.",
        kind=kinds[0],
        hint="use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)",
    )


def deleted_kinds(state: StateData) -> list[str]:
    """Returns the kinds with arrays that no longer exist."""
    return [kind for kind, part in zip(state.tables.kinds, state.parts, strict=True) if any_is_deleted(part.arrays)]


def check_fits(state: StateData, kinds: Iterable[str], hint: str | None = None) -> None:
    """Checks that the arrays of these kinds have the plan's shapes and dtypes (inside `jax.vmap` they may not)."""
    leaves = misfits(state.tables, {kind: state.part(kind).arrays for kind in kinds})
    if leaves:
        parts = {kind: state.part(kind).arrays for kind in state.tables.kinds}
        raise misfit_error(state.tables, parts, leaves, hint)


def check_unshared(state: StateData) -> None:
    """Checks that no array belongs to two leaves: a step that writes both would donate it twice."""
    # Parts remember the identities of their arrays, so a state whose parts were checked before costs one union.
    sets = [part.ids() for part in state.parts]
    if len(set().union(*sets)) == sum(len(part.arrays) for part in state.parts):
        return
    seen: dict[int, Leaf] = {}
    for kind, part in zip(state.tables.kinds, state.parts, strict=True):
        for slot, array in zip(state.tables.stored[kind], part.arrays, strict=True):
            # A state may hold other objects (axes, None), and those may well be one object.
            if not isinstance(array, jax.Array) or isinstance(array, compat.Tracer):
                continue
            if id(array) in seen:
                leaves = [seen[id(array)], slot.leaf]
                names = " and ".join(format_path(leaf.path) for leaf in leaves)
                raise StructureError(
                    f"{names} share one array, so a step could not write them separately.",
                    leaves=leaves,
                    kind=kind,
                    hint="give one of them a copy: jax.tree.map(jnp.copy, part)",
                )
            seen[id(array)] = slot.leaf
