"""Placing a plan on a mesh: what each array's sharding is, or everything that is wrong.

`placements` says how a kind lies on any mesh; here that is resolved, array by array, against the axes of one.  A mesh
is told by its axes alone, so an abstract one, with no device behind it, will do.

Optimizer state follows the leaves that it is for (see `lies`), unless the kind `optimizer` declares a placement.
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


# How each array of each kind lies on a mesh.
Placed = Mapping[str, Sequence[ArrayPlacement]]


def slot_shardings(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> list[list[jax.NamedSharding]]:
    """For each kind the sharding of what stands in each slot of its part; see `Plan.shardings`."""
    members = plan.ensemble
    if members is not None:
        placed = resolve(members.single, mesh)
    placed = resolve(plan, mesh) if placed is None else placed
    known: dict[ArrayPlacement, jax.NamedSharding] = {}
    slots = []
    for kind, here in zip(plan.kinds, plan.slots, strict=True):
        packing = plan.packing.get(kind)
        if packing:
            _check_packed(plan if members is None else members.single, kind, placed[kind])
        lies = [placed[kind][slot if isinstance(slot, int) else slot.positions[0]] for slot in here]
        # A buffer has one axis, whatever its arrays have.
        lies = [
            one if isinstance(slot, int) else ArrayPlacement((), one.memory)
            for one, slot in zip(lies, here, strict=True)
        ]
        if members is not None:
            specs = members.single.stored_specs[kind]
            lies = [of_all_members(members, *each) for each in zip(lies, plan.slot_axes[kind], specs, strict=True)]
        slots.append([_known(known, one, mesh) for one in lies])
    return slots


def copies_on(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> PerDeviceArrays | None:
    """Which arrays of a plan lie per device on a mesh; None where none does."""
    if placed is None:
        known = (Replicated, Sharded, FromMetadata)
        if all(kind.placement is None or isinstance(kind.placement, known) for kind in plan.kinds.values()):
            return None
        placed = resolve(plan, mesh)
    positions: list[tuple[str, frozenset[int]]] = []
    axes: tuple[str, ...] = ()
    for kind, part in placed.items():
        mine = frozenset(at for at, lies in enumerate(part) if lies.each)
        if mine:
            axes = part[min(mine)].each
            positions.append((kind, mine))
    return PerDeviceArrays(mesh, axes, tuple(positions)) if positions else None


def on_mesh(plan: PlanTables, mesh: Any, placed: Placed | None = None) -> PlanTables:
    """The plan of a state on a mesh: another than the model's where something lies per device."""
    return with_copies(plan, copies_on(plan, mesh, placed))


def with_copies(plan: PlanTables, copies: PerDeviceArrays | None) -> PlanTables:
    """A plan with these copies."""
    if copies == plan.per_device:
        return plan
    return plan.changed(per_device=copies)


def array_shardings(plan: PlanTables, mesh: Any) -> dict[str, list[jax.NamedSharding]]:
    """For each kind the sharding of each of its arrays, in the order of the plan."""
    known: dict[ArrayPlacement, jax.NamedSharding] = {}
    return {kind: [_known(known, lies, mesh) for lies in part] for kind, part in resolve(plan, mesh).items()}


def _known(known: dict[ArrayPlacement, jax.NamedSharding], lies: ArrayPlacement, mesh: Any) -> jax.NamedSharding:
    if lies not in known:
        known[lies] = lies.sharding(mesh)
    return known[lies]


def _check_packed(plan: PlanTables, kind: str, placed: Sequence[ArrayPlacement]) -> None:
    split = []
    for buffer in plan.packing[kind].buffers:
        for position in buffer.positions:
            if placed[position].split or placed[position].memory != placed[buffer.positions[0]].memory:
                note = "packed, and split over the mesh" if placed[position].split else "packed with other memory"
                split.append(dataclasses.replace(plan.leaf_of_array[kind][position], note=note))
    if split:
        others = tuple(name for name in plan.packing if name != kind)
        raise PlacementError(
            f"Kind {kind!r} is packed into buffers, which are not split: pack and placement do not go together.",
            leaves=split,
            kind=kind,
            hint=f"leave {kind} out of pack: plan.take(model, mesh=mesh, pack={others!r})",
        )


# --- resolving ---------------------------------------------------------------------------------------------------


def resolve(plan: PlanTables, mesh: Any) -> dict[str, tuple[ArrayPlacement, ...]]:
    """How each array of each kind lies on a mesh, in the order of the plan.

    Raises:
      PlacementError: leaves that cannot be placed as declared, all of them; something that is no mesh.
    """
    if plan.ensemble is not None:
        return resolved_members(plan, resolve(plan.ensemble.single, mesh), axis_sizes(mesh))
    resolver = _Resolver(plan, axis_sizes(mesh), memories(mesh))
    placed = resolver.rows()
    for kind, lies in resolver.derived():
        placed[kind].append(lies)
    if resolver.faults:
        leaves = [leaf for leaf, _ in resolver.faults]
        kinds = {leaf.kind for leaf in leaves}
        raise PlacementError(
            f"{len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'} cannot be placed on the mesh "
            f"{describe_mesh(resolver.sizes)}.",
            leaves=leaves,
            kind=kinds.pop() if len(kinds) == 1 else None,
            hint="\n".join(dict.fromkeys(line for _, hint in resolver.faults for line in hint.splitlines())),
        )
    return {kind: tuple(placed[kind]) for kind in plan.kinds}


class _Fault(Exception):
    """What is wrong with the placement of one array, and the hint."""

    def __init__(self, note: str, hint: str) -> None:
        super().__init__(note)
        self.note, self.hint = note, hint


_ALIKE = "placement=sw.Replicated() for what has an optimizer; for an ensemble: jax.vmap over plan.axes(params=0)"


class _Resolver:
    """Resolves array by array, and keeps what is wrong until all were seen."""

    def __init__(self, plan: PlanTables, sizes: dict[str, int], memories: set[str] | None) -> None:
        self.plan, self.sizes, self.memories = plan, sizes, memories
        self.faults: dict[tuple[Leaf, str], None] = {}  # what several placements ask of one leaf is one fault
        self.updated = {kind for group in plan.optimizers for kind in group.kinds}
        self.each: tuple[str, ...] = ()  # the axes of all that lies per device
        self.owned: dict[Path, list[tuple[int, Leaf, ArraySpec]]] = {}  # likewise: what a moment may be of
        self.owners: Owners = {}  # by path, as the objects' own optimizers see it
        self.owners_in_groups: Owners = {}  # by path, prefixed by the object's position where there are several

    def rows(self) -> dict[str, list[ArrayPlacement]]:
        """How the model's own arrays lie."""
        plan = self.plan
        found: dict[int, list[ArrayPlacement]] = {}
        numbered = list(enumerate(zip(plan.rows, plan.leaves[: len(plan.rows)], strict=True)))
        # Optimizers come last: what they follow must be known.
        for number, (row, leaf) in sorted(numbered, key=lambda one: _is_moment(one[1][0])):
            placement = plan.kinds[row.kind].placement
            found[number] = []
            for keys, spec in zip(keys_within(row.structure, len(row.specs)), row.specs, strict=True):
                paths = [plan.relative(path) + keys for path in (row.path, *leaf.aliases)]
                # An optimizer among the objects knows paths in its own model: without the object's name or position.
                bare = row.path[plan.several :] + keys
                if placement is None and _is_moment(row):
                    found[number].append(follow(bare, spec.shape, self.owners))
                    continue
                if isinstance(placement, FromMetadata) and _is_moment(row):
                    lies = self._moment(placement, [bare], spec, leaf, number)
                else:
                    lies = self.place(placement, paths, spec, leaf, number)
                    self.owned.setdefault(bare, []).append((number, leaf, spec))
                found[number].append(lies)
                self.owners.setdefault(bare, []).append((spec.shape, lies))
                self.owners_in_groups[row.path + keys] = [(spec.shape, lies)]
        placed: dict[str, list[ArrayPlacement]] = {kind: [] for kind in plan.kinds}
        for number, (row, _) in numbered:
            placed[row.kind].extend(found[number])
        return placed

    def derived(self) -> Iterator[tuple[str, ArrayPlacement]]:
        """How each array of the plan's own optimizers and averages lies, and its kind."""
        leaves = iter(self.plan.leaves[len(self.plan.rows) :])
        for one in self.plan.derived:
            placement = self.plan.kinds[one.into].placement
            # What is derived carries no metadata: that of its owner counts, by the rules of this kind.
            annotated = placement if isinstance(placement, FromMetadata) else None
            owners = self.owners_in_groups if annotated is None else self._annotated_owners(annotated, one.kinds)
            owners = {path: owners[path] for path in one.paths if path in owners}
            for at, (spec, leaf) in enumerate(zip(one.layout.specs, leaves, strict=False)):
                as_owner = _as_owner(one, at, owners)
                if placement is None or annotated is not None:
                    yield one.into, as_owner
                elif as_owner.each:
                    note = "an average of what lies per device, placed otherwise"
                    hint = f"{one.into}=sw.Kind(sw.EMA)  # without a placement averages lie as what they are of"
                    self.faults[dataclasses.replace(leaf, note=note), hint] = None
                    yield one.into, ArrayPlacement()
                else:
                    yield one.into, self.place(placement, [leaf.path], spec, leaf)

    def _moment(
        self, placement: FromMetadata, paths: Sequence[Path], spec: ArraySpec, leaf: Leaf, number: int
    ) -> ArrayPlacement:
        """How a moment lies by metadata: NNX gives it that of its parameter, of which a factored one lacks an axis."""
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
        """The leaves of these kinds as this placement would have them."""
        owners: Owners = {}
        for number, (row, leaf) in enumerate(zip(self.plan.rows, self.plan.leaves, strict=False)):
            if row.kind not in kinds:
                continue
            for keys, spec in zip(keys_within(row.structure, len(row.specs)), row.specs, strict=True):
                lies = self.place(placement, [row.path], spec, leaf, number)
                owners[row.path + keys] = [(spec.shape, lies)]
        return owners

    @functools.cached_property
    def metadata(self) -> dict[Path, Mapping[str, Any]]:
        """The metadata of each leaf's Variable, by the leaf's path."""
        return metadata_of(self.plan)

    def place(
        self, placement: Any, paths: Sequence[Path], spec: ArraySpec, leaf: Leaf, number: int | None = None
    ) -> ArrayPlacement:
        """How one array lies, by the placement of its kind; by any of its paths, and the number of its row."""
        try:
            lies = self._place(placement, paths, spec, number)
            if lies.each and (number is None or leaf.kind in self.updated):
                raise _Fault("PerDevice, and updated by gradients that are averaged over the devices", _ALIKE)
            return lies
        except _Fault as fault:
            shape = leaf.shape if leaf.shape is not None else spec.shape
            self.faults[dataclasses.replace(leaf, shape=shape, note=fault.note), fault.hint] = None
            return ArrayPlacement()

    def _place(self, placement: Any, paths: Sequence[Path], spec: ArraySpec, number: int | None) -> ArrayPlacement:
        if placement is not None and not isinstance(placement, PLACEMENTS):
            answers = [_ask(placement, path, spec.shape) for path in paths]
            for path, answer in zip(paths, answers, strict=True):
                if answer != answers[0]:
                    raise _Fault(
                        f"tied: {answers[0]!r} by this path, {answer!r} as {format_path(path)}",
                        f"{describe_placement(placement)} must place all paths of a tied leaf alike",
                    )
            placement = answers[0]
        if isinstance(placement, FromMetadata):
            placement = None if number is None else self._annotated(placement, number, spec)
        if placement is None:
            return ArrayPlacement()
        if placement.memory is not None and self.memories is not None and placement.memory not in self.memories:
            known = ", ".join(sorted(self.memories))
            raise _Fault(f"the devices have no memory {placement.memory!r}", f"a memory that is there: {known}")
        if isinstance(placement, PerDevice):
            return self._each(placement)
        axes = placement.axes if isinstance(placement, Sharded) else ()
        return ArrayPlacement(self._fit(axes, spec.shape), placement.memory)

    def _annotated(self, placement: FromMetadata, number: int, spec: ArraySpec) -> Sharded | None:
        """What the metadata of a row says of an array in it."""
        try:
            return annotated(placement, self.metadata[self.plan.rows[number].path], spec.shape)
        except PlacementError as error:
            raise _Fault(error.message.rstrip("."), error.hint or "") from error

    def _each(self, placement: PerDevice) -> ArrayPlacement:
        """One value for each device."""
        self._known(placement.axes)
        self.each = self.each or placement.axes
        if placement.axes != self.each:
            raise _Fault(
                f"{placement!r}, where others have PerDevice({', '.join(map(repr, self.each))})",
                "the same axes for all that is PerDevice",
            )
        return ArrayPlacement((), placement.memory, placement.axes)

    def _known(self, axes: Sequence[Any]) -> None:
        unknown = [name for axis in axes for name in axes_of(axis) if name not in self.sizes]
        if unknown:
            names = ", ".join(map(repr, dict.fromkeys(unknown)))
            raise _Fault(f"the mesh has no axis {names}", f"an axis of the mesh: {', '.join(self.sizes)}")

    def _fit(self, axes: Sequence[Any], shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        """The mesh axes of each axis of an array."""
        self._known(axes)
        shown = ", ".join(map(repr, axes))
        if len(axes) > len(shape):
            raise _Fault(
                f"Sharded({shown}) is of {len(axes)}, the array of {len(shape)} dimensions",
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


def _as_owner(one: Derived, at: int, owners: Owners) -> ArrayPlacement:
    """How an array lies that follows what it is derived from."""
    # By the path within the parameters: of `mu/kernel` and `kernel` the second's first moment ends like the first.
    path, root = one.layout.paths[at], one.layout.roots[at] if one.layout.roots else None
    owned = owners if root is None else {path[root:]: owners[path[root:]]} if path[root:] in owners else {}
    return follow(path, one.layout.specs[at].shape, owned)


def _is_moment(row: Any) -> bool:
    """Whether this is state of an `nnx.Optimizer`."""
    return row.kind == OPTIMIZER or issubclass(row.type, nnx.OptState)


def _ask(function: Any, path: Path, shape: tuple[int, ...]) -> Any:
    """What a user's function says of one path."""
    name = describe_placement(function)
    try:
        answer = function(path, shape)
    except Exception as error:  # a user's function raises what it likes
        text = (str(error).splitlines() or [""])[0]
        raise _Fault(
            f"{name} raised {type(error).__name__}: {text}", f"{name}(path, shape) must know every leaf"
        ) from (error)
    if not isinstance(answer, PLACEMENTS):
        raise _Fault(
            f"{name} returned {type(answer).__name__}",
            f"{name}(path, shape) returns a placement for every leaf: sw.Replicated() or sw.Sharded('data', None)",
        )
    return answer
