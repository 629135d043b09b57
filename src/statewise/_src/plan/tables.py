"""The static tables of a plan: where each array of each leaf stands in a state.

A state keeps one part for each kind.  Two numberings of a kind's arrays are in use.  In the order of the plan each
array has a *position*; a packed part stores several arrays in one buffer, so what it holds is counted in *slots*.
Without packing the two are the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from statewise._src.common.nnx_graph import ONE, Spec, make_leaf
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.ties import aliases_of
from statewise._src.core.kinds import Kinds
from statewise._src.plan.averages import Average
from statewise._src.plan.derived import Derived
from statewise._src.plan.leaf_specs import Row, Span
from statewise._src.plan.members import Axis, Members, grown
from statewise._src.plan.optimizer_state import OPTIMIZER, Group
from statewise._src.plan.packing import Buffer, Packing, pack, unpack
from statewise._src.plan.per_device import Copies

__all__ = ["OPTIMIZER", "Layout"]


class Layout:
    """Where each array of each leaf stands; the base of `Plan`, which says what the leaves are."""

    kinds: Kinds
    _graphdef: Any
    _objects: int
    _several: bool
    _names: tuple[str, ...]  # of the objects, if they have any
    _rows: tuple[Row, ...]
    _derived: tuple[Derived, ...]  # the optimizers first
    _packing: Mapping[str, Packing]
    _copies: Copies | None
    _members: Members | None

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The rows, as data: path, kind, type, shape, dtype, aliases, elements, bytes."""
        aliases = aliases_of(self._graphdef, [row.path for row in self._rows], self._several, self._names)
        mine = [
            make_leaf(row.path, row.type, row.specs, row.structure is ONE, row.kind, aliases.get(row.path, ()))
            for row in self._rows
        ]
        derived = [
            make_leaf(path, jax.Array, [spec], True, one.into)
            for one in self._derived
            for path, spec in zip(one.leaf_paths, one.layout.specs, strict=True)
        ]
        return tuple(mine + derived)

    @property
    def _calls(self) -> Sequence[Any]:
        """What each object is called in paths: its name or its position."""
        return self._names or range(self._objects)

    def _relative(self, path: Path) -> Path:
        """A leaf's path as filters, and functions of a path, see it: relative to its object, if that has no name."""
        return path[1:] if self._several and not self._names else path

    @functools.cached_property
    def _groups(self) -> tuple[Group, ...]:
        """The optimizers."""
        return tuple(one for one in self._derived if isinstance(one, Group))

    @functools.cached_property
    def _averages(self) -> tuple[Average, ...]:
        """The averages, one for each kind and name."""
        return tuple(one for one in self._derived if isinstance(one, Average))

    @functools.cached_property
    def _specs(self) -> dict[str, tuple[Spec, ...]]:
        """Shape and dtype of each array of each kind's part, in the order in which a state holds them."""
        parts: dict[str, list[Spec]] = {kind: [] for kind in self.kinds}
        for row in self._rows:
            parts[row.kind].extend(row.specs)
        for one in self._derived:
            parts[one.into].extend(one.layout.specs)
        return {kind: tuple(part) for kind, part in parts.items()}

    @functools.cached_property
    def _spans(self) -> tuple[Span, ...]:
        """For each row, in order, where its arrays stand in its kind's part."""
        used = dict.fromkeys(self.kinds, 0)
        spans = []
        for row in self._rows:
            start = used[row.kind]
            used[row.kind] = start + len(row.specs)
            spans.append(Span(row.kind, start, used[row.kind], row.structure))
        return tuple(spans)

    @functools.cached_property
    def _derived_spans(self) -> tuple[tuple[int, int], ...]:
        """For all that is derived, in order, where its arrays stand in the part of its kind."""
        used = {one.into: sum(len(row.specs) for row in self._rows if row.kind == one.into) for one in self._derived}
        spans = []
        for one in self._derived:
            start = used[one.into]
            used[one.into] = start + len(one.layout.specs)
            spans.append((start, used[one.into]))
        return tuple(spans)

    @property
    def _moment_spans(self) -> tuple[tuple[int, int], ...]:
        """For each optimizer, where its state's arrays stand in the part of kind `optimizer`."""
        return self._derived_spans[: len(self._groups)]

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        """The position of each kind."""
        return {kind: position for position, kind in enumerate(self.kinds)}

    @functools.cached_property
    def _sizes(self) -> tuple[int, ...]:
        """How many slots each kind's part has."""
        return tuple(map(len, self._stored.values()))

    @functools.cached_property
    def _held(self) -> dict[str, tuple[Spec, ...]]:
        """The same as a state holds them: what lies per device has a leading axis, members have theirs before it."""
        if self._members is not None:
            return {kind: self._members.grown(kind, specs) for kind, specs in self._members.single._held.items()}
        copies = self._copies
        return {kind: copies.held(kind, specs) if copies else specs for kind, specs in self._specs.items()}

    @functools.cached_property
    def _stored(self) -> dict[str, tuple[Spec, ...]]:
        """Shape and dtype of what stands in each slot of each kind's part."""
        if self._members is not None:
            count, axes, single = self._members.number, self._slot_axes, self._members.single
            return {
                kind: tuple(
                    Spec(grown(spec.shape, axis, count), spec.dtype)
                    for spec, axis in zip(specs, axes[kind], strict=True)
                )
                for kind, specs in single._stored.items()
            }
        stored = {}
        for kind, specs in self._held.items():
            packing = self._packing.get(kind)
            if packing:
                specs = (*(specs[at] for at in packing.loose), *(buffer.spec for buffer in packing.buffers))
            stored[kind] = specs
        return stored

    @functools.cached_property
    def _slots(self) -> tuple[tuple[int | Buffer, ...], ...]:
        """For each kind (by its number), what stands in each slot: the array at a position, or a buffer of several."""
        slots: list[tuple[int | Buffer, ...]] = []
        for kind, specs in self._specs.items():
            packing = self._packing.get(kind)
            slots.append((*packing.loose, *packing.buffers) if packing else tuple(range(len(specs))))
        return tuple(slots)

    @functools.cached_property
    def _slot_axes(self) -> dict[str, tuple[Axis, ...]]:
        """For each kind the axis of the members in each slot of its part; all None where the plan is of one model."""
        members = self._members
        if members is None:
            return {kind: (None,) * size for kind, size in zip(self.kinds, self._sizes, strict=True)}
        return {
            kind: tuple(members.of(kind)[slot if isinstance(slot, int) else slot.positions[0]] for slot in here)
            for kind, here in zip(self.kinds, self._slots, strict=True)
        }

    def _axis(self, kind: str, position: int) -> Axis:
        """The axis of the members in one array; None where there is none."""
        return None if self._members is None else self._members.of(kind)[position]

    @functools.cached_property
    def _offsets(self) -> tuple[int, ...]:
        """For each kind (by its number), how many arrays the kinds before it have."""
        return (0, *itertools.accumulate(map(len, self._specs.values())))

    @functools.cached_property
    def _leaf_of_slot(self) -> dict[str, list[Leaf]]:
        """For each kind, the leaf in each slot of its part; a buffer counts as one that is named for what it holds."""
        leaves = {}
        for kind, rows in self._row_of_array.items():
            packing = self._packing.get(kind)
            if packing:
                rows = [rows[at] for at in packing.loose]
                for number, buffer in enumerate(packing.buffers):
                    name = f"buffer {number} of {len(buffer.positions)} arrays"
                    rows.append(Leaf((name,), kind, jax.Array, buffer.spec.shape, buffer.spec.dtype))
            leaves[kind] = rows
        return leaves

    @functools.cached_property
    def _keys(self) -> tuple[Any, ...]:
        """A key for each slot of a state as a pytree: kind and path, made unique where paths only look alike."""
        derived = {leaf.path for leaf in self.leaves[len(self._rows) :]}
        names: dict[str, None] = {}
        for kind, leaves in self._leaf_of_slot.items():
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

    def _unpacked(self, kind: str, part: tuple[Any, ...]) -> tuple[Any, ...]:
        """A kind's arrays in order, from what stands in the slots of its part."""
        packing = self._packing.get(kind)
        members = self._members
        if packing is None or members is None or not all(hasattr(array, "dtype") for array in part):
            return unpack(packing, part) if packing else part
        if any(isinstance(array, jax.ShapeDtypeStruct) for array in part):
            return tuple(jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in self._held[kind])
        return tuple(members.each(lambda part: unpack(packing, part), part, self._slot_axes[kind], members.of(kind)))

    def _packed(self, kind: str, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """What stands in the slots of a kind's part, from its arrays in order."""
        packing = self._packing.get(kind)
        members = self._members
        if packing is None or members is None:
            return pack(packing, arrays) if packing else arrays
        return tuple(
            members.each(lambda arrays: pack(packing, arrays), arrays, members.of(kind), self._slot_axes[kind])
        )

    def _params_of(self, group: Derived) -> list[tuple[str, int]]:
        """Kind and position of each array that something is derived from, in its order."""
        return [
            (span.kind, position)
            for span in self._spans
            if span.kind in group.kinds
            for position in range(span.start, span.stop)
        ]

    @functools.cached_property
    def _row_of_array(self) -> dict[str, list[Leaf]]:
        """For each kind, the leaf that each array of its part belongs to."""
        rows: dict[str, list[Leaf]] = {kind: [] for kind in self.kinds}
        arrays = [len(row.specs) for row in self._rows] + [1] * (len(self.leaves) - len(self._rows))
        for leaf, count in zip(self.leaves, arrays, strict=True):
            rows[leaf.kind or ""].extend([leaf] * count)
        return rows
