"""The static tables of a plan: where each array of each leaf is in a state, and the tables of plans made from it.

A state keeps one part for each kind.  Two numberings of a kind's arrays are in use.  In the order of the plan each
array has a *position*; a packed part stores several arrays in one buffer, so what it holds is counted in *slots*.
Without packing the two are the same.

Tables hold no array and are hashable, and equal tables are one object, so that JAX compares the static parts of two
states by identity.  The rows come in the order of NNX's flat leaves; a state groups arrays by kind, and `spans` says
which arrays of which kind make up each leaf.  The tables of an ensemble are made from those of one member: whatever
changes them changes the member's, and makes the ensemble's again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax

from statewise._src.common.nnx_graph import ONE, ArraySpec, is_abstract, make_leaf
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.ties import aliases_of
from statewise._src.plan.arrays import ArrayInfo, DerivedArrays, Slot
from statewise._src.plan.averages import Average
from statewise._src.plan.derived import Derived
from statewise._src.plan.intern import intern
from statewise._src.plan.kind import Kind, unknown_kind
from statewise._src.plan.leaf_specs import LeafSpec, Span
from statewise._src.plan.members import Axis, Members, grown
from statewise._src.plan.optimizer_state import OPTIMIZER, OptimizerGroup
from statewise._src.plan.packing import PackedBuffer, Packing, choose, pack, unpack
from statewise._src.plan.per_device import PerDeviceArrays

__all__ = ["OPTIMIZER", "PlanTables"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PlanTables:
    """What a plan knows, resolved and without arrays: where each array of each leaf is.

    Attributes:
      kinds: the declaration, with the kind `optimizer` added where there are optimizers, and a kind for each average.
      graphdef: NNX's graph definition of the objects.
      rows: what is known of each leaf of the model.
      derived: the optimizers, then the averages.
      object_count: how many objects were planned.
      names: the objects' names, where they were planned by name.
      excluded: leaves that an earlier `sow` left in the model and that are not part of a state.
      packing: which kinds are packed, and how.
      per_device: which arrays are per device; None where none is, or where the plan was not placed on a mesh.
      ensemble: the members, if this is the plan of an ensemble.
    """

    kinds: Mapping[str, Kind]
    graphdef: Any
    rows: tuple[LeafSpec, ...]
    derived: tuple[Derived, ...]
    object_count: int
    names: tuple[str, ...] = ()
    excluded: tuple[Leaf, ...] = ()
    packing: Mapping[str, Packing] = dataclasses.field(default_factory=dict)
    per_device: PerDeviceArrays | None = None
    ensemble: Members | None = None

    @property
    def several(self) -> bool:
        """Whether paths begin with an object's name or position."""
        return self.object_count > 1 or bool(self.names)

    def __getitem__(self, kind: str) -> tuple[Leaf, ...]:
        if kind not in self.kinds:
            raise unknown_kind(kind, self.kinds)
        return tuple(leaf for leaf in self.leaves if leaf.kind == kind)

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}={len(specs)}" for kind, specs in self.specs.items() if specs)
        return f"Plan({'' if self.members is None else f'an ensemble of {self.members}: '}{counts})"

    # Identity is equality: `intern` gives out one object for equal tables.

    def __deepcopy__(self, memo: Any) -> PlanTables:
        return self

    def __copy__(self) -> PlanTables:
        return self

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The rows, as data: path, kind, type, shape, dtype, aliases, elements, bytes."""
        aliases = aliases_of(self.graphdef, [row.path for row in self.rows], self.several, self.names)
        mine = [
            make_leaf(row.path, row.type, row.specs, row.structure is ONE, row.kind, aliases.get(row.path, ()))
            for row in self.rows
        ]
        derived = [
            make_leaf(path, jax.Array, [spec], True, one.into)
            for one in self.derived
            for path, spec in zip(one.leaf_paths, one.layout.specs, strict=True)
        ]
        return tuple(mine + derived)

    @property
    def object_labels(self) -> Sequence[Any]:
        """What each object is called in paths: its name or its position."""
        return self.names or range(self.object_count)

    def relative(self, path: Path) -> Path:
        """A leaf's path as filters, and functions of a path, see it: relative to its object, if that has no name."""
        return path[1:] if self.several and not self.names else path

    @functools.cached_property
    def optimizers(self) -> tuple[OptimizerGroup, ...]:
        """The optimizers."""
        return tuple(cast(OptimizerGroup, one) for one in self.derived if one.trains)

    @functools.cached_property
    def averages(self) -> tuple[Average, ...]:
        """The averages, one for each kind and name."""
        return tuple(cast(Average, one) for one in self.derived if one.mirrors)

    @functools.cached_property
    def specs(self) -> dict[str, tuple[ArraySpec, ...]]:
        """Shape and dtype of each array of each kind's part, in the order in which a state holds them."""
        parts: dict[str, list[ArraySpec]] = {kind: [] for kind in self.kinds}
        for row in self.rows:
            parts[row.kind].extend(row.specs)
        for one in self.derived:
            parts[one.into].extend(one.layout.specs)
        return {kind: tuple(part) for kind, part in parts.items()}

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """For each row, in order, where its arrays stand in its kind's part."""
        used = dict.fromkeys(self.kinds, 0)
        spans = []
        for row in self.rows:
            start = used[row.kind]
            used[row.kind] = start + len(row.specs)
            spans.append(Span(row.kind, start, used[row.kind], row.structure))
        return tuple(spans)

    @functools.cached_property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        """Every array of a state, by number: kind by kind, in the order of the plan."""
        arrays: list[ArrayInfo] = []
        for index, (kind, specs) in enumerate(self.specs.items()):
            slot_of = {
                position: (slot, content if isinstance(content, PackedBuffer) else None)
                for slot, content in enumerate(self.slots[index])
                for position in (content.positions if isinstance(content, PackedBuffer) else (content,))
            }
            per_device = self.per_device.of(kind) if self.per_device else frozenset()
            axes = self.ensemble.of(kind) if self.ensemble else (None,) * len(specs)
            for position, (spec, held, axis) in enumerate(zip(specs, self.held_specs[kind], axes, strict=True)):
                devices = self.per_device.devices if self.per_device and position in per_device else 0
                slot, buffer = slot_of[position]
                leaf, derived = self._owners[kind][position]
                info = ArrayInfo(len(arrays), kind, position, slot, buffer, leaf, spec, held, derived, devices, axis)
                arrays.append(info)
        return tuple(arrays)

    @functools.cached_property
    def by_kind(self) -> dict[str, tuple[ArrayInfo, ...]]:
        """The arrays of each kind, by position."""
        arrays = iter(self.arrays)
        return {kind: tuple(itertools.islice(arrays, len(specs))) for kind, specs in self.specs.items()}

    @functools.cached_property
    def stored(self) -> dict[str, tuple[Slot, ...]]:
        """What a state stores in each slot of each kind's part."""
        stored = {}
        for kind, arrays in self.by_kind.items():
            contents = self.slots[self.kind_index[kind]]
            stored[kind] = tuple(
                Slot(kind, index, tuple(arrays[position] for position in content.positions), content)
                if isinstance(content, PackedBuffer)
                else Slot(kind, index, (arrays[content],), None)
                for index, content in enumerate(contents)
            )
        return stored

    @functools.cached_property
    def buffers(self) -> tuple[Slot, ...]:
        """The slots that hold several arrays, kind by kind."""
        return tuple(slot for slots in self.stored.values() for slot in slots if slot.buffer is not None)

    @functools.cached_property
    def _starts(self) -> tuple[int, ...]:
        """For all that is derived, the position of its first array in its kind."""
        used = {one.into: sum(len(row.specs) for row in self.rows if row.kind == one.into) for one in self.derived}
        starts = []
        for one in self.derived:
            starts.append(used[one.into])
            used[one.into] += len(one.layout.specs)
        return tuple(starts)

    @functools.cached_property
    def _owners(self) -> dict[str, list[tuple[Leaf, Derived | None]]]:
        """For each array of each kind, the leaf that it belongs to, and what it is derived with."""
        owners: dict[str, list[tuple[Leaf, Derived | None]]] = {kind: [] for kind in self.kinds}
        leaves = iter(self.leaves)
        for row in self.rows:
            owners[row.kind].extend([(next(leaves), None)] * len(row.specs))
        for one in self.derived:
            owners[one.into].extend((leaf, one) for leaf in itertools.islice(leaves, len(one.layout.specs)))
        return owners

    @functools.cached_property
    def derived_arrays(self) -> tuple[DerivedArrays, ...]:
        """All that is derived, each with its own arrays and those that it is derived from."""
        placed = []
        for index, (one, start) in enumerate(zip(self.derived, self._starts, strict=True)):
            own = self.by_kind[one.into][start : start + len(one.layout.specs)]
            sources = tuple(
                array
                for span in self.spans
                if span.kind in one.kinds
                for array in self.by_kind[span.kind][span.start : span.stop]
            )
            placed.append(DerivedArrays(one, index, start, own, sources))
        return tuple(placed)

    def numbers(self, spots: Iterable[tuple[str, int]]) -> list[int]:
        """Returns the numbers of arrays, from their kinds and positions."""
        return [self.by_kind[kind][position].number for kind, position in spots]

    def arrays_of(self, derived: Derived) -> DerivedArrays:
        """Returns something derived with its arrays."""
        return self.derived_arrays[self.derived.index(derived)]

    @functools.cached_property
    def kind_index(self) -> dict[str, int]:
        """The position of each kind."""
        return {kind: position for position, kind in enumerate(self.kinds)}

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many slots each kind's part has."""
        return tuple(map(len, self.stored_specs.values()))

    @functools.cached_property
    def held_specs(self) -> dict[str, tuple[ArraySpec, ...]]:
        """The same as a state holds them: what lies per device has a leading axis, members have theirs before it."""
        if self.ensemble is not None:
            return {kind: self.ensemble.grown(kind, specs) for kind, specs in self.ensemble.single.held_specs.items()}
        per_device = self.per_device
        return {kind: per_device.held(kind, specs) if per_device else specs for kind, specs in self.specs.items()}

    @functools.cached_property
    def stored_specs(self) -> dict[str, tuple[ArraySpec, ...]]:
        """Shape and dtype of what stands in each slot of each kind's part."""
        if self.ensemble is not None:
            count, axes, single = self.ensemble.number, self.slot_axes, self.ensemble.single
            return {
                kind: tuple(
                    ArraySpec(grown(spec.shape, axis, count), spec.dtype)
                    for spec, axis in zip(specs, axes[kind], strict=True)
                )
                for kind, specs in single.stored_specs.items()
            }
        stored = {}
        for kind, specs in self.held_specs.items():
            packing = self.packing.get(kind)
            if packing:
                specs = (*(specs[at] for at in packing.loose), *(buffer.spec for buffer in packing.buffers))
            stored[kind] = specs
        return stored

    @functools.cached_property
    def slots(self) -> tuple[tuple[int | PackedBuffer, ...], ...]:
        """For each kind (by its number), what stands in each slot: the array at a position, or a buffer of several."""
        slots: list[tuple[int | PackedBuffer, ...]] = []
        for kind, specs in self.specs.items():
            packing = self.packing.get(kind)
            slots.append((*packing.loose, *packing.buffers) if packing else tuple(range(len(specs))))
        return tuple(slots)

    @functools.cached_property
    def slot_axes(self) -> dict[str, tuple[Axis, ...]]:
        """For each kind the axis of the members in each slot of its part; all None where the plan is of one model."""
        return {kind: tuple(slot.arrays[0].axis for slot in slots) for kind, slots in self.stored.items()}

    @functools.cached_property
    def leaf_of_slot(self) -> dict[str, list[Leaf]]:
        """For each kind, the leaf in each slot of its part; a buffer counts as one that is named for what it holds."""
        leaves = {}
        for kind, slots in self.stored.items():
            loose = sum(slot.buffer is None for slot in slots)
            leaves[kind] = [slot.leaf(slot.position - loose) for slot in slots]
        return leaves

    @functools.cached_property
    def slot_keys(self) -> tuple[Any, ...]:
        """A key for each slot of a state as a pytree: kind and path, made unique where paths only look alike."""
        derived = {leaf.path for leaf in self.leaves[len(self.rows) :]}
        names: dict[str, None] = {}
        for kind, leaves in self.leaf_of_slot.items():
            for leaf in leaves:
                # The paths of what is derived say already of what.
                path = leaf.path if leaf.path in derived else (kind, *leaf.path)
                name = plain = format_path(path)
                again = 1
                while name in names:
                    again += 1
                    name = f"{plain}#{again}"
                names[name] = None
        return tuple(map(jax.tree_util.DictKey, names))

    def unpack(self, kind: str, part: tuple[Any, ...]) -> tuple[Any, ...]:
        """A kind's arrays in order, from what stands in the slots of its part."""
        packing = self.packing.get(kind)
        members = self.ensemble
        if packing is None or members is None or not all(hasattr(array, "dtype") for array in part):
            return unpack(packing, part) if packing else part
        if is_abstract(part):
            return tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in self.held_specs[kind])
        return tuple(members.each(lambda part: unpack(packing, part), part, self.slot_axes[kind], members.of(kind)))

    def pack(self, kind: str, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """What stands in the slots of a kind's part, from its arrays in order."""
        packing = self.packing.get(kind)
        members = self.ensemble
        if packing is None or members is None:
            return pack(packing, arrays) if packing else arrays
        return tuple(members.each(lambda arrays: pack(packing, arrays), arrays, members.of(kind), self.slot_axes[kind]))

    @functools.cached_property
    def leaf_of_array(self) -> dict[str, list[Leaf]]:
        """For each kind, the leaf that each array of its part belongs to."""
        return {kind: [leaf for leaf, _ in part] for kind, part in self._owners.items()}

    # --- tables made from these ------------------------------------------------------------------------------

    def changed(self, **parts: Any) -> PlanTables:
        """Returns these tables with some parts changed; of an ensemble, with those of one member changed."""
        if self.ensemble is not None:
            return self.ensemble.single.changed(**parts).with_members(self.ensemble)
        return intern(dataclasses.replace(self, **parts))

    def with_specs(self, specs: Mapping[str, Sequence[ArraySpec]]) -> PlanTables:
        """This plan with other shapes or dtypes in the rows of the model."""
        if self.ensemble is not None:
            of_one = {kind: self.ensemble.shrunk(kind, own) for kind, own in specs.items()}
            return self.ensemble.single.with_specs(of_one).with_members(self.ensemble)
        rows = [
            row._replace(specs=tuple(specs[span.kind][span.start : span.stop])) if span.kind in specs else row
            for row, span in zip(self.rows, self.spans, strict=True)
        ]
        # What would be derived from leaves of these dtypes does not matter: it is there already.
        by_path = {row.path: row.specs for row in rows}
        derived = tuple(
            one.recast(by_path, specs.get(one.into, self.specs[one.into])[start : start + len(one.layout.specs)])
            for one, start in zip(self.derived, self._starts, strict=True)
        )
        plain = self.changed(rows=tuple(rows), derived=derived, packing={}, per_device=None)
        return plain.with_packing(tuple(self.packing)) if self.packing else plain

    def with_packing(self, kinds: Sequence[str]) -> PlanTables:
        """This plan with the small arrays of these kinds in few buffers."""
        if self.ensemble is not None:
            return self.ensemble.single.with_packing(kinds).with_members(self.ensemble)
        return self.changed(packing=choose(self.specs, kinds, self.derived_arrays), per_device=None)

    @property
    def plain(self) -> PlanTables:
        """This plan with nothing packed, and nothing per device."""
        if not self.packing and not self.per_device:
            return self
        return self.changed(packing={}, per_device=None)

    # --- ensembles ---------------------------------------------------------------------------------------------

    @property
    def members(self) -> int | None:
        """How many members the plan of an ensemble has; None for a plan of one model."""
        return None if self.ensemble is None else self.ensemble.number

    def with_members(self, members: Members) -> PlanTables:
        """The plan of as many members, each as this plan has it, along the same axes."""
        members = members._replace(single=self)
        rows = [
            row._replace(specs=members.grown_at(span.kind, span.start, row.specs))
            for row, span in zip(self.rows, self.spans, strict=True)
        ]
        derived = [
            dataclasses.replace(one, overridden=members.grown_at(one.into, start, one.layout.specs))
            for one, start in zip(self.derived, self._starts, strict=True)
        ]
        return intern(dataclasses.replace(self, rows=tuple(rows), derived=tuple(derived), ensemble=members))
