"""The leaves of a report: of a plan, with where each lies on a mesh, or of a checkpoint on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from statewise._src.common.paths import Leaf
from statewise._src.common.tables import leaf_dict
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.array_placement import ArrayPlacement
from statewise._src.sharding.mesh import axis_sizes
from statewise._src.sharding.resolve import resolve

__all__ = ["LeafReport", "describe_lies", "leaves_of"]

_DROPPED = "left by an earlier sow: no part of a state"


@dataclasses.dataclass(frozen=True, slots=True)
class LeafReport:
    """One leaf of a report.

    Attributes:
      leaf: the leaf.
      placement: how it lies on the mesh, in words; empty where the report has no mesh.
      per_device: how many bytes of it lie in each device's own memory; None where the report has no mesh.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
      >>> model = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
      >>> (one,) = sw.report(model, kinds=kinds, mesh={"data": 4}).leaves
      >>> one.placement, one.leaf.nbytes, one.per_device
      ('(data, -)', 512, 128)
    """

    leaf: Leaf
    placement: str = ""
    per_device: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The leaf as plain data."""
        data = leaf_dict(self.leaf)
        if self.per_device is not None:
            data |= {"placement": self.placement, "per_device": self.per_device}
        return data


def leaves_of(plan: PlanTables, mesh: Any = None) -> tuple[LeafReport, ...]:
    """The leaves of a plan, and those that an earlier sow left beside it, as a census counts them.

    Args:
      plan: the plan.
      mesh: a mesh, concrete or abstract; None for no placements.

    Raises:
      PlacementError: leaves that cannot be placed on the mesh, all of them.
    """
    dropped = tuple(LeafReport(dataclasses.replace(leaf, note=_DROPPED)) for leaf in plan.excluded)
    if mesh is None:
        return (*map(LeafReport, plan.leaves), *dropped)
    placed, sizes = resolve(plan, mesh), axis_sizes(mesh)
    words: dict[int, dict[str, None]] = {}
    here: dict[int, int] = {}
    for kind, leaves in plan.leaf_of_array.items():
        for leaf, spec, lies in zip(leaves, plan.specs[kind], placed[kind], strict=True):
            words.setdefault(id(leaf), {})[describe_lies(lies, len(spec.shape))] = None
            here[id(leaf)] = here.get(id(leaf), 0) + _on_device(lies, spec.nbytes, sizes)
    return (
        *(LeafReport(leaf, "; ".join(words.get(id(leaf), ())), here.get(id(leaf), 0)) for leaf in plan.leaves),
        *dropped,
    )


def _on_device(lies: ArrayPlacement, nbytes: int, sizes: Mapping[str, int]) -> int:
    return nbytes // lies.parts(sizes) if lies.memory in (None, "device") else 0


def describe_lies(lies: ArrayPlacement, ndim: int) -> str:
    """How an array lies, in words: of each axis the mesh axes that split it.

    Args:
      lies: how it lies.
      ndim: how many axes it has.

    Example:
      >>> from statewise._src.report.gather import describe_lies
      >>> from statewise._src.sharding.array_placement import ArrayPlacement
      >>> (
      ...     describe_lies(ArrayPlacement((("data", "model"),)), 2),
      ...     describe_lies(ArrayPlacement((), "pinned_host"), 2),
      ... )
      ('(data+model, -)', 'replicated, in pinned_host')
    """
    if lies.each:
        text = f"one per device of {_joined(lies.each)}"
    elif any(lies.axes):
        text = f"({', '.join(_joined(names) for names in (*lies.axes, *[()] * (ndim - len(lies.axes))))})"
    else:
        text = "replicated"
    return f"{text}, in {lies.memory}" if lies.memory else text


def _joined(names: Sequence[str]) -> str:
    return "+".join(names) or "-"
