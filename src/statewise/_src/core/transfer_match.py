"""A leaf of a transfer's target, and its counterpart in the source: what each is, and what is in the way."""

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

__all__ = ["OTHER", "Found", "difference", "leaves_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A leaf, where its arrays stand, and how many values there are of each: one for each device, or 0.

    Of an ensemble also how many members there are, or 0, and along which axis of each array.
    """

    leaf: Leaf
    specs: tuple[ArraySpec, ...]
    structure: Any
    start: int
    devices: int
    members: int
    axes: tuple[Axis, ...]

    @property
    def facts(self) -> LeafFacts:
        """The leaf for a comparison."""
        return LeafFacts(self.leaf.type, self.specs, self.structure)

    @property
    def ones(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one member's arrays."""
        return tuple(shrunk(spec.shape, axis) for spec, axis in zip(self.specs, self.axes, strict=True))


def leaves_of(plan: PlanTables) -> Iterator[Found]:
    """Every leaf of a plan, what is derived after those of its objects."""
    copies, many = plan.per_device, plan.members or 0
    for row, span, leaf in zip(plan.rows, plan.spans, plan.leaves, strict=False):
        each = copies is not None and not copies.of(row.kind).isdisjoint(range(span.start, span.stop))
        axes = tuple(map(_axis, plan.by_kind[row.kind][span.start : span.stop]))
        yield Found(leaf, row.specs, row.structure, span.start, copies.devices if copies and each else 0, many, axes)
    for array in (array for one in plan.derived_arrays for array in one.arrays):
        yield Found(array.leaf, (array.spec,), ONE, array.position, array.devices, many, (_axis(array),))


def _axis(array: ArrayInfo) -> Axis:
    """Returns the axis of the members, from the front."""
    return array.axis if array.axis is None else place_of(array.axis, len(array.spec.shape))


OTHER = "the models differ: plan the target's model as the source's was made"
_CAST = "sw.transfer(src, target, cast=True)  # or a dtype"
_TIED = "tie them in the target as they are in the source: assign the same nnx.Variable, or two"


def difference(one: Found, sources: Sequence[Found], cast: bool) -> tuple[str, str]:
    """What is in the way of one leaf, and the hint; nothing if nothing is."""
    if not sources:
        return note_of(MISSING, "source"), ""  # one hint for all leaves together says what the source has
    if len(sources) > 1:
        names = " and ".join(format_path(found.leaf.path) for found in sources)
        return f"tied here, apart in the source as {names}", _TIED
    (found,) = sources
    if found.leaf.type is one.leaf.type and found.structure == one.structure:
        other = _other_devices(one, found) or _other_members(one, found)
        if other is not None:
            return other
    mismatches = compare_leaf(one.facts, found.facts)
    if not mismatches:
        return "", ""
    if any(mismatch.field is not Field.DTYPE for mismatch in mismatches):
        return note_of(mismatches, "source") + uncastable(mismatches), OTHER
    end = uncastable(mismatches)
    if cast and not end:
        return "", ""
    return note_of(mismatches, "source") + end, OTHER if end else _CAST


def _other_devices(one: Found, found: Found) -> tuple[str, str] | None:
    """What is in the way of values of each device, onto one or onto another number; None where nothing is."""
    if found.devices and found.devices != one.devices:
        has_mean = all(jnp.issubdtype(spec.dtype, jnp.inexact) for spec in found.specs)
        how = "how='mean'), ...)  # or how='first'" if has_mean else "how='first'), ...)"
        note = f"has a value of each of {found.devices} devices in the source"
        return note, f"sw.transfer(src.reduce_devices({found.leaf.kind!r}, {how}"
    return None


def _other_members(one: Found, found: Found) -> tuple[str, str] | None:
    """What is in the way between two ensembles, or an ensemble and one model; None where the array is the same."""
    if (found.members, found.axes) == (one.members, one.axes) or found.ones != one.ones:
        return None
    if not one.members and found.members:
        return f"of an ensemble of {found.members} in the source", "one of its members: sw.transfer(src.member(0), ...)"
    if one.members and not found.members:
        if found.axes == one.axes:
            return None  # all members share it
        return "of one model in the source", "src.plan.stack([src, ...])  # a state for each member"
    if one.members != found.members:
        several = "[src.member(number) for number in (0, 1)]"
        return f"of an ensemble of {found.members} in the source", f"sw.transfer(plan.stack({several}), ...)"
    axes = ", ".join(map(str, found.axes))
    return f"of members along axis {axes} in the source", "plan.stacked(...) with the axes of the source's plan"
