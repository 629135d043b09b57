"""From kinds and objects to the tables of a plan: each leaf in exactly one kind, or every problem at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flax import nnx

from statewise._src.common.nnx_graph import read_graph
from statewise._src.common.object_names import check_name, given
from statewise._src.plan.averages import check_averages
from statewise._src.plan.intern import intern
from statewise._src.plan.kind import Kind, with_kinds
from statewise._src.plan.leaf_specs import drop_sown, rows_of
from statewise._src.plan.match import claim
from statewise._src.plan.optimizer_state import check_optimizers
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import DeclarationError, StructureError

__all__ = ["resolve_plan"]


def resolve_plan(
    kinds: Mapping[str, Kind],
    objects: Sequence[Any],
    optimizers: Any = None,
    averages: Any = None,
    named: Mapping[str, Any] = MappingProxyType({}),
) -> PlanTables:
    """Resolves kinds against objects; see `Kinds.plan`."""

    _check_keys("optimizers", optimizers, "updates", "{'params': optax.adamw(3e-4)}")
    _check_keys("averages", averages, "is of", "{'params': sw.EMA(0.999)}")
    objects, names = given(objects, named, "kinds.plan")
    found = read_graph(objects, names)
    if () in found.paths:
        name = type(objects[0]).__name__
        raise StructureError(
            f"Object 0 is a {name} on its own, which has no path.",
            hint=f"put it into a dict: {{'{name.lower()}': ...}}",
        )
    if not found.leaves:
        types = " and ".join(type(thing).__name__ for thing in objects)
        raise StructureError(
            f"There are no leaves: no Variable and no array anywhere in {types}.",
            hint="assign the model's Variables before planning it",
        )
    claims = claim(kinds, found)
    found, claims, dropped = drop_sown(kinds, objects, found, claims)
    if not found.leaves:
        raise StructureError(
            "There are no leaves but those that an earlier `sow` left.",
            leaves=dropped,
            hint="assign the model's Variables before planning it",
        )
    rows = rows_of(found, claims)
    groups = check_optimizers(kinds, rows, optimizers or {})
    if groups and OPTIMIZER not in kinds:
        kinds = with_kinds(kinds, {OPTIMIZER: Kind(nnx.OptState)})
    added, shadows = check_averages(kinds, rows, averages or {})
    derived = (*groups, *shadows)
    return intern(
        PlanTables(
            with_kinds(kinds, added),
            found.graphdef,
            rows,
            derived,
            object_count=len(objects),
            names=names,
            excluded=dropped,
        )
    )


def _check_keys(what: str, asked: Any, does: str, example: str) -> None:
    hint = f"{what}={example}"
    if asked is not None and not isinstance(asked, Mapping):
        if isinstance(asked, nnx.Pytree):
            check_name(what)
        raise DeclarationError(f"{what}={type(asked).__name__}(...) does not say which kinds it {does}.", hint=hint)
    for key in asked or ():
        if not all(isinstance(name, str) for name in (key if isinstance(key, tuple) else (key,))):
            raise DeclarationError(f"{key!r} names no kind, and is no tuple of names.", hint=hint)
