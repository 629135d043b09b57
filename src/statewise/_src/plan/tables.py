"""The static tables of a plan: where each array of each leaf is in a state, and the tables of plans made from it.

A state has one part for each kind.  Two numberings of a kind's arrays are in use.  In the order of the plan each array
has a *position*; a packed part stores several arrays in one buffer, so its contents are counted in *slots*.  Without
packing the two are equal.

Tables contain no arrays and are hashable, and equal tables are one object, so that JAX compares the static parts of two
states by identity.  The rows are in the order of NNX's flat leaves; a state groups arrays by kind, and `spans` says
which arrays of which kind make up each leaf.  The tables of an ensemble are made from those of one member: a change to
them changes the member's tables, and makes the ensemble's again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from statewise._src.common.known_graph import KnownGraph, known_graph, values_if_fit
from statewise._src.common.nnx_graph import ONE, ArraySpec, ModelGraph, is_abstract, make_leaf, read_graph
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.ties import aliases_of
from statewise._src.plan.arrays import ArrayInfo, DerivedArrays, Slot
from statewise._src.plan.averages import Average
from statewise._src.plan.depends_on import all_sources
from statewise._src.plan.derived import Derived
from statewise._src.plan.intern import intern
from statewise._src.plan.kind import Kind, unknown_kind
from statewise._src.plan.leaf_specs import LeafSpec, Span
from statewise._src.plan.members import Axis, Members, grown
from statewise._src.plan.optimizer_state import OPTIMIZER, OptimizerGroup
from statewise._src.plan.packing import Packing, choose, pack, unpack
from statewise._src.plan.per_device import PerDeviceArrays

__all__ = ["OPTIMIZER", "PlanTables"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PlanTables:
    """A plan, resolved and without arrays: where each array of each leaf is.

    Attributes:
      kinds: the declaration, with the kind `optimizer` added if there are optimizers, and a kind for each average.
      graphdef: NNX's graph definition of the objects.
      rows: what is known about each leaf of the model.
      derived: the optimizers, then the averages.
      object_count: the number of planned objects.
      names: the objects' names, if they were planned by name.
      excluded: leaves that an earlier `sow` left in the model and that are not part of a state.
      packing: which kinds are packed, and how.
      per_device: which arrays are stored per device; None if none is, or if the plan was not placed on a mesh.
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
        """Returns whether paths begin with an object's name or position."""
        return self.object_count > 1 or bool(self.names)

    def __getitem__(self, kind: str) -> tuple[Leaf, ...]:
        if kind not in self.kinds:
            raise unknown_kind(kind, self.kinds)
        return tuple(leaf for leaf in self.leaves if leaf.kind == kind)

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}={len(specs)}" for kind, specs in self.specs.items() if specs)
        return f"Plan({'' if self.members is None else f'an ensemble of {self.members}: '}{counts})"

    # Identity is equality: `intern` returns one object for equal tables, so a copy would be unequal.

    def __deepcopy__(self, memo: object = None) -> PlanTables:
        return self

    __copy__ = __deepcopy__

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Returns the leaves of the model, then the derived leaves."""
        aliases = aliases_of(self.graphdef, [row.path for row in self.rows], self.several, self.names)
        of_model = [
            make_leaf(row.path, row.type, row.specs, row.structure is ONE, row.kind, aliases.get(row.path, ()))
            for row in self.rows
        ]
        derived = [
            make_leaf(path, jax.Array, [spec], True, each.into)
            for each in self.derived
            for path, spec in zip(each.leaf_paths, each.layout.specs, strict=True)
        ]
        return tuple(of_model + derived)

    @functools.cached_property
    def known_graph(self) -> KnownGraph | None:
        """Returns the graph definition, as objects are compared with it without flattening them."""
        return known_graph(self.graphdef)

    def read_fitting(self, objects: Sequence[Any]) -> tuple[list[Any], list[Any]] | None:
        """Returns the live leaves of objects that are exactly as planned, row by row, and what they hold.

        The answer is None if they differ, even in ways that are allowed (functions among their static attributes), or
        if it is not certain that they do not.
        """
        leaves = self._known_leaves(objects) if len(objects) == self.object_count else None
        values = None if leaves is None else values_if_fit(leaves, [(row.specs, row.structure) for row in self.rows])
        return None if leaves is None or values is None else (leaves, values)

    def read(self, objects: Sequence[Any]) -> ModelGraph:
        """Returns objects, flattened; fast for those that are as planned."""
        leaves = self._known_leaves(objects)
        if leaves is None:
            return read_graph(objects, self.names)
        return ModelGraph(
            self.graphdef, tuple([row.path for row in self.rows]), tuple(leaves), self.several, self.names
        )

    def _known_leaves(self, objects: Sequence[Any]) -> list[Any] | None:
        root = tuple(objects) if self.several else objects[0]
        return None if self.known_graph is None else self.known_graph.leaves_of(root)

    @property
    def object_labels(self) -> Sequence[str | int]:
        """Returns the first key of each object's paths: its name or its position."""
        return self.names or range(self.object_count)

    def relative(self, path: Path) -> Path:
        """Returns a path as filters and functions of a path receive it: within its object, if that has no name."""
        return path[1:] if self.several and not self.names else path

    @functools.cached_property
    def optimizers(self) -> tuple[OptimizerGroup, ...]:
        """Returns the optimizers."""
        return tuple(cast(OptimizerGroup, each) for each in self.derived if each.trains)

    @functools.cached_property
    def averages(self) -> tuple[Average, ...]:
        """Returns the averages, one for each kind and name."""
        return tuple(cast(Average, each) for each in self.derived if each.mirrors)

    # --- arrays by position ----------------------------------------------------------------------------------

    @functools.cached_property
    def specs(self) -> dict[str, tuple[ArraySpec, ...]]:
        """Returns the shape and dtype of each array of each kind, by position."""
        parts: dict[str, list[ArraySpec]] = {kind: [] for kind in self.kinds}
        for row in self.rows:
            parts[row.kind].extend(row.specs)
        for each in self.derived:
            parts[each.into].extend(each.layout.specs)
        return {kind: tuple(part) for kind, part in parts.items()}

    @functools.cached_property
    def held_specs(self) -> dict[str, tuple[ArraySpec, ...]]:
        """Returns the same as a state holds them: with the axis of values per device, then with that of the members."""
        if self.ensemble is not None:
            return {kind: self.ensemble.grown(kind, specs) for kind, specs in self.ensemble.single.held_specs.items()}
        per_device = self.per_device
        return {kind: per_device.held(kind, specs) if per_device else specs for kind, specs in self.specs.items()}

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """Returns the positions of each row's arrays, in the order of the rows."""
        stops = dict.fromkeys(self.kinds, 0)
        spans = []
        for row in self.rows:
            start = stops[row.kind]
            stops[row.kind] = start + len(row.specs)
            spans.append(Span(row.kind, start, stops[row.kind], row.structure))
        return tuple(spans)

    @functools.cached_property
    def _starts(self) -> tuple[int, ...]:
        """Returns the position of the first array of each optimizer and average: after the model's, one by one."""
        stops = dict.fromkeys(self.kinds, 0) | {span.kind: span.stop for span in self.spans}
        starts = []
        for each in self.derived:
            starts.append(stops[each.into])
            stops[each.into] += len(each.layout.specs)
        return tuple(starts)

    @functools.cached_property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        """Returns every array of a state, by number: kind by kind, in the order of the plan."""
        owners: dict[str, list[tuple[Leaf, Derived | None]]] = {kind: [] for kind in self.kinds}
        leaves = iter(self.leaves)
        for row in self.rows:
            owners[row.kind].extend([(next(leaves), None)] * len(row.specs))
        for each in self.derived:  # a derived leaf is one array
            owners[each.into].extend((leaf, each) for leaf in itertools.islice(leaves, len(each.layout.specs)))
        arrays: list[ArrayInfo] = []
        for kind, specs in self.specs.items():
            slots = self.packing[kind].slots() if kind in self.packing else {}
            devices = dict.fromkeys(self.per_device.of(kind), self.per_device.devices) if self.per_device else {}
            axes = self.ensemble.of(kind) if self.ensemble else (None,) * len(specs)
            for position, (spec, held, axis) in enumerate(zip(specs, self.held_specs[kind], axes, strict=True)):
                slot, buffer = slots.get(position, (position, None))
                leaf, derived = owners[kind][position]
                own = devices.get(position, 0)
                info = ArrayInfo(len(arrays), kind, position, slot, buffer, leaf, spec, held, derived, own, axis)
                arrays.append(info)
        return tuple(arrays)

    @functools.cached_property
    def compute_dtypes(self) -> dict[int, Any]:
        """Returns the dtype in which functions see an array, by its number, where that is not its own."""
        return {
            array.number: dtype
            for array in self.arrays
            if (compute := self.kinds[array.kind].compute) is not None
            and array.derived is None
            and jnp.issubdtype(array.spec.dtype, jnp.floating)
            and (dtype := jnp.dtype(compute)) != array.spec.dtype
        }

    @functools.cached_property
    def by_kind(self) -> dict[str, tuple[ArrayInfo, ...]]:
        """Returns the arrays of each kind, by position."""
        arrays = iter(self.arrays)
        return {kind: tuple(itertools.islice(arrays, len(specs))) for kind, specs in self.specs.items()}

    @functools.cached_property
    def derived_arrays(self) -> tuple[DerivedArrays, ...]:
        """Returns each optimizer and average with its own arrays and its sources."""
        located = []
        for order, (each, start) in enumerate(zip(self.derived, self._starts, strict=True)):
            own = self.by_kind[each.into][start : start + len(each.layout.specs)]
            spans = [span for span in self.spans if span.kind in each.kinds]
            sources = tuple(array for span in spans for array in self.by_kind[span.kind][span.start : span.stop])
            located.append(DerivedArrays(each, order, start, own, sources))
        return tuple(located)

    def numbers(self, spots: Iterable[tuple[str, int]]) -> list[int]:
        """Returns the numbers of arrays, from their kinds and positions."""
        return [self.by_kind[kind][position].number for kind, position in spots]

    def arrays_of(self, derived: Derived) -> DerivedArrays:
        """Returns an optimizer or an average with its arrays."""
        return self.derived_arrays[self.derived.index(derived)]

    @functools.cached_property
    def kind_index(self) -> dict[str, int]:
        """Returns the index of each kind."""
        return {kind: index for index, kind in enumerate(self.kinds)}

    @functools.cached_property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """Returns, for each kind that depends on others (`depends_on`), all that it depends on; empty if none does."""
        return all_sources(self.kinds, [kind for kind, specs in self.specs.items() if specs])

    # --- what a state stores, by slot ------------------------------------------------------------------------

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Returns the number of slots of each kind's part."""
        packings = ((specs, self.packing.get(kind)) for kind, specs in self.specs.items())
        return tuple(len(p.loose) + len(p.buffers) if p else len(specs) for specs, p in packings)

    @functools.cached_property
    def stored(self) -> dict[str, tuple[Slot, ...]]:
        """Returns what a state stores of each kind, by slot: arrays that are stored alone, then the buffers."""
        stored = {}
        for kind, arrays in self.by_kind.items():
            loose, buffers = self.packing.get(kind, (range(len(arrays)), ()))
            alone = [arrays[position] for position in loose]
            slots = [Slot(kind, slot, (array,), None, array.leaf, array.held) for slot, array in enumerate(alone)]
            for number, buffer in enumerate(buffers):
                own, spec = tuple(arrays[position] for position in buffer.positions), buffer.spec
                leaf = Leaf((f"buffer {number} of {len(own)} arrays",), kind, jax.Array, spec.shape, spec.dtype)
                # A packing describes one member; the arrays of a buffer have the members along one axis.
                if self.ensemble is not None:
                    spec = spec._replace(shape=grown(spec.shape, own[0].axis, self.ensemble.number))
                slots.append(Slot(kind, len(slots), own, buffer, leaf, spec))
            stored[kind] = tuple(slots)
        return stored

    @functools.cached_property
    def buffers(self) -> tuple[Slot, ...]:
        """Returns the slots that store several arrays, kind by kind."""
        return tuple(slot for slots in self.stored.values() for slot in slots if slot.buffer is not None)

    @functools.cached_property
    def slot_axes(self) -> dict[str, tuple[Axis, ...]]:
        """Returns the members' axis in each slot of each kind's part; all None in the plan of one model."""
        return {kind: tuple(slot.axis for slot in slots) for kind, slots in self.stored.items()}

    @functools.cached_property
    def slot_keys(self) -> tuple[jax.tree_util.DictKey, ...]:
        """Returns the key of each slot in a state as a pytree: kind and path, numbered if several are the same text."""
        derived = {leaf.path for leaf in self.leaves[len(self.rows) :]}
        names: dict[str, None] = {}
        for slot in itertools.chain.from_iterable(self.stored.values()):
            path = slot.leaf.path
            # The path of a derived leaf starts with its kind already.
            name = format_path(path if path in derived else (slot.kind, *path))
            if name in names:
                numbered = (f"{name}#{number}" for number in itertools.count(2))
                name = next(each for each in numbered if each not in names)
            names[name] = None
        return tuple(map(jax.tree_util.DictKey, names))

    def unpack(self, kind: str, part: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns a kind's arrays in order, from what is stored in the slots of its part."""
        packing = self.packing.get(kind)
        members = self.ensemble
        if packing is None:
            return part
        if members is None or not all(hasattr(array, "dtype") for array in part):  # axes have no dtype
            return unpack(packing, part)
        if is_abstract(part):
            return tuple(jax.ShapeDtypeStruct(*spec) for spec in self.held_specs[kind])
        return tuple(members.each(lambda part: unpack(packing, part), part, self.slot_axes[kind], members.of(kind)))

    def pack(self, kind: str, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns what is stored in the slots of a kind's part, from its arrays in order."""
        packing = self.packing.get(kind)
        members = self.ensemble
        if packing is None:
            return arrays
        if members is None:
            return pack(packing, arrays)
        return tuple(members.each(lambda arrays: pack(packing, arrays), arrays, members.of(kind), self.slot_axes[kind]))

    # --- tables made from these ------------------------------------------------------------------------------

    def changed(self, **parts: Any) -> PlanTables:
        """Returns these tables with some parts changed; for an ensemble, the parts of one member."""
        if self.ensemble is not None:
            return self.ensemble.single.changed(**parts).with_members(self.ensemble)
        return intern(dataclasses.replace(self, **parts))

    def with_specs(self, specs: Mapping[str, Sequence[ArraySpec]]) -> PlanTables:
        """Returns these tables with other shapes or dtypes of some kinds' arrays."""
        if self.ensemble is not None:
            of_one = {kind: self.ensemble.shrunk(kind, own) for kind, own in specs.items()}
            return self.ensemble.single.with_specs(of_one).with_members(self.ensemble)
        rows = [
            row._replace(specs=tuple(specs[span.kind][span.start : span.stop])) if span.kind in specs else row
            for row, span in zip(self.rows, self.spans, strict=True)
        ]
        # Derived arrays exist already: `init` of leaves with these dtypes may have made other ones.
        by_path = {row.path: row.specs for row in rows}
        derived = tuple(
            each.recast(by_path, specs.get(each.into, self.specs[each.into])[start : start + len(each.layout.specs)])
            for each, start in zip(self.derived, self._starts, strict=True)
        )
        plain = self.changed(rows=tuple(rows), derived=derived, packing={}, per_device=None)
        return plain.with_packing(tuple(self.packing)) if self.packing else plain

    def with_packing(self, kinds: Sequence[str]) -> PlanTables:
        """Returns these tables with the small arrays of these kinds in few buffers."""
        if self.ensemble is not None:
            return self.ensemble.single.with_packing(kinds).with_members(self.ensemble)
        return self.changed(packing=choose(self.specs, kinds, self.derived_arrays), per_device=None)

    @property
    def plain(self) -> PlanTables:
        """Returns these tables with nothing packed, and nothing per device."""
        return self.changed(packing={}, per_device=None) if self.packing or self.per_device else self

    # --- ensembles ---------------------------------------------------------------------------------------------

    @property
    def members(self) -> int | None:
        """Returns the number of members in the plan of an ensemble; None in the plan of one model."""
        return None if self.ensemble is None else self.ensemble.number

    def with_members(self, members: Members) -> PlanTables:
        """Returns the tables of an ensemble of models with these tables: as many, along the same axes."""
        members = members._replace(single=self)
        rows = [
            row._replace(specs=members.grown(span.kind, row.specs, span.start))
            for row, span in zip(self.rows, self.spans, strict=True)
        ]
        derived = [
            dataclasses.replace(each, overridden=members.grown(each.into, each.layout.specs, start))
            for each, start in zip(self.derived, self._starts, strict=True)
        ]
        return intern(dataclasses.replace(self, rows=tuple(rows), derived=tuple(derived), ensemble=members))
