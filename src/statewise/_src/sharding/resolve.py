"""Resolves the placements of a plan on a mesh: the sharding of each array, or everything that is wrong.

`placements` declares how a kind is placed on any mesh; here that is resolved for one, array by array.  Only the axes
of the mesh matter, so an abstract mesh without devices works too.

Optimizer state follows its parameters (see `array_placement`), unless the kind `optimizer` declares a placement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    single = plan if members is None else members.single
    if members is not None or placed is None:
        placed = resolve(single, mesh)
    # An ensemble is placed by its single member, and then gets the members' axis.
    sharding_of = _shardings_on(mesh)
    shardings = []
    for kind, slots in single.stored.items():
        if kind in plan.packing:
            _check_packed(single, kind, placed[kind])
        of_kind = []
        for slot, slot_of_all in zip(slots, plan.stored[kind], strict=True):
            placement = placed[kind][slot.arrays[0].position]
            if slot.buffer is not None:  # a buffer has one axis, whatever its arrays have
                placement = ArrayPlacement((), placement.memory)
            if members is not None:
                spec = slot.arrays[0].held if slot.buffer is None else slot.buffer.spec
                placement = of_all_members(members, placement, slot_of_all.arrays[0].axis, spec)
            of_kind.append(sharding_of(placement))
        shardings.append(of_kind)
    return shardings


def copies_on(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> PerDeviceArrays | None:
    """Returns which arrays of a plan are `PerDevice` on a mesh; None if none is."""
    if placed is None:
        declared = [kind.placement for kind in plan.kinds.values() if kind.placement is not None]
        # Neither PerDevice nor a function that may return it: there is nothing to resolve.
        if all(isinstance(each, PLACEMENTS) and not isinstance(each, PerDevice) for each in declared):
            return None
        placed = resolve(plan, mesh)
    own = {kind: frozenset(index for index, array in enumerate(part) if array.each) for kind, part in placed.items()}
    positions = tuple((kind, indices) for kind, indices in own.items() if indices)
    if not positions:
        return None
    kind, indices = positions[0]  # all of them have the same axes
    return PerDeviceArrays(mesh, placed[kind][min(indices)].each, positions)


def on_mesh(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> PlanTables:
    """Returns the plan of a state on a mesh, which differs from the model's plan if arrays are `PerDevice`."""
    return with_copies(plan, copies_on(plan, mesh, placed))


def with_copies(plan: PlanTables, copies: PerDeviceArrays | None) -> PlanTables:
    """Returns a plan with these `PerDevice` arrays."""
    return plan if copies == plan.per_device else plan.changed(per_device=copies)


def array_shardings(plan: PlanTables, mesh: Any) -> dict[str, list[jax.NamedSharding]]:
    """Returns, for each kind, the sharding of each of its arrays, in the order of the plan."""
    sharding_of = _shardings_on(mesh)
    return {kind: list(map(sharding_of, part)) for kind, part in resolve(plan, mesh).items()}


def _shardings_on(mesh: Any) -> Callable[[ArrayPlacement], jax.NamedSharding]:
    """Returns a function that makes the sharding of a placement, one object for equal placements."""
    return functools.cache(lambda placement: placement.sharding(mesh))


def _check_packed(plan: PlanTables, kind: str, placed: Sequence[ArrayPlacement]) -> None:
    problems = Problems()
    for array in plan.by_kind[kind]:
        if array.buffer is not None:
            placement = placed[array.position]
            if placement.split:
                problems.add(array.leaf, "packed, and split over the mesh")
            elif placement.memory != placed[array.buffer.positions[0]].memory:
                problems.add(array.leaf, "packed with other memory")
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


_AVERAGED = "placement=sw.Replicated() for kinds with an optimizer; for an ensemble: jax.vmap over plan.axes(params=0)"


@dataclasses.dataclass(frozen=True, slots=True)
class _ModelArray:
    """One array of the model: its leaf, the keys that lead to it within the leaf's value, its shape and dtype."""

    leaf: Leaf
    keys: Path
    spec: ArraySpec


class _Resolver:
    """Resolves array by array, and collects what is wrong until all arrays were resolved."""

    def __init__(self, plan: PlanTables, sizes: dict[str, int], memories: set[str] | None) -> None:
        self.plan, self.sizes, self.memories = plan, sizes, memories
        self.problems = Problems()  # without duplicates: several placements may fail for one leaf
        self.updated = {kind for group in plan.optimizers for kind in group.kinds}
        self.each: tuple[str, ...] = ()  # the axes of everything that is `PerDevice`
        self.arrays = [
            _ModelArray(leaf, keys, spec)
            for row, leaf in zip(plan.rows, plan.leaves, strict=False)
            for keys, spec in zip(keys_within(row.structure, len(row.specs)), row.specs, strict=True)
        ]
        self.owned: dict[Path, list[_ModelArray]] = {}  # by path: the leaves that moments may belong to
        self.owners: Owners = {}  # by path, as the objects' own optimizers see it
        self.owners_in_groups: Owners = {}  # by path, prefixed by the object's position if there are several

    def rows(self) -> dict[str, list[ArrayPlacement]]:
        """Returns the placements of the model's own arrays."""
        plan = self.plan
        placements = [ArrayPlacement()] * len(self.arrays)
        # Optimizers come last: they follow the placements of the others.
        for index in sorted(range(len(self.arrays)), key=lambda index: _is_moment(self.arrays[index].leaf)):
            array = self.arrays[index]
            leaf, keys, spec = array.leaf, array.keys, array.spec
            placement = plan.kinds[leaf.kind or ""].placement
            # An optimizer among the objects stores paths relative to its own model: without the object's name or
            # position.
            bare = leaf.path[plan.several :] + keys
            if placement is None and _is_moment(leaf):
                placements[index] = follow(bare, spec.shape, self.owners)
                continue
            if isinstance(placement, FromMetadata) and _is_moment(leaf):
                resolved = self._moment(placement, bare, array)
            else:
                paths = [plan.relative(path) + keys for path in (leaf.path, *leaf.aliases)]
                resolved = self.place(placement, paths, spec, leaf)
                self.owned.setdefault(bare, []).append(array)
            placements[index] = resolved
            self.owners.setdefault(bare, []).append((spec.shape, resolved))
            self.owners_in_groups[leaf.path + keys] = [(spec.shape, resolved)]
        placed: dict[str, list[ArrayPlacement]] = {kind: [] for kind in plan.kinds}
        for array, resolved in zip(self.arrays, placements, strict=True):
            placed[array.leaf.kind or ""].append(resolved)
        return placed

    def derived(self) -> Iterator[tuple[str, ArrayPlacement]]:
        """Yields the kind and placement of each array of the plan's own optimizers and averages."""
        leaves = iter(self.plan.leaves[len(self.plan.rows) :])
        for derived in self.plan.derived:
            placement = self.plan.kinds[derived.into].placement
            # Derived arrays have no metadata of their own: their owner's counts, by the rules of this kind.
            annotated = placement if isinstance(placement, FromMetadata) else None
            owners = self.owners_in_groups if annotated is None else self._annotated_owners(annotated, derived.kinds)
            # Only the leaves that it is derived from: a moment's path may also end like that of another leaf.
            owners = {path: owners[path] for path in derived.paths if path in owners}
            for index, (spec, leaf) in enumerate(zip(derived.layout.specs, leaves, strict=False)):
                as_owner = _as_owner(derived, index, owners)
                if placement is None or annotated is not None:
                    yield derived.into, as_owner
                elif as_owner.each:
                    self.problems.add(
                        leaf,
                        "an average of a PerDevice leaf, with another placement",
                        f"{derived.into}=sw.Kind(sw.EMA)  # without a placement, averages are placed like their leaves",
                    )
                    yield derived.into, ArrayPlacement()
                else:
                    yield derived.into, self.place(placement, [leaf.path], spec, leaf, derived=True)

    def _moment(self, placement: FromMetadata, path: Path, moment: _ModelArray) -> ArrayPlacement:
        """Returns a moment's placement by metadata: NNX copies the parameter's, but a factored moment lacks an axis."""
        for start in range(len(path)):
            owned = self.owned.get(path[start:], ())
            if any(own.spec.shape == moment.spec.shape for own in owned):
                break
            if owned:
                owners = [(own.spec.shape, self.place(placement, [path[start:]], own.spec, own.leaf)) for own in owned]
                return follow(path, moment.spec.shape, {path[start:]: owners})
        return self.place(placement, [path], moment.spec, moment.leaf)

    def _annotated_owners(self, placement: FromMetadata, kinds: Sequence[str]) -> Owners:
        """Returns the leaves of these kinds, placed by this placement."""
        return {
            array.leaf.path + array.keys: [
                (array.spec.shape, self.place(placement, [array.leaf.path], array.spec, array.leaf))
            ]
            for array in self.arrays
            if array.leaf.kind in kinds
        }

    @functools.cached_property
    def metadata(self) -> dict[Path, Mapping[str, Any]]:
        """Returns the metadata of each leaf's Variable, by the leaf's path."""
        return metadata_of(self.plan)

    def place(
        self, placement: Any, paths: Sequence[Path], spec: ArraySpec, leaf: Leaf, *, derived: bool = False
    ) -> ArrayPlacement:
        """Returns the placement of one array of a leaf, given its kind's; `paths` are all that reach it."""
        try:
            resolved = self._place(placement, paths, spec, None if derived else leaf)
            if resolved.each and (derived or leaf.kind in self.updated):
                raise PlacementError(
                    "PerDevice, but updated by gradients that are averaged over the devices", hint=_AVERAGED
                )
            return resolved
        except PlacementError as error:
            shape = leaf.shape if leaf.shape is not None else spec.shape
            note, hints = error.message.rstrip("."), (error.hint or "").splitlines()
            self.problems.add(dataclasses.replace(leaf, shape=shape), note, *hints)
            return ArrayPlacement()

    def _place(self, placement: Any, paths: Sequence[Path], spec: ArraySpec, leaf: Leaf | None) -> ArrayPlacement:
        if placement is not None and not isinstance(placement, PLACEMENTS):
            answers = [_ask(placement, path, spec.shape) for path in paths]
            same = f"{describe_placement(placement)} must return the same placement for all paths of a tied leaf"
            for path, answer in zip(paths, answers, strict=True):
                if answer != answers[0]:
                    note = f"tied: {answers[0]!r} by this path, {answer!r} as {format_path(path)}"
                    raise PlacementError(note, hint=same)
            placement = answers[0]
        if isinstance(placement, FromMetadata):
            placement = None if leaf is None else annotated(placement, self.metadata[leaf.path], spec.shape)
        if placement is None:
            return ArrayPlacement()
        if placement.memory is not None and self.memories is not None and placement.memory not in self.memories:
            known = ", ".join(sorted(self.memories))
            raise PlacementError(
                f"the devices have no memory {placement.memory!r}", hint=f"use one of their memories: {known}"
            )
        if isinstance(placement, PerDevice):
            return self._each(placement)
        axes = placement.axes if isinstance(placement, Sharded) else ()
        return ArrayPlacement(self._fit(axes, spec.shape), placement.memory)

    def _each(self, placement: PerDevice) -> ArrayPlacement:
        """Returns the placement of one value for each device."""
        self._check_known(placement.axes)
        self.each = self.each or placement.axes
        if placement.axes != self.each:
            raise PlacementError(
                f"{placement!r}, but others have PerDevice({', '.join(map(repr, self.each))})",
                hint="use the same axes for every PerDevice kind",
            )
        return ArrayPlacement((), placement.memory, placement.axes)

    def _check_known(self, axes: Sequence[Any]) -> None:
        unknown = [name for axis in axes for name in axes_of(axis) if name not in self.sizes]
        if unknown:
            names = ", ".join(map(repr, dict.fromkeys(unknown)))
            raise PlacementError(
                f"the mesh has no axis {names}", hint=f"use an axis of the mesh: {', '.join(self.sizes)}"
            )

    def _fit(self, axes: Sequence[Any], shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        """Returns the mesh axes of each axis of an array."""
        self._check_known(axes)
        shown = ", ".join(map(repr, axes))
        if len(axes) > len(shape):
            raise PlacementError(
                f"Sharded({shown}) has {len(axes)} axes, the array {len(shape)}",
                hint="place by the number of axes: placement=lambda path, shape: "
                f"sw.Sharded({shown}) if len(shape) >= {len(axes)} else sw.Replicated()",
            )
        split = [axes_of(axis) for axis in axes] + [()] * (len(shape) - len(axes))
        parts = [math.prod(self.sizes[name] for name in names) for names in split]
        uneven = [axis for axis in range(len(shape)) if shape[axis] % parts[axis]]
        if uneven:
            first = uneven[0]
            by = [describe_mesh({name: self.sizes[name] for name in names}) for names in split]
            raise PlacementError(
                "; ".join(f"axis {axis} of {shape[axis]} does not divide by {by[axis]}" for axis in uneven),
                hint="place by shape: placement=lambda path, shape: "
                f"sw.Sharded({shown}) if len(shape) > {first} and shape[{first}] % {parts[first]} == 0 "
                "else sw.Replicated()",
            )
        return tuple(split)


def _as_owner(derived: Derived, index: int, owners: Owners) -> ArrayPlacement:
    """Returns the placement of a derived array, following its owner's."""
    layout = derived.layout
    path = layout.paths[index]
    root = layout.roots[index] if layout.roots else None
    if root is not None:
        # Within the parameters: otherwise the first moment of `kernel` could be that of a parameter `mu/kernel`.
        own = path[root:]
        owners = {own: owners[own]} if own in owners else {}
    return follow(path, layout.specs[index].shape, owners)


def _is_moment(leaf: Leaf) -> bool:
    """Returns whether a leaf is state of an `nnx.Optimizer`."""
    return leaf.kind == OPTIMIZER or issubclass(leaf.type, nnx.OptState)


def _ask(function: Any, path: Path, shape: tuple[int, ...]) -> Any:
    """Returns the placement that a user's function gives one path."""
    name = describe_placement(function)
    try:
        answer = function(path, shape)
    except Exception as error:  # a user's function may raise anything
        text = (str(error).splitlines() or [""])[0]
        note = f"{name} raised {type(error).__name__}: {text}"
        raise PlacementError(note, hint=f"{name}(path, shape) must handle every leaf") from error
    if not isinstance(answer, PLACEMENTS):
        raise PlacementError(
            f"{name} returned {type(answer).__name__}",
            hint=f"{name}(path, shape) returns a placement for every leaf: sw.Replicated() or sw.Sharded('data', None)",
        )
    return answer
