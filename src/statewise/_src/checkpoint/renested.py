"""Where all leaves differ for one reason: one side has each of its paths below one more name than the other.

That is so where a second object is planned beside the first, as each path of several objects begins with the number of
its object; and where a module was put into another one.
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
    """What `plan.take` is called with, as code: `model`, or `first, second` of several objects."""
    names = ("model",) if plan.object_count == 1 else ("first", "second", "third", "fourth")[: plan.object_count]
    return ", ".join(names) if len(names) == plan.object_count else "*objects"


def arguments(plan: PlanTables) -> str:
    """What `kinds.plan` is called with to make a plan like this one, as code."""
    optimized = ", optimizers=optimizers" if any(one.into == OPTIMIZER for one in plan.derived) else ""
    return objects(plan) + optimized + (", averages=averages" if plan.averages else "")


def moved(lacking: Sequence[LeafRecord], alone: Sequence[LeafRecord], plan: PlanTables) -> str:
    """Why leaves are on one side alone, in one line with what helps; empty if it is not for this.

    Args:
      lacking: leaves of the target that the checkpoint lacks.
      alone: leaves of the checkpoint that the target lacks.
      plan: the target's.
    """
    deeper = _deeper(lacking, alone)
    if deeper is not None:
        below, above, first = deeper
        same = f"{format_path(above.path)!r} is {format_path(below.path)!r} in the target"
        if type(first) is int and plan.object_count > 1:
            return (
                f"the target plans {plan.object_count} objects, the checkpoint is of one, and each path of several "
                f"begins with the number of its object: {same}; restore that object alone, then take all: "
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
            "the checkpoint is of several objects, the target plans one, and each path of several begins with the "
            f"number of its object: {same}; plan as many as were saved: plan.kinds.plan(first, second)"
        )
    return f"each path of the target is below {first!r} in the checkpoint: {same}; plan the object that was saved"


def _kinds(records: Sequence[LeafRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(record.kind for record in records if record.kind != OPTIMIZER))


def _deeper(some: Sequence[LeafRecord], others: Sequence[LeafRecord]) -> tuple[LeafRecord, LeafRecord, Any] | None:
    """One of some leaves and its like among others, if it and most others are found below one more name."""
    known = {other.id: other for other in others if other.kind != OPTIMIZER}
    pairs = [(one, known[path_id(one.path[1:])]) for one in some if path_id(one.path[1:]) in known]
    if not pairs or 2 * len(pairs) < len(known):
        return None
    ((first, count),) = Counter(one.path[0] for one, _ in pairs).most_common(1)
    one, other = next(pair for pair in pairs if pair[0].path[0] == first)
    return (one, other, first) if 2 * count >= len(known) else None


def renamed(plan: PlanTables, manifest: Manifest) -> str:
    """What to do where the plan's objects have names and the checkpoint's do not, or the reverse; else nothing.

    So it is where no leaf of the objects is in the checkpoint under its own path, and one that begins otherwise is.
    """
    saved = {leaf.path for leaf in manifest.leaves}
    mine = [row.path for row in plan.rows]
    if not plan.several or not saved.isdisjoint(mine):
        return ""
    theirs = {path[1:]: path[0] for path in saved if type(path[0]) is (int if plan.names else str)}
    found = {path[0]: theirs[path[1:]] for path in mine if path[1:] in theirs}
    if not found:
        return ""
    if plan.names:
        return (
            f"the checkpoint's objects have no names: plan them by position, kinds.plan({', '.join(plan.names)}), and "
            "restore; sw.transfer(restored, plan) then names them"
        )
    names = dict.fromkeys(path[0] for path in sorted(saved, key=str) if path[1:] in {way[1:] for way in mine})
    given = ", ".join(f"{name}={name}" for name in names)
    return (
        f"the checkpoint's objects have names: plan them so, in the order in which you give them here, "
        f"kinds.plan({given}), and restore; sw.transfer(restored, plan) then counts them"
    )
