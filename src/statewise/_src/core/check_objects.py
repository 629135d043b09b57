"""Objects against the plan that they are to fit: every difference in structure, type, shape, dtype and static parts."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.compare import (
    UNEXPECTED,
    LeafFacts,
    compare_leaf,
    facts_of,
    is_same_static,
    note_of,
)
from statewise._src.common.nnx_graph import ModelGraph, named, rebuild, row_of
from statewise._src.common.paths import Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.plan.intern import same_graph
from statewise._src.plan.leaf_specs import LeafSpec, is_sown
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["check_statics", "facts_of_row", "matched", "names_for", "plain_attributes"]


def facts_of_row(row: LeafSpec) -> LeafFacts:
    """Returns what a plan knows of a leaf, for a comparison."""
    return LeafFacts(row.type, row.specs, row.structure)


def names_for(plan: PlanTables, objects: Sequence[Any]) -> tuple[str, ...]:
    """The names of the planned objects, if so many are given; `_matched` refuses another number."""
    return plan.names if len(objects) == plan.object_count else ()


def matched(plan: PlanTables, found: ModelGraph, objects: Sequence[Any], verb: str) -> list[Any]:
    """The live leaf of each row; every difference between the objects and the plan is listed."""
    if len(objects) != plan.object_count:
        raise StructureError(
            f"The plan is of {plan.object_count} object{'s' * (plan.object_count > 1)}, but {len(objects)} are given.",
            hint=f"plan.{verb}({'' if verb == 'take' else 'state, '}{', '.join(plan.names or _names(plan))})",
        )
    live = dict(zip(found.paths, found.leaves, strict=True))
    problems = Problems()
    leaves = []
    for planned, row in zip(plan.leaves, plan.rows, strict=False):  # those of the objects come first
        leaf = live.pop(row.path, None)
        mismatches = compare_leaf(facts_of_row(row), None if leaf is None else facts_of(leaf))
        if mismatches:
            problems.add(planned, note_of(mismatches, "model"))
        leaves.append(leaf)
    for path, leaf in live.items():
        if not is_sown(compat.variable_type(leaf)):
            problems.add(row_of(path, leaf), note_of(UNEXPECTED, "model"))
    hint = _TAKE if plan.members is None else _STACKED.format(plan.members)
    problems.raise_as(
        StructureError,
        "The model is not what was planned: {n} leaves differ.",
        hint if verb == "take" else "put the state into a model of the planned structure, or plan.build(state)",
    )
    return leaves


_TAKE = "plan = kinds.plan(model)  # plan the model as it is now"
_STACKED = (
    "the plan is of an ensemble of {}: objects with stacked arrays, nnx.vmap(make_model)(keys)\n"
    "or a state for each member: plan.stack([single.take(model) for model in models])  # single: the plan of one"
)


def _names(plan: PlanTables) -> list[str]:
    """The planned objects by the names of their types, for code."""
    objects = rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)
    return [type(thing).__name__.lower() for thing in objects]


_PLAIN = (bool, int, float, str, type(None), enum.Enum)


def check_statics(plan: PlanTables, found: ModelGraph, objects: Sequence[Any]) -> None:
    """Refuses a model whose plain attributes (`deterministic`, `use_running_average`) are not as planned.

    A step rebuilds the module from the plan, so it would quietly run in the planned mode.  Functions and other
    objects among the attributes are left alone: they may differ from instance to instance.
    """
    if same_graph(found.graphdef, plan.graphdef):
        return
    planned = rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)
    differing = []
    for position, (ours, theirs) in enumerate(zip(planned, objects, strict=True)):
        before, now = plain_attributes(ours), plain_attributes(theirs)
        for path, value in before.items():
            if path in now and not is_same_static(now[path], value):
                prefix = named((position,), plan.names) if plan.several else ()
                differing.append(f"{format_path(prefix + path)}: {value!r} in the plan, {now[path]!r} in the model")
    if differing:
        raise StructureError(
            "The model's static attributes have changed since it was planned:\n  " + "\n  ".join(differing),
            hint="plan = kinds.plan(model)  # or model.train() / model.eval() back to what was planned",
        )


def plain_attributes(thing: Any) -> dict[Path, Any]:
    """Returns the plain attributes of an object's modules (`deterministic`, `use_running_average`), by path."""
    return {
        (*path, name): value
        for path, module in nnx.iter_modules(thing)
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and not name.startswith("_")
    }
