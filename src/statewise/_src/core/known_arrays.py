"""Arrays that left a state, and may come back: what is remembered of them, by identity, for as long as they exist.

`state["cache"]` and `plan.put` hand arrays out, and `plan.take` is given some.  JAX arrays never change, so an array
that comes back, by `state.replace` or by `plan.take`, has the values that it had.  That says whether a cache and
parameters that come back belong together.  Only plans in which kinds depend on others remember anything.

An array that JAX has made since, even with the same values, is a new one, and nothing is known of it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from statewise._src.common import compat
from statewise._src.core.part import Origin, Part, Version
from statewise._src.core.versions import NEVER, Seen, set_origin
from statewise._src.plan.tables import PlanTables

__all__ = ["belong", "recall", "remember", "remembered_kinds"]

# By the identity of an array: the array, weakly, and the version, origin and position that it had in a part.
_Fact = tuple[Version, Origin | None, int]
_facts: dict[int, tuple[weakref.ref[Any], _Fact]] = {}


def remembered_kinds(plan: PlanTables) -> tuple[str, ...]:
    """Returns the kinds of which arrays are remembered: those that depend on others, and those that they depend on."""
    sources = {source for own in plan.sources.values() for source in own}
    return tuple(kind for kind in plan.kinds if kind in plan.sources or kind in sources)


def remember(plan: PlanTables, parts: Sequence[Part], kind: str, arrays: Sequence[Any]) -> None:
    """Remembers arrays that have the values of a kind's part.

    Args:
      plan: the plan.
      parts: the parts of a state.
      kind: the kind.
      arrays: the arrays, in the order of the plan; of those that cannot be remembered nothing will be known.
    """
    origin = set_origin(plan, parts, kind) if kind in plan.sources else None
    version = parts[plan.kind_index[kind]].version()
    for position, array in enumerate(arrays):
        if _has_identity(array):
            _keep(array, (version, origin, position))


def _has_identity(array: Any) -> bool:
    """Returns whether an array always has the same values, so that its identity says which."""
    return isinstance(array, jax.Array) and not isinstance(array, compat.Tracer)


def _keep(array: Any, fact: _Fact) -> None:
    number = id(array)

    def forget(reference: weakref.ref[Any]) -> None:
        # Another array may have the number by now.
        if (known := _facts.get(number)) is not None and known[0] is reference:
            del _facts[number]

    try:
        _facts[number] = weakref.ref(array, forget), fact
    except TypeError:  # of an array without weak references nothing is known
        return


def recall(arrays: Sequence[Any]) -> Seen:
    """Returns what is known of arrays, given in the order of a plan's kind."""
    facts = [(position, _fact(array)) for position, array in enumerate(arrays) if _has_identity(array)]
    known = [fact for _, fact in facts if fact is not None]
    if not known:
        return Seen(None, None)
    version, origin, _ = known[0]
    if all(fact is not None and fact[0] is version and fact[2] == position for position, fact in facts):
        return Seen(version, origin)
    # Some are as they were; they were made from what their parts were made from.
    origins = [fact[1] for fact in known if fact[1] is not None]
    versions: dict[str, Version] = {}
    for each in origins:
        for source, made_from in each.versions.items():
            # Two that were made from different values cannot both belong to the present ones.
            versions[source] = made_from if versions.get(source, made_from) is made_from else NEVER
    return Seen(None, Origin(versions) if versions else None)


def _fact(array: Any) -> _Fact | None:
    known = _facts.get(id(array))
    return known[1] if known is not None and known[0]() is array else None


def belong(plan: PlanTables, parts: Sequence[Part], arrays: Mapping[str, Sequence[Any]]) -> None:
    """Gives the parts of a new state what is known of the arrays that they were copied from; remembers those arrays.

    Kinds of which nothing is known belong together as they are.

    Args:
      plan: the plan.
      parts: the parts of the new state.
      arrays: the arrays of each kind, as they were in a model, in the order of the plan.
    """
    kinds = [kind for kind in remembered_kinds(plan) if kind in arrays and any(map(_has_identity, arrays[kind]))]
    for kind in kinds:
        seen, part = recall(arrays[kind]), parts[plan.kind_index[kind]]
        if seen.version is not None:
            part.known_version = seen.version
        if kind in plan.sources and seen.origin is not None:
            # Of a kind without an identity, NumPy arrays alone say, it is not known whether it has changed.
            versions = {source: version for source, version in seen.origin.versions.items() if source in kinds}
            part.origin = dataclasses.replace(seen.origin, versions=versions)
    for kind in kinds:
        remember(plan, parts, kind, arrays[kind])
