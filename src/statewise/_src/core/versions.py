"""What a state knows of the values that its kinds were made from: when they are stale.

A kind may depend on others (`Kind(depends_on=)`), as a cache is made from the parameters.  Each part has a version, and
the part of a dependent kind may have an origin: the versions of the parts that it was made from.  It is stale in a
state whose parts have others.  All of it is on the host, by identity: no device and no compiled step is involved.

Most parts have no origin.  A part without one belongs to the values beside it, in every state that shares it: a state
from `take`, or from a JAX transform, claims no more.  As soon as a state is made that has the same part beside other
values, `settle` records the values that it had.  So a step pays for this only when it writes what others depend on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from statewise._src.core.part import Origin, Part, Version
from statewise._src.plan.tables import PlanTables

__all__ = ["NEVER", "Seen", "carry", "changed_sources", "note_slots", "origin_now", "set_origin", "settle"]

# The version of values that no state has: what was made from them is stale.
NEVER = Version()


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What is known of arrays from outside that a state had before.

    Attributes:
      version: the version of the part that had them, all of them in these positions; None if there is none.
      origin: what that part, or the parts that had some of them, were made from.
    """

    version: Version | None
    origin: Origin | None


def origin_now(plan: PlanTables, parts: Sequence[Part], kind: str) -> Origin:
    """Returns the origin of values of a kind that are made now, from the other kinds as they are in these parts."""
    index = plan.kind_index
    return Origin({source: parts[index[source]].version() for source in plan.sources[kind]})


def set_origin(plan: PlanTables, parts: Sequence[Part], kind: str) -> Origin:
    """Returns the origin of a kind's part; records it first if it has none."""
    part = parts[plan.kind_index[kind]]
    if part.origin is None:
        part.origin = origin_now(plan, parts, kind)
    return part.origin


def changed_sources(plan: PlanTables, parts: Sequence[Part], kind: str) -> tuple[str, ...]:
    """Returns the kinds that a kind depends on and that have changed since it was made: empty if it is not stale."""
    index = plan.kind_index
    origin = parts[index[kind]].origin
    if origin is None:
        return ()
    made = origin.versions
    return tuple(
        source
        for source in plan.sources.get(kind, ())
        if source in made and made[source] is not parts[index[source]].version()
    )


def settle(
    plan: PlanTables,
    before: Sequence[Part],
    after: Sequence[Part],
    fresh: Collection[str] = (),
    seen: Mapping[str, Seen] | None = None,
) -> None:
    """Records, in the parts of a new state, what its kinds were made from.

    Args:
      plan: the plan of the new state; the old one has the same kinds.
      before: the parts of the state that it was made from.
      after: its own; those that are the same objects have not changed.
      fresh: the kinds whose values were not made from the old ones.
      seen: what is known of the arrays of fresh kinds, if they were in a state before.
    """
    if not plan.sources:
        return
    index = plan.kind_index
    for source in dict.fromkeys(source for sources in plan.sources.values() for source in sources):
        old, new = before[index[source]], after[index[source]]
        known = None if seen is None or source not in seen else seen[source].version
        if known is not None:
            new.known_version = known
        elif new is not old and _same(old.arrays, new.arrays):
            new.known_version = old.version()
    for kind, sources in plan.sources.items():
        old, new = before[index[kind]], after[index[kind]]
        if kind in fresh:
            if seen is not None and kind in seen:
                new.origin = seen[kind].origin
            continue
        if old.origin is None and any(_differ(before[index[source]], after[index[source]]) for source in sources):
            set_origin(plan, before, kind)
        if new is not old:
            new.origin = old.origin


def _same(old: Iterable[Any], new: Iterable[Any]) -> bool:
    old, new = tuple(old), tuple(new)
    return len(old) == len(new) and all(one is other for one, other in zip(old, new, strict=True))


def _differ(old: Part, new: Part) -> bool:
    return new is not old and new.version() is not old.version()


def carry(
    befores: Sequence[tuple[PlanTables, Sequence[Part]]],
    plan: PlanTables,
    parts: Sequence[Part],
    kinds: Mapping[str, str | None] | None = None,
) -> None:
    """Carries over what is stale to a state whose kinds are copies, or slices, or stacks, of others' as a whole.

    Args:
      befores: the states that it was made from, each with its plan.
      plan: the plan of the new state.
      parts: its parts.
      kinds: the kinds that were copied, each with its name in the old states; None for all, under the same names.
    """
    copied = {kind: kind for kind in plan.kinds} if kinds is None else kinds
    for kind, sources in plan.sources.items():
        name = copied.get(kind)
        if name is None:
            continue
        changed = {source for tables, old in befores for source in changed_sources(tables, old, name)}
        if changed:
            origin = origin_now(plan, parts, kind).versions
            own = changed.intersection(sources) or set(sources)
            parts[plan.kind_index[kind]].origin = Origin({**origin, **dict.fromkeys(own, NEVER)})


def note_slots(plan: PlanTables, before: Sequence[Part], after: Sequence[Part], kind: str, slots: Any) -> None:
    """Notes that some slots of a stale kind were restarted; once all were, for one set of values, it is not stale.

    Args:
      plan: the plan.
      before: the parts before the restart.
      after: the parts after it; the kind's own has the old origin.
      kind: the kind.
      slots: a boolean for each slot, concrete; for an ensemble perhaps a row for each member.
    """
    old, new = before[plan.kind_index[kind]].origin, after[plan.kind_index[kind]]
    if old is None or not changed_sources(plan, after, kind):
        return
    now, renewed = origin_now(plan, after, kind).versions, np.asarray(slots)
    if old.renewed is not None and all(old.renewed[0].get(source) is version for source, version in now.items()):
        renewed = renewed | old.renewed[1]
    new.origin = None if renewed.all() else Origin(old.versions, (now, renewed))
