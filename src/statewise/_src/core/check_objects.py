"""Checks that objects fit a plan: lists every difference in structure, type, shape, dtype and static attributes."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.compare import UNEXPECTED, LeafFacts, compare_leaf, facts_of, is_same_static, note_of
from statewise._src.common.graphdef import called
from statewise._src.common.nnx_graph import ModelGraph, named, rebuild, row_of
from statewise._src.common.paths import Path, format_path
from statewise._src.common.problems import Problems, counted
from statewise._src.plan.intern import same_graph
from statewise._src.plan.leaf_specs import is_sown
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["check_statics", "matched", "names_for", "plain_attributes"]

_TAKE = "plan = kinds.plan(model)  # plan the model as it is now"
_STACKED = (
    "the plan is of an ensemble of {}: objects with stacked arrays, {}(keys)\n"
    "or a state for each member: plan.stack([single.take(model) for model in models])  # single: the plan of one"
)
_PLAIN = (bool, int, float, str, type(None), enum.Enum)


def names_for(plan: PlanTables, objects: Sequence[object]) -> tuple[str, ...]:
    """Returns the names of the planned objects; none if another number of objects is given, which `matched` reports."""
    return plan.names if len(objects) == plan.object_count else ()


def matched(plan: PlanTables, graph: ModelGraph, objects: Sequence[object], verb: str) -> list[Any]:
    """Returns the live leaf of each row.

    Args:
      plan: the plan.
      graph: the objects, as they are now.
      objects: the objects.
      verb: the method of the plan that was called.

    Raises:
      StructureError: the objects are not as planned; lists every difference.
    """
    if len(objects) != plan.object_count:
        names = plan.names or [type(planned).__name__.lower() for planned in _planned(plan)]
        raise StructureError(
            f"The plan is of {counted(plan.object_count, 'object', 'objects')}, but {len(objects)} are given.",
            hint=f"plan.{verb}({'' if verb == 'take' else 'state, '}{', '.join(names)})",
        )
    live = dict(zip(graph.paths, graph.leaves, strict=True))
    problems = Problems()
    leaves = []
    for planned, row in zip(plan.leaves, plan.rows, strict=False):  # the plan lists derived leaves after the rows
        leaf = live.pop(row.path, None)
        facts = LeafFacts(row.type, row.specs, row.structure)
        mismatches = compare_leaf(facts, None if leaf is None else facts_of(leaf))
        if mismatches:
            problems.add(planned, note_of(mismatches, "model"))
        leaves.append(leaf)
    # What `sow` adds during a call does not change the model: the plan excludes it too.
    for path, leaf in live.items():
        if not is_sown(compat.variable_type(leaf)):
            problems.add(row_of(path, leaf), note_of(UNEXPECTED, "model"))
    mapped = called("nnx.vmap", "make_model", graphdef=plan.graphdef)
    hint = _TAKE if plan.members is None else _STACKED.format(plan.members, mapped)
    problems.raise_as(
        StructureError,
        "The model is not what was planned: {n} leaves differ.",
        hint if verb == "take" else "put the state into a model of the planned structure, or plan.build(state)",
    )
    return leaves


def _planned(plan: PlanTables) -> tuple[Any, ...]:
    """Returns the planned objects, without arrays."""
    return rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)


def check_statics(plan: PlanTables, graph: ModelGraph, objects: Sequence[object]) -> None:
    """Checks that a model's plain attributes (`deterministic`, `use_running_average`) are as planned.

    A step rebuilds the module from the plan, so it would silently run in the planned mode.  Functions and other
    objects among the attributes are not compared: they may differ from instance to instance.
    """
    # Most models are as planned, and equal graph definitions are compared much faster than rebuilt modules.
    if same_graph(graph.graphdef, plan.graphdef):
        return
    differing = []
    for position, pair in enumerate(zip(_planned(plan), objects, strict=True)):
        before, now = map(plain_attributes, pair)
        prefix = named((position,), plan.names) if plan.several else ()
        differing += [
            f"{format_path(prefix + path)}: {value!r} in the plan, {now[path]!r} in the model"
            for path, value in before.items()
            if path in now and not is_same_static(now[path], value)
        ]
    if differing:
        back = [called(f"model.{mode}", graphdef=plan.graphdef) for mode in ("train", "eval")]
        raise StructureError(
            "The model's static attributes have changed since it was planned:\n  " + "\n  ".join(differing),
            hint=f"plan = kinds.plan(model)  # or {back[0]} / {back[1]} back to what was planned",
        )


def plain_attributes(obj: Any) -> dict[Path, Any]:
    """Returns the plain attributes of an object's modules (`deterministic`, `use_running_average`), by path."""
    # Private attributes may be caches of a module, which change without a change of its mode.
    return {
        (*path, name): value
        for path, module in nnx.iter_modules(obj, graph=True)
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and not name.startswith("_")
    }
