"""Leaves that all differ for one reason: one side has each of its paths below one more name than the other.

That happens if a second object is planned beside the first, because each path of several objects starts with the number
of its object; and if a module was put into another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from statewise._src.checkpoint.format.keys import path_id
from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.common.paths import format_path
from statewise._src.plan.tables import OPTIMIZER, PlanTables

__all__ = ["arguments", "moved", "objects", "renamed"]


def objects(plan: PlanTables) -> str:
    """Returns the arguments of `plan.take`, as code: `model`, or `first, second` for several objects."""
    names = ("model",) if plan.object_count == 1 else ("first", "second", "third", "fourth")[: plan.object_count]
    return ", ".join(names) if len(names) == plan.object_count else "*objects"


def arguments(plan: PlanTables) -> str:
    """Returns the arguments of `kinds.plan` that make a plan like this one, as code."""
    optimized = ", optimizers=optimizers" if any(derived.into == OPTIMIZER for derived in plan.derived) else ""
    return objects(plan) + optimized + (", averages=averages" if plan.averages else "")


def moved(lacking: Sequence[LeafRecord], alone: Sequence[LeafRecord], plan: PlanTables) -> str:
    """Returns why leaves are on one side only, and what helps, in one line; empty if it is not for this reason.

    Args:
      lacking: leaves of the target that the checkpoint lacks.
      alone: leaves of the checkpoint that the target lacks.
      plan: the target's plan.
    """
    deeper = _deeper(lacking, alone)
    if deeper is not None:
        below, above, first = deeper
        same = f"{format_path(above.path)!r} is {format_path(below.path)!r} in the target"
        if type(first) is int and plan.object_count > 1:
            return (
                f"the target plans {plan.object_count} objects, the checkpoint is of one, and each path of several "
                f"starts with the number of its object: {same}; restore that object alone, then take all: "
                f"one = plan.kinds.plan(model); one.put(sw.restore(path, one.take(model), only={_kinds(alone)})[0], "
                "model)"
            )
        return f"each path of the checkpoint is below {first!r} in the target: {same}; plan that object alone"
    deeper = _deeper(alone, lacking)
    if deeper is None:
        return ""
    below, above, first = deeper
    same = f"{format_path(below.path)!r} is {format_path(above.path)!r} in the target"
    if type(first) is int and plan.object_count == 1:
        return (
            "the checkpoint is of several objects, the target plans one, and each path of several starts with the "
            f"number of its object: {same}; plan as many as were saved: plan.kinds.plan(first, second)"
        )
    return f"each path of the target is below {first!r} in the checkpoint: {same}; plan the object that was saved"


def _kinds(records: Sequence[LeafRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(record.kind for record in records if record.kind != OPTIMIZER))


def _deeper(some: Sequence[LeafRecord], others: Sequence[LeafRecord]) -> tuple[LeafRecord, LeafRecord, Any] | None:
    """Returns a leaf and its counterpart among the others, and the name that it is below, if most others have one.

    "Most" is half of the others or more, all below the same name.
    """
    # The paths of optimizer state start with its kind, so they do not show where the model's objects are.
    known = {other.id: other for other in others if other.kind != OPTIMIZER}
    pairs = [(leaf, known[inner]) for leaf in some if (inner := path_id(leaf.path[1:])) in known]
    if not pairs or 2 * len(pairs) < len(known):
        return None
    ((first, count),) = Counter(leaf.path[0] for leaf, _ in pairs).most_common(1)
    leaf, other = next(pair for pair in pairs if pair[0].path[0] == first)
    return (leaf, other, first) if 2 * count >= len(known) else None


def renamed(plan: PlanTables, manifest: Manifest) -> str:
    """Returns what to do if the plan's objects have names and the checkpoint's do not, or the reverse; else "".

    That is so if no leaf of the objects is in the checkpoint under its own path, and one with another first key is.
    """
    saved = {leaf.path for leaf in manifest.leaves}
    paths = [row.path for row in plan.rows]
    if not plan.several or not saved.isdisjoint(paths):
        return ""
    inner = {path[1:] for path in paths}
    if not any(path[1:] in inner for path in saved if type(path[0]) is (int if plan.names else str)):
        return ""
    if plan.names:
        return (
            f"the checkpoint's objects have no names: plan them by position, kinds.plan({', '.join(plan.names)}), and "
            "restore; sw.transfer(restored, plan) then names them"
        )
    names = dict.fromkeys(path[0] for path in sorted(saved, key=str) if path[1:] in inner)
    given = ", ".join(f"{name}={name}" for name in names)
    return (
        f"the checkpoint's objects have names: plan them with these, in the order in which you give them here, "
        f"kinds.plan({given}), and restore; sw.transfer(restored, plan) then numbers them"
    )
