"""From kinds and objects to the tables of a plan: each leaf in exactly one kind, or an error with every problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ONE, ModelGraph, make_leaf, read_graph
from statewise._src.common.object_names import check_name, given
from statewise._src.common.paths import Leaf
from statewise._src.plan.averages import resolve_averages
from statewise._src.plan.depends_on import check_depends_on
from statewise._src.plan.intern import intern
from statewise._src.plan.kind import Kind, with_kinds
from statewise._src.plan.known_models import recall, remember
from statewise._src.plan.leaf_specs import LeafSpec, drop_sown, rows_of
from statewise._src.plan.match import claim
from statewise._src.plan.optimizer_state import resolve_optimizers
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import DeclarationError, StructureError

__all__ = ["resolve_plan"]

_ASSIGN = "assign the model's Variables before planning it"


def resolve_plan(
    kinds: Mapping[str, Kind],
    objects: Sequence[Any],
    optimizers: Any = None,
    averages: Any = None,
    named: Mapping[str, Any] = MappingProxyType({}),
) -> PlanTables:
    """Resolves kinds against objects; see `Kinds.plan`."""
    _check_keys("optimizers", optimizers, "updates", "{'params': optax.adamw(3e-4)}")
    _check_keys("averages", averages, "tracks", "{'params': sw.EMA(0.999)}")
    objects, names = given(objects, named, "kinds.plan")
    declared, leaves = kinds, None
    sown: tuple[Leaf, ...] = ()
    known = recall(declared, objects, names)
    if known is not None:
        graphdef, rows = known.graphdef, known.rows
    else:
        graph, claims, sown = _matched(kinds, objects, names)
        graphdef, rows, leaves = graph.graphdef, rows_of(graph, claims), graph.leaves
    _check_compute(kinds, rows)
    groups = resolve_optimizers(kinds, rows, optimizers or {})
    if groups and OPTIMIZER not in kinds:
        kinds = with_kinds(kinds, {OPTIMIZER: Kind(nnx.OptState)})
    added, tracked = resolve_averages(kinds, rows, averages or {})
    kinds = with_kinds(kinds, added)
    check_depends_on(kinds)
    tables: PlanTables = intern(PlanTables(kinds, graphdef, rows, (*groups, *tracked), len(objects), names, sown))
    if leaves is not None:
        remember(declared, objects, leaves, tables)
    return tables


def _matched(
    kinds: Mapping[str, Kind], objects: Sequence[Any], names: tuple[str, ...]
) -> tuple[ModelGraph, list[str], tuple[Leaf, ...]]:
    """Returns the objects, flattened, the kind of each leaf, and the leaves that `drop_sown` has removed."""
    graph = read_graph(objects, names)
    if () in graph.paths:
        name = compat.variable_type(objects[0]).__name__
        raise StructureError(
            f"Object 0 is a {name} on its own, which has no path.",
            hint=f"put it into a dict: {{'{name.lower()}': ...}}",
        )
    if not graph.leaves:
        types = " and ".join(type(each).__name__ for each in objects)
        raise StructureError(f"There are no leaves: no Variable and no array anywhere in {types}.", hint=_ASSIGN)
    graph, claims, sown = drop_sown(kinds, objects, graph, claim(kinds, graph))
    if not graph.leaves:
        raise StructureError("There are no leaves but those that an earlier `sow` left.", leaves=sown, hint=_ASSIGN)
    return graph, claims, sown


def _check_keys(option: str, declared: Any, verb: str, example: str) -> None:
    """Checks that an option maps kinds to something."""
    hint = f"{option}={example}"
    if declared is not None and not isinstance(declared, Mapping):
        if isinstance(declared, nnx.Pytree):
            check_name(option)  # an object that was passed by a name which is a parameter's
        given = f"{option}={type(declared).__name__}(...)"
        raise DeclarationError(f"{given} does not say which kinds it {verb}.", hint=hint)
    for key in declared or ():
        if not all(isinstance(name, str) for name in (key if isinstance(key, tuple) else (key,))):
            raise DeclarationError(f"{key!r} is not the name of a kind, nor a tuple of names.", hint=hint)


def _check_compute(kinds: Mapping[str, Kind], rows: Sequence[LeafSpec]) -> None:
    """Checks that a kind with a compute dtype has leaves that can be cast to it: its integers and keys are not."""
    for name, kind in kinds.items():
        own = [row for row in rows if row.kind == name] if kind.compute is not None else []
        if own and not any(jnp.issubdtype(spec.dtype, jnp.floating) for row in own for spec in row.specs):
            raise DeclarationError(
                f"The kind {name!r} has compute={kind.compute!r}, and no leaf of floating-point numbers.",
                leaves=[make_leaf(row.path, row.type, row.specs, row.structure is ONE, name) for row in own],
                kind=name,
                hint=f"{name}=dataclasses.replace(kinds[{name!r}], compute=None)",
            )
