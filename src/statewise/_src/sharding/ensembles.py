"""The sharding of an ensemble: that of each member, with the members split over one more mesh axis if one is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.problems import Problems
from statewise._src.plan.members import Axis, Members
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.array_placement import ArrayPlacement
from statewise._src.sharding.mesh import describe_mesh
from statewise.errors import PlacementError

__all__ = ["of_all_members", "resolved_members"]


def of_all_members(members: Members, placement: ArrayPlacement, axis: Axis, spec: ArraySpec) -> ArrayPlacement:
    """Returns the placement of an array of all members, given that of one member in a state of one."""
    # In a state the array of one member may have the leading axis of `PerDevice` already, which `grown` adds itself.
    rank = len(spec.shape) - (bool(placement.each) and members.single.per_device is not None)
    return _grown(members, placement, axis, rank)


def _grown(members: Members, placement: ArrayPlacement, axis: Axis, rank: int) -> ArrayPlacement:
    return placement.grown(axis, rank, () if members.over is None else (members.over,))


def resolved_members(
    plan: PlanTables, single: Mapping[str, Sequence[ArrayPlacement]], sizes: Mapping[str, int]
) -> dict[str, tuple[ArrayPlacement, ...]]:
    """Returns the placement of each array of an ensemble, in the order of the plan.

    Args:
      plan: the plan of the ensemble.
      single: the placements of one member's arrays.
      sizes: the axes of the mesh.

    Raises:
      PlacementError: the members cannot be split over the axis `over`.
    """
    members = plan.ensemble
    assert members is not None, "called for an ensemble"
    _check_over(members, sizes)
    placed: dict[str, tuple[ArrayPlacement, ...]] = {}
    problems = Problems()
    for kind, part in single.items():
        of_kind = []
        for placement, array in zip(part, plan.by_kind[kind], strict=True):
            used = {name for names in (*placement.axes, placement.each) for name in names}
            if array.axis is not None and members.over in used:
                problems.add(array.leaf, f"already split over {members.over!r} within each member")
            # The plan of all members knows the shape with their axis; `grown` takes the rank of one member's array.
            of_kind.append(_grown(members, placement, array.axis, len(array.spec.shape) - 1))
        placed[kind] = tuple(of_kind)
    problems.raise_as(
        PlacementError,
        f"The members cannot be split over {members.over!r}: {{n}} leaves of each already are, on the mesh "
        f"{describe_mesh(sizes)}.",
        f"plan.stacked({members.number}, over=...)  # another axis of the mesh: {', '.join(sizes)}",
    )
    return placed


def _check_over(members: Members, sizes: Mapping[str, int]) -> None:
    over = members.over
    if over is None:
        return
    if over not in sizes:
        raise PlacementError(
            f"The members should be split over {over!r}, but the mesh {describe_mesh(sizes)} has no such axis.",
            hint=f"plan.stacked({members.number}, over={next(iter(sizes))!r})  # one of: {', '.join(sizes)}",
        )
    if members.number % sizes[over]:
        raise PlacementError(
            f"{members.number} members cannot be split evenly over {over}={sizes[over]} of the mesh "
            f"{describe_mesh(sizes)}.",
            hint=f"plan.stacked({members.number})  # without over=: each device then has all of them\n"
            f"or a multiple: plan.stacked({sizes[over] * -(-members.number // sizes[over])}, over={over!r})",
        )
