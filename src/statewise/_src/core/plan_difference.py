"""States of another plan: those that fit all the same, and for the others, how the two plans differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.compare import UNEXPECTED, LeafFacts, compare_leaf, facts_of_leaf, is_same_static, note_of
from statewise._src.common.nnx_graph import named, rebuild
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.common.variable_forms import empty_leaves, of_plain_variables
from statewise._src.core.state_data import StateData, StateT
from statewise._src.plan.derived import Derived
from statewise._src.plan.intern import same_graph
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["in_form_of", "other_plan"]


def in_form_of(plan: PlanTables, state: StateT) -> StateT:
    """Returns a state of a plan that differs in the form of Variables alone, as one of this plan; others unchanged.

    A state holds arrays, so plain, hijax and reference Variables of equal models have equal states.
    """
    own = state.tables
    if own.plain is plan.plain or not same_graph(*map(of_plain_variables, (own.graphdef, plan.graphdef))):
        return state
    return state.make(own.changed(graphdef=plan.graphdef), state.parts)


def other_plan(plan: PlanTables, state: StateData, subject: str, transfer: str, otherwise: str) -> StructureError:
    """Returns the error for a state of another plan: the leaves, and all else in which the two plans differ.

    Args:
      plan: the plan.
      state: the state.
      subject: the state, in the message: `This state`.
      transfer: the hint where all leaves are alike, so that `sw.transfer` copies every one of them.
      otherwise: the hint where they are not.
    """
    other = state.tables
    problems = Problems()
    can_transfer = _add_leaves(problems, plan, other)
    if can_transfer:
        _add_metadata(problems, plan, other)
    notes = [*_declared(plan, other), *_attributes(plan, other)]
    if not notes and not problems:
        notes = ["attributes that are not part of any leaf"]
    lines = "".join(f"\n  {note}" for note in notes)
    return StructureError(
        f"{subject} is of another plan: {other!r}, not {plan!r}." + (f"  They differ in:{lines}" if notes else ""),
        leaves=problems.leaves,
        hint=transfer if can_transfer else otherwise,
    )


def _add_leaves(problems: Problems, plan: PlanTables, other: PlanTables) -> bool:
    """Adds the leaves that differ between two plans; returns whether none does."""
    others = dict(_facts(other))
    found = {leaf.path: facts for leaf, facts in others.items()}
    for leaf, facts in _facts(plan):
        mismatches = compare_leaf(facts, found.pop(leaf.path, None))
        if mismatches:
            problems.add(leaf, note_of(mismatches, "state"))
    for leaf in others:
        if leaf.path in found:
            problems.add(leaf, note_of(UNEXPECTED, "state"))
    return not problems


def _facts(plan: PlanTables) -> Iterator[tuple[Leaf, LeafFacts]]:
    rows = [(row.specs, row.structure) for row in plan.rows]
    for number, leaf in enumerate(plan.leaves):
        facts = facts_of_leaf(leaf)
        if number < len(rows):  # the plan lists derived leaves after those of the model
            facts = facts._replace(arrays=rows[number][0], structure=rows[number][1])
        yield leaf, facts


def _add_metadata(problems: Problems, plan: PlanTables, other: PlanTables) -> None:
    """Adds the leaves whose Variables differ in their metadata, other than their form."""
    pairs = zip(empty_leaves(plan.graphdef), empty_leaves(other.graphdef), strict=True)
    notes = {}
    for (path, leaf), (_, counterpart) in pairs:
        mine, theirs = (each.get_metadata() if compat.is_variable(each) else {} for each in (leaf, counterpart))
        names = {*mine, *theirs} - {"hijax", "ref"}
        differing = sorted(name for name in names if not _equal(mine.get(name), theirs.get(name)))
        if differing:
            notes[named(path, plan.names)] = f"has other metadata in the state: {', '.join(differing)}"
    for leaf in plan.leaves:
        if leaf.path in notes:
            problems.add(leaf, notes[leaf.path])


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (ValueError, TypeError):  # arrays have no truth value
        return False


def _declared(plan: PlanTables, other: PlanTables) -> Iterator[str]:
    """Yields what differs in the declaration of kinds, optimizers, averages and members."""
    for kind in dict.fromkeys([*plan.kinds, *other.kinds]):
        if kind not in other.kinds or kind not in plan.kinds:
            yield f"the kind {kind!r}, which the {'state' if kind in plan.kinds else 'plan'} does not have"
        elif plan.kinds[kind] != other.kinds[kind]:
            yield f"the declaration of the kind {kind!r}"
    if tuple(plan.kinds) != tuple(other.kinds) and set(plan.kinds) == set(other.kinds):
        yield "the order of the kinds"
    mine, theirs = ({_label(each): each for each in tables.derived} for tables in (plan, other))
    for label in dict.fromkeys([*mine, *theirs]):
        if label not in theirs or label not in mine:
            yield f"{label}, which the {'state' if label in mine else 'plan'} does not have"
        elif mine[label].rule != theirs[label].rule:
            yield f"{label}, which {'is another object' if mine[label].trains else 'are declared otherwise'}"
    axes = [None if tables.ensemble is None else tables.ensemble._replace(single=None) for tables in (plan, other)]
    if axes[0] != axes[1]:
        yield "the members of the ensemble, or their axes"


def _label(derived: Derived) -> str:
    kinds = ", ".join(map(repr, derived.kinds))
    return f"the optimizer of {kinds}" if derived.trains else f"the averages {derived.into!r} of {kinds}"


def _attributes(plan: PlanTables, other: PlanTables) -> Iterator[str]:
    """Yields the static attributes, and the modules' classes, that differ between two plans."""
    mine, theirs = _statics(plan), _statics(other)
    for path in dict.fromkeys([*mine, *theirs]):
        if path not in theirs or path not in mine:
            continue  # of modules that only one of them has: their leaves differ
        if not is_same_static(mine[path], theirs[path]) and not _equal(mine[path], theirs[path]):
            yield f"{format_path(path)}: {mine[path]!r} in the plan, {theirs[path]!r} in the state"


def _statics(plan: PlanTables) -> dict[Path, Any]:
    """Returns the static attributes of all modules, and under its own path each module's class."""
    statics: dict[Path, Any] = {}
    objects = rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)
    for position, each in enumerate(objects):
        prefix = named((position,), plan.names) if plan.several else ()
        for path, module in nnx.iter_modules(each, graph=True):
            statics[(*prefix, *path)] = type(module)
            for name, value in vars(module).items():
                if not name.startswith("_") and not nnx.is_data(value):
                    statics[(*prefix, *path, name)] = value
    return statics
