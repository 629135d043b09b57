"""Resolves the placements of a plan on a mesh: the sharding of each array, or everything that is wrong.

`placements` declares how a kind is placed on any mesh; here that is resolved for one, array by array.  Only the axes
of the mesh matter, so an abstract mesh without devices works too.

Optimizer state follows its parameters (see `array_placement`), unless the kind `optimizer` declares a placement.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.plan.derived import Derived, keys_within
from statewise._src.plan.per_device import PerDeviceArrays
from statewise._src.plan.placements import (
    PLACEMENTS,
    FromMetadata,
    PerDevice,
    Replicated,
    Sharded,
    axes_of,
    describe_placement,
)
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise._src.sharding.annotations import annotated, metadata_of
from statewise._src.sharding.array_placement import ArrayPlacement, Owners, follow
from statewise._src.sharding.ensembles import of_all_members, resolved_members
from statewise._src.sharding.mesh import axis_sizes, check_devices, describe_mesh, memories
from statewise.errors import PlacementError

__all__ = [
    "ArrayPlacement",
    "array_shardings",
    "axis_sizes",
    "check_devices",
    "copies_on",
    "describe_mesh",
    "on_mesh",
    "resolve",
    "slot_shardings",
    "with_copies",
]


# The placement of each array of each kind on a mesh.
Placed = Mapping[str, Sequence[ArrayPlacement]]


def slot_shardings(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> list[list[jax.NamedSharding]]:
    """Returns, for each kind, the sharding of each slot of its part; see `Plan.shardings`."""
    members = plan.ensemble
    if members is not None:
        placed = resolve(members.single, mesh)
    placed = resolve(plan, mesh) if placed is None else placed
    known: dict[ArrayPlacement, jax.NamedSharding] = {}
    slots = []
    for kind, contents in zip(plan.kinds, plan.slots, strict=True):
        packing = plan.packing.get(kind)
        if packing:
            _check_packed(plan if members is None else members.single, kind, placed[kind])
        placements = [placed[kind][slot if isinstance(slot, int) else slot.positions[0]] for slot in contents]
        # A buffer has one axis, whatever its arrays have.
        placements = [
            placement if isinstance(slot, int) else ArrayPlacement((), placement.memory)
            for placement, slot in zip(placements, contents, strict=True)
        ]
        if members is not None:
            specs = members.single.stored_specs[kind]
            placements = [
                of_all_members(members, *each) for each in zip(placements, plan.slot_axes[kind], specs, strict=True)
            ]
        slots.append([_known(known, placement, mesh) for placement in placements])
    return slots


def copies_on(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> PerDeviceArrays | None:
    """Returns which arrays of a plan are `PerDevice` on a mesh; None if none is."""
    if placed is None:
        known = (Replicated, Sharded, FromMetadata)
        if all(kind.placement is None or isinstance(kind.placement, known) for kind in plan.kinds.values()):
            return None
        placed = resolve(plan, mesh)
    positions: list[tuple[str, frozenset[int]]] = []
    axes: tuple[str, ...] = ()
    for kind, part in placed.items():
        own = frozenset(position for position, placement in enumerate(part) if placement.each)
        if own:
            axes = part[min(own)].each
            positions.append((kind, own))
    return PerDeviceArrays(mesh, axes, tuple(positions)) if positions else None


def on_mesh(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> PlanTables:
    """Returns the plan of a state on a mesh, which differs from the model's plan if arrays are `PerDevice`."""
    return with_copies(plan, copies_on(plan, mesh, placed))


def with_copies(plan: PlanTables, copies: PerDeviceArrays | None) -> PlanTables:
    """Returns a plan with these `PerDevice` arrays."""
    if copies == plan.per_device:
        return plan
    return plan.changed(per_device=copies)


def array_shardings(plan: PlanTables, mesh: Any) -> dict[str, list[jax.NamedSharding]]:
    """Returns, for each kind, the sharding of each of its arrays, in the order of the plan."""
    known: dict[ArrayPlacement, jax.NamedSharding] = {}
    return {kind: [_known(known, placement, mesh) for placement in part] for kind, part in resolve(plan, mesh).items()}


def _known(known: dict[ArrayPlacement, jax.NamedSharding], placement: ArrayPlacement, mesh: Any) -> jax.NamedSharding:
    if placement not in known:
        known[placement] = placement.sharding(mesh)
    return known[placement]


def _check_packed(plan: PlanTables, kind: str, placed: Sequence[ArrayPlacement]) -> None:
    problems = Problems()
    for buffer in plan.packing[kind].buffers:
        for position in buffer.positions:
            if placed[position].split or placed[position].memory != placed[buffer.positions[0]].memory:
                note = "packed, and split over the mesh" if placed[position].split else "packed with other memory"
                problems.add(plan.leaf_of_array[kind][position], note)
    others = tuple(name for name in plan.packing if name != kind)
    problems.raise_as(
        PlacementError,
        f"Kind {kind!r} is packed into buffers, which cannot be split: pack and placement cannot be combined.",
        f"leave {kind} out of pack: plan.take(model, mesh=mesh, pack={others!r})",
    )


# --- resolving ---------------------------------------------------------------------------------------------------


def resolve(plan: PlanTables, mesh: Any) -> dict[str, tuple[ArrayPlacement, ...]]:
    """Returns the placement of each array of each kind on a mesh, in the order of the plan.

    Raises:
      PlacementError: leaves that cannot be placed as declared, all of them; or the mesh is not a mesh.
    """
    if plan.ensemble is not None:
        return resolved_members(plan, resolve(plan.ensemble.single, mesh), axis_sizes(mesh))
    resolver = _Resolver(plan, axis_sizes(mesh), memories(mesh))
    placed = resolver.rows()
    for kind, placement in resolver.derived():
        placed[kind].append(placement)
    resolver.problems.raise_as(
        PlacementError, f"{{n}} leaves cannot be placed on the mesh {describe_mesh(resolver.sizes)}."
    )
    return {kind: tuple(placed[kind]) for kind in plan.kinds}


class _Fault(Exception):
    """Raised for one array that cannot be placed: why, and the hint."""

    def __init__(self, note: str, hint: str) -> None:
        super().__init__(note)
        self.note, self.hint = note, hint


_AVERAGED = "placement=sw.Replicated() for kinds with an optimizer; for an ensemble: jax.vmap over plan.axes(params=0)"


class _Resolver:
    """Resolves array by array, and collects what is wrong until all arrays were resolved."""

    def __init__(self, plan: PlanTables, sizes: dict[str, int], memories: set[str] | None) -> None:
        self.plan, self.sizes, self.memories = plan, sizes, memories
        self.problems = Problems()  # without duplicates: several placements may fail for one leaf
        self.updated = {kind for group in plan.optimizers for kind in group.kinds}
        self.each: tuple[str, ...] = ()  # the axes of everything that is `PerDevice`
        self.owned: dict[Path, list[tuple[int, Leaf, ArraySpec]]] = {}  # by path: the leaves that moments may belong to
        self.owners: Owners = {}  # by path, as the objects' own optimizers see it
        self.owners_in_groups: Owners = {}  # by path, prefixed by the object's position if there are several

    def rows(self) -> dict[str, list[ArrayPlacement]]:
        """Returns the placements of the model's own arrays."""
        plan = self.plan
        placements: dict[int, list[ArrayPlacement]] = {}
        numbered = list(enumerate(zip(plan.rows, plan.leaves[: len(plan.rows)], strict=True)))
        # Optimizers come last: they follow the placements of the others.
        for number, (row, leaf) in sorted(numbered, key=lambda item: _is_moment(item[1][0])):
            placement = plan.kinds[row.kind].placement
            placements[number] = []
            for keys, spec in zip(keys_within(row.structure, len(row.specs)), row.specs, strict=True):
                paths = [plan.relative(path) + keys for path in (row.path, *leaf.aliases)]
                # An optimizer among the objects stores paths relative to its own model: without the object's name or
                # position.
                bare = row.path[plan.several :] + keys
                if placement is None and _is_moment(row):
                    placements[number].append(follow(bare, spec.shape, self.owners))
                    continue
                if isinstance(placement, FromMetadata) and _is_moment(row):
                    resolved = self._moment(placement, [bare], spec, leaf, number)
                else:
                    resolved = self.place(placement, paths, spec, leaf, number)
                    self.owned.setdefault(bare, []).append((number, leaf, spec))
                placements[number].append(resolved)
                self.owners.setdefault(bare, []).append((spec.shape, resolved))
                self.owners_in_groups[row.path + keys] = [(spec.shape, resolved)]
        placed: dict[str, list[ArrayPlacement]] = {kind: [] for kind in plan.kinds}
        for number, (row, _) in numbered:
            placed[row.kind].extend(placements[number])
        return placed

    def derived(self) -> Iterator[tuple[str, ArrayPlacement]]:
        """Yields the kind and placement of each array of the plan's own optimizers and averages."""
        leaves = iter(self.plan.leaves[len(self.plan.rows) :])
        for derived in self.plan.derived:
            placement = self.plan.kinds[derived.into].placement
            # Derived arrays have no metadata of their own: their owner's counts, by the rules of this kind.
            annotated = placement if isinstance(placement, FromMetadata) else None
            owners = self.owners_in_groups if annotated is None else self._annotated_owners(annotated, derived.kinds)
            owners = {path: owners[path] for path in derived.paths if path in owners}
            for at, (spec, leaf) in enumerate(zip(derived.layout.specs, leaves, strict=False)):
                as_owner = _as_owner(derived, at, owners)
                if placement is None or annotated is not None:
                    yield derived.into, as_owner
                elif as_owner.each:
                    note = "an average of a PerDevice leaf, with another placement"
                    hint = (
                        f"{derived.into}=sw.Kind(sw.EMA)  # without a placement, averages are placed like their leaves"
                    )
                    self.problems.add(leaf, note, *hint.splitlines())
                    yield derived.into, ArrayPlacement()
                else:
                    yield derived.into, self.place(placement, [leaf.path], spec, leaf)

    def _moment(
        self, placement: FromMetadata, paths: Sequence[Path], spec: ArraySpec, leaf: Leaf, number: int
    ) -> ArrayPlacement:
        """Returns a moment's placement by metadata: NNX copies the parameter's, but a factored moment lacks an axis."""
        path = paths[0]
        for start in range(len(path)):
            owned = self.owned.get(path[start:], ())
            if any(of.shape == spec.shape for _, _, of in owned):
                break
            if owned:
                owners = [(of.shape, self.place(placement, [path[start:]], of, own, at)) for at, own, of in owned]
                return follow(path, spec.shape, {path[start:]: owners})
        return self.place(placement, paths, spec, leaf, number)

    def _annotated_owners(self, placement: FromMetadata, kinds: Sequence[str]) -> Owners:
        """Returns the leaves of these kinds, placed by this placement."""
        owners: Owners = {}
        for number, (row, leaf) in enumerate(zip(self.plan.rows, self.plan.leaves, strict=False)):
            if row.kind not in kinds:
                continue
            for keys, spec in zip(keys_within(row.structure, len(row.specs)), row.specs, strict=True):
                resolved = self.place(placement, [row.path], spec, leaf, number)
                owners[row.path + keys] = [(spec.shape, resolved)]
        return owners

    @functools.cached_property
    def metadata(self) -> dict[Path, Mapping[str, Any]]:
        """Returns the metadata of each leaf's Variable, by the leaf's path."""
        return metadata_of(self.plan)

    def place(
        self, placement: Any, paths: Sequence[Path], spec: ArraySpec, leaf: Leaf, number: int | None = None
    ) -> ArrayPlacement:
        """Returns the placement of one array, given its kind's; by any of its paths, and the number of its row."""
        try:
            resolved = self._place(placement, paths, spec, number)
            if resolved.each and (number is None or leaf.kind in self.updated):
                raise _Fault("PerDevice, but updated by gradients that are averaged over the devices", _AVERAGED)
            return resolved
        except _Fault as fault:
            shape = leaf.shape if leaf.shape is not None else spec.shape
            self.problems.add(dataclasses.replace(leaf, shape=shape), fault.note, *fault.hint.splitlines())
            return ArrayPlacement()

    def _place(self, placement: Any, paths: Sequence[Path], spec: ArraySpec, number: int | None) -> ArrayPlacement:
        if placement is not None and not isinstance(placement, PLACEMENTS):
            answers = [_ask(placement, path, spec.shape) for path in paths]
            for path, answer in zip(paths, answers, strict=True):
                if answer != answers[0]:
                    raise _Fault(
                        f"tied: {answers[0]!r} by this path, {answer!r} as {format_path(path)}",
                        f"{describe_placement(placement)} must return the same placement for all paths of a tied leaf",
                    )
            placement = answers[0]
        if isinstance(placement, FromMetadata):
            placement = None if number is None else self._annotated(placement, number, spec)
        if placement is None:
            return ArrayPlacement()
        if placement.memory is not None and self.memories is not None and placement.memory not in self.memories:
            known = ", ".join(sorted(self.memories))
            raise _Fault(f"the devices have no memory {placement.memory!r}", f"use one of their memories: {known}")
        if isinstance(placement, PerDevice):
            return self._each(placement)
        axes = placement.axes if isinstance(placement, Sharded) else ()
        return ArrayPlacement(self._fit(axes, spec.shape), placement.memory)

    def _annotated(self, placement: FromMetadata, number: int, spec: ArraySpec) -> Sharded | None:
        """Returns the placement that a row's metadata gives an array in it."""
        try:
            return annotated(placement, self.metadata[self.plan.rows[number].path], spec.shape)
        except PlacementError as error:
            raise _Fault(error.message.rstrip("."), error.hint or "") from error

    def _each(self, placement: PerDevice) -> ArrayPlacement:
        """Returns the placement of one value for each device."""
        self._check_known(placement.axes)
        self.each = self.each or placement.axes
        if placement.axes != self.each:
            raise _Fault(
                f"{placement!r}, but others have PerDevice({', '.join(map(repr, self.each))})",
                "use the same axes for every PerDevice kind",
            )
        return ArrayPlacement((), placement.memory, placement.axes)

    def _check_known(self, axes: Sequence[Any]) -> None:
        unknown = [name for axis in axes for name in axes_of(axis) if name not in self.sizes]
        if unknown:
            names = ", ".join(map(repr, dict.fromkeys(unknown)))
            raise _Fault(f"the mesh has no axis {names}", f"use an axis of the mesh: {', '.join(self.sizes)}")

    def _fit(self, axes: Sequence[Any], shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        """Returns the mesh axes of each axis of an array."""
        self._check_known(axes)
        shown = ", ".join(map(repr, axes))
        if len(axes) > len(shape):
            raise _Fault(
                f"Sharded({shown}) has {len(axes)} axes, the array {len(shape)}",
                "place by the number of axes: placement=lambda path, shape: "
                f"sw.Sharded({shown}) if len(shape) >= {len(axes)} else sw.Replicated()",
            )
        split = [axes_of(axis) for axis in axes] + [()] * (len(shape) - len(axes))
        uneven = [
            (at, names)
            for at, names in enumerate(split)
            if shape[at] % ArrayPlacement((names,)).parts(self.sizes) and names
        ]
        if uneven:
            at, first = uneven[0]
            parts = ArrayPlacement((first,)).parts(self.sizes)
            notes = []
            for axis, over in uneven:
                by = describe_mesh({name: self.sizes[name] for name in over})
                notes.append(f"axis {axis} of {shape[axis]} does not divide by {by}")
            raise _Fault(
                "; ".join(notes),
                "place by shape: placement=lambda path, shape: "
                f"sw.Sharded({shown}) if len(shape) > {at} and shape[{at}] % {parts} == 0 else sw.Replicated()",
            )
        return tuple(split)


def _as_owner(derived: Derived, at: int, owners: Owners) -> ArrayPlacement:
    """Returns the placement of a derived array, following its owner's."""
    # Within the parameters: otherwise the first moment of `kernel` could be that of a parameter `mu/kernel`.
    path, root = derived.layout.paths[at], derived.layout.roots[at] if derived.layout.roots else None
    owned = owners if root is None else {path[root:]: owners[path[root:]]} if path[root:] in owners else {}
    return follow(path, derived.layout.specs[at].shape, owned)


def _is_moment(row: Any) -> bool:
    """Returns whether this is state of an `nnx.Optimizer`."""
    return row.kind == OPTIMIZER or issubclass(row.type, nnx.OptState)


def _ask(function: Any, path: Path, shape: tuple[int, ...]) -> Any:
    """Returns the placement that a user's function gives one path."""
    name = describe_placement(function)
    try:
        answer = function(path, shape)
    except Exception as error:  # a user's function may raise anything
        text = (str(error).splitlines() or [""])[0]
        raise _Fault(
            f"{name} raised {type(error).__name__}: {text}", f"{name}(path, shape) must handle every leaf"
        ) from (error)
    if not isinstance(answer, PLACEMENTS):
        raise _Fault(
            f"{name} returned {type(answer).__name__}",
            f"{name}(path, shape) returns a placement for every leaf: sw.Replicated() or sw.Sharded('data', None)",
        )
    return answer
