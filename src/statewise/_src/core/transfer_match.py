"""A leaf of a transfer's target and its counterpart in the source: how they differ, and what to do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from statewise._src.common.compare import MISSING, Field, LeafFacts, compare_leaf, note_of, uncastable
from statewise._src.common.nnx_graph import ONE, ArraySpec
from statewise._src.common.paths import Leaf, format_path
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.members import Axis, place_of, shrunk
from statewise._src.plan.tables import PlanTables

__all__ = ["OTHER", "TIED", "PlacedLeaf", "difference", "leaves_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedLeaf:
    """A leaf of a plan with its arrays.

    Attributes:
      leaf: the leaf.
      arrays: its arrays in the plan.
      structure: the structure of its value.
      members: the number of members in the plan of an ensemble; 0 otherwise.
    """

    leaf: Leaf
    arrays: tuple[ArrayInfo, ...]
    structure: Any
    members: int

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        """Returns shape and dtype of each array."""
        return tuple(array.spec for array in self.arrays)

    @property
    def devices(self) -> int:
        """Returns the number of devices that have values of their own; 0 if there is one value for all."""
        return max((array.devices for array in self.arrays), default=0)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Returns the axis of the members in each array, from the front."""
        return tuple(
            None if array.axis is None else place_of(array.axis, len(array.spec.shape)) for array in self.arrays
        )

    @property
    def member_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of one member's arrays."""
        return tuple(shrunk(array.spec.shape, axis) for array, axis in zip(self.arrays, self.axes, strict=True))


def leaves_of(plan: PlanTables) -> Iterator[PlacedLeaf]:
    """Yields every leaf of a plan, those of the objects first, then the derived ones."""
    members = plan.members or 0
    for span, leaf in zip(plan.spans, plan.leaves, strict=False):
        yield PlacedLeaf(leaf, plan.by_kind[span.kind][span.start : span.stop], span.structure, members)
    for array in (array for derived in plan.derived_arrays for array in derived.arrays):
        yield PlacedLeaf(array.leaf, (array,), ONE, members)


OTHER = "the models differ: plan the target's model as the source's was made"
_CAST = "sw.transfer(src, target, cast=True)  # or a dtype"
TIED = "tie them in the target as they are in the source: assign the same nnx.Variable, or two"


def difference(wanted: PlacedLeaf, sources: Sequence[PlacedLeaf], cast: bool) -> tuple[str, str]:
    """Returns how a leaf differs from its counterparts in the source, and a hint; both empty if it does not."""
    if not sources:
        return note_of(MISSING, "source"), ""  # one hint for all leaves together names what the source has
    if len(sources) > 1:
        names = " and ".join(format_path(source.leaf.path) for source in sources)
        return f"tied here, apart in the source as {names}", TIED
    (source,) = sources
    # First whether only the leading axes differ: a hint about the shape would be misleading then.
    if source.leaf.type is wanted.leaf.type and source.structure == wanted.structure:
        other = _other_axes(wanted, source)
        if other is not None:
            return other
    facts = (LeafFacts(placed.leaf.type, placed.specs, placed.structure) for placed in (wanted, source))
    mismatches = compare_leaf(*facts)
    end = uncastable(mismatches)
    only_dtypes = all(mismatch.field is Field.DTYPE for mismatch in mismatches)
    if not mismatches or (cast and only_dtypes and not end):
        return "", ""
    return note_of(mismatches, "source") + end, OTHER if end or not only_dtypes else _CAST


def _other_axes(wanted: PlacedLeaf, source: PlacedLeaf) -> tuple[str, str] | None:
    """Returns the note and hint for per-device values, or members of an ensemble, that do not fit; None if they do."""
    if source.devices and source.devices != wanted.devices:
        has_mean = all(jnp.issubdtype(spec.dtype, jnp.inexact) for spec in source.specs)
        how = "how='mean'), ...)  # or how='first'" if has_mean else "how='first'), ...)"
        note = f"has a value for each of {source.devices} devices in the source"
        return note, f"sw.transfer(src.reduce_devices({source.leaf.kind!r}, {how}"
    # Of ensembles of other numbers the shapes differ as well; say so only if those of one member are equal.
    if (source.members, source.axes) == (wanted.members, wanted.axes) or source.member_shapes != wanted.member_shapes:
        return None  # other shapes are reported as such
    of_ensemble = f"of an ensemble of {source.members} in the source"
    if not wanted.members:
        return of_ensemble, "one of its members: sw.transfer(src.member(0), ...)"
    if not source.members:
        if source.axes == wanted.axes:
            return None  # all members share it
        return "of one model in the source", "src.plan.stack([src, ...])  # a state for each member"
    if wanted.members != source.members:
        return of_ensemble, "sw.transfer(plan.stack([src.member(number) for number in (0, 1)]), ...)"
    axes = ", ".join(map(str, source.axes))
    return f"of members along axis {axes} in the source", "plan.stacked(...) with the axes of the source's plan"
