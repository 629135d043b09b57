"""States of shapes, or of shardings, instead of arrays."""

from __future__ import annotations

from typing import Any

import jax

from statewise._src.core.state_data import StateData
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.resolve import on_mesh, resolve, slot_shardings

__all__ = ["abstract", "shardings"]


def abstract(plan: PlanTables, mesh: Any = None) -> StateData:
    """Implements `Plan.abstract`."""
    placed = plan if mesh is None else on_mesh(plan, mesh)
    parts = [[jax.ShapeDtypeStruct(*slot.spec) for slot in slots] for slots in placed.stored.values()]
    shapes = StateData.of(placed, parts)
    if mesh is None:
        return shapes
    return jax.tree.map(lambda shape, place: shape.update(sharding=place), shapes, shardings(plan, mesh))


def shardings(plan: PlanTables, mesh: Any) -> StateData:
    """Implements `Plan.shardings`."""
    placed = resolve(plan, mesh)  # once for both
    return StateData.of(on_mesh(plan, mesh, placed), slot_shardings(plan, mesh, placed))
