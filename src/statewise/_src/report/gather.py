"""The leaves of a report: of a plan, with each leaf's placement on a mesh, or of a checkpoint on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from statewise._src.common.paths import Leaf
from statewise._src.common.tables import leaf_dict
from statewise._src.inspect.memory import bytes_of_leaves
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.array_placement import ArrayPlacement
from statewise._src.sharding.mesh import axis_sizes
from statewise._src.sharding.resolve import resolve

__all__ = ["LeafReport", "describe_array_placement", "leaves_of"]

_EXCLUDED = "left by an earlier sow: not part of a state"


@dataclasses.dataclass(frozen=True, slots=True)
class LeafReport:
    """One leaf of a report.

    Attributes:
      leaf: the leaf.
      placement: its placement on the mesh, in words; empty if the report has no mesh.
      per_device: its bytes in each device's own memory; None if the report has no mesh.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
      >>> model = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
      >>> (kernel,) = sw.report(model, kinds=kinds, mesh={"data": 4}).leaves
      >>> kernel.placement, kernel.leaf.nbytes, kernel.per_device
      ('(data, -)', 512, 128)
    """

    leaf: Leaf
    placement: str = ""
    per_device: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the leaf as plain data."""
        data = leaf_dict(self.leaf)
        if self.per_device is not None:
            data |= {"placement": self.placement, "per_device": self.per_device}
        return data


def leaves_of(plan: PlanTables, mesh: Mesh | AbstractMesh | None = None) -> tuple[LeafReport, ...]:
    """Returns the leaves of a plan, and those that an earlier sow left beside it, as a census counts them.

    Args:
      plan: the plan.
      mesh: a mesh, concrete or abstract; None for no placements.

    Raises:
      PlacementError: leaves that cannot be placed on the mesh, all of them.
    """
    excluded = tuple(LeafReport(dataclasses.replace(leaf, note=_EXCLUDED)) for leaf in plan.excluded)
    if mesh is None:
        return (*map(LeafReport, plan.leaves), *excluded)
    placed = resolve(plan, mesh)
    bytes_of = bytes_of_leaves(plan, placed, axis_sizes(mesh))
    # The arrays of one leaf may have several placements; each is described once.
    words: dict[Leaf, dict[str, None]] = {}
    for array in plan.arrays:
        text = describe_array_placement(placed[array.kind][array.position], len(array.spec.shape))
        words.setdefault(array.leaf, {})[text] = None
    leaves = (LeafReport(leaf, "; ".join(words.get(leaf, ())), bytes_of.get(leaf, 0)) for leaf in plan.leaves)
    return (*leaves, *excluded)


def describe_array_placement(placement: ArrayPlacement, ndim: int) -> str:
    """Describes an array's placement in words: for each of its axes, the mesh axes that split it.

    Args:
      placement: the placement.
      ndim: the number of axes of the array.

    Example:
      >>> from statewise._src.report.gather import describe_array_placement
      >>> from statewise._src.sharding.array_placement import ArrayPlacement
      >>> (
      ...     describe_array_placement(ArrayPlacement((("data", "model"),)), 2),
      ...     describe_array_placement(ArrayPlacement((), "pinned_host"), 2),
      ... )
      ('(data+model, -)', 'replicated, in pinned_host')
    """
    if placement.each:
        text = f"one per device of {_joined(placement.each)}"
    elif any(placement.axes):
        axes = (*placement.axes, *[()] * (ndim - len(placement.axes)))
        text = f"({', '.join(map(_joined, axes))})"
    else:
        text = "replicated"
    return f"{text}, in {placement.memory}" if placement.memory else text


def _joined(names: Sequence[str]) -> str:
    return "+".join(names) or "-"
