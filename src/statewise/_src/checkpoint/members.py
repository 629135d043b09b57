"""Members of an ensemble, in a checkpoint, and what a restore into another ensemble, or into one model, makes of them.

An array of an ensemble stands in a checkpoint as a state holds it; its placement in the manifest says how many members
there are, and along which axis: `{"members": {"number": 8, "axis": 0}}`.  Into as many members it comes back as it was.
Which of them go into another number is never guessed: `sw.restore(path, target, members=...)` says it, or, for those
that the checkpoint lacks, the kind's `missing`.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.format.per_device import devices_of, members_of, shape_of_one
from statewise._src.plan.members import Axis
from statewise._src.plan.tables import PlanTables
from statewise.errors import RestoreError

__all__ = ["Asked", "Regrouped", "asked_members", "regroup", "regrouped"]

# What `members=` says: for each member of the target that of the checkpoint, or None; for one model its number.
Asked = int | tuple[int | None, ...] | None


class Regrouped(NamedTuple):
    """What becomes of an array of other members.

    Attributes:
      chosen: as `Asked`: which of the checkpoint's members go where.
      theirs: the axis of the members in the checkpoint; None for one value.
      ours: their axis in the target.
      words: what the report says of it.
    """

    chosen: int | tuple[int | None, ...]
    theirs: Axis
    ours: Axis
    words: str

    @property
    def lacks(self) -> tuple[int, ...]:
        """The members of the target that get nothing from the checkpoint."""
        return () if isinstance(self.chosen, int) else tuple(at for at, one in enumerate(self.chosen) if one is None)


def asked_members(plan: PlanTables, manifests: Sequence[Manifest], members: Any) -> Asked:
    """What `members=` asks for, checked against target and checkpoint.

    Raises:
      RestoreError: it is not a number for one model, or not one for each member of an ensemble; a member that the
        checkpoint does not have.
    """
    if members is None:
        return None
    have = _members_in(manifests)
    known = have or 1
    several = isinstance(members, Iterable) and not isinstance(members, str | bytes)
    given = list(members) if several else [members]
    example = ", ".join(str(at) if at < known else "None" for at in range(plan.members or 1))
    hint = f"members=[{example}]" if plan.members else "members=0"
    if isinstance(members, Mapping | Set):
        raise RestoreError(
            f"members={members!r} has no order: nobody knows which member goes where.",
            hint=f"{hint}  # for each member of the target that of the checkpoint, or None" if plan.members else hint,
        )
    if several is (plan.members is None):
        what = "one model" if plan.members is None else f"an ensemble of {plan.members}"
        raise RestoreError(f"members={_shown(members)} does not fit a target that is {what}.", hint=hint)
    if plan.members is not None and len(given) != plan.members:
        raise RestoreError(
            f"members= names {len(given)} members, and the target is an ensemble of {plan.members}.",
            hint=f"{hint}  # for each member of the target that of the checkpoint, or None",
        )
    chosen: list[Any] = []
    for one in given:
        number = operator.index(one) if hasattr(one, "__index__") and not isinstance(one, bool) else one
        if number is None and several:
            chosen.append(None)
        elif not isinstance(number, int) or isinstance(number, bool) or not -known <= number < known:
            holds = f"an ensemble of {have}" if have else "one model"
            raise RestoreError(f"The checkpoint is of {holds}: it has no member {_shown(one)}.", hint=hint)
        else:
            chosen.append(number % known)
    return tuple(chosen) if several else chosen[0]


def _shown(thing: Any) -> str:
    return repr(thing) if isinstance(thing, int | float | str | list | tuple | None) else type(thing).__name__


def _members_in(manifests: Sequence[Manifest]) -> int:
    """How many members a checkpoint has; 0 for one model."""
    found = (members_of(array) for manifest in manifests for _, array in manifest.arrays())
    return next((one[0] for one in found if one is not None), 0)


def regroup(
    plan: PlanTables, record: LeafRecord, ours: ArrayRecord, theirs: ArrayRecord, asked: Asked
) -> Regrouped | tuple[str, str] | None:
    """What becomes of an array; or what it is in the checkpoint, which cannot be restored so, and the hint.

    Returns:
      None where nothing has to become of it, or where the shapes differ, so that nothing can.
    """
    here, there = members_of(ours), members_of(theirs)
    if shape_of_one(ours) != shape_of_one(theirs):
        return None
    if asked is None:
        if here == there or (ours.shape == theirs.shape and None in (here, there)):
            return None  # what `nnx.vmap` has stacked, planned as one model, is the same array
        found: Regrouped | tuple[str, str] | None = _declared(plan, record, here, there)
    elif here is None:
        found = _of_one(plan, record, there, asked)
    else:
        found = _of_many(ours, here, there, asked)
    if isinstance(found, Regrouped) and devices_of(ours) != devices_of(theirs):
        hint = "restore it onto as many devices first, then sw.transfer the members that you want"
        return f"of {devices_of(theirs) or 1} devices, and of other members", hint
    return found


def _declared(
    plan: PlanTables, record: LeafRecord, here: tuple[int, int] | None, there: tuple[int, int] | None
) -> Regrouped | tuple[str, str]:
    """What the kinds alone say: of a larger ensemble what becomes of the members that the checkpoint lacks."""
    many = plan.members or 0
    if here is None:
        assert there is not None, "they differ"
        if many:
            what = f"a value for each of {there[0]} members"
            return what, f"give each member its own here too: plan.stacked({many}, {record.kind}=0)"
        return f"an ensemble of {there[0]}", "one of its members: sw.restore(path, target, members=0)"
    if there is None:
        which = ", ".join(["0"] + ["None"] * (many - 1))
        return (
            "one model",
            f"into one member: sw.restore(path, state, members=[{which}])  # None: the state's own member\n"
            f"or into all, the random streams apart: sw.restore(path, state, members=[0] * {many}, only=('params',))",
        )
    if here[0] == there[0]:
        hint = f"the axis that it was saved with: plan.stacked({many}, {_owner(plan, record)}={there[1]})"
        return f"an ensemble along axis {there[1]}", hint
    if here[0] > there[0] and plan.kinds[record.kind].missing != "error":
        chosen = tuple(at if at < there[0] else None for at in range(here[0]))
        return Regrouped(chosen, there[1], here[1], _words(plan, record.kind, chosen, there[0]))
    which = ", ".join(str(at) if at < there[0] else "None" for at in range(here[0]))
    hint = f"say which of them: sw.restore(path, target, members=[{which}])"
    if here[0] > there[0]:
        hint += "  # None: the target's own member, which has to have values"
    return f"an ensemble of {there[0]}", hint


def _owner(plan: PlanTables, record: LeafRecord) -> str:
    """The kind whose axes an array follows: of optimizer state and averages that which they are of."""
    derived = {one.into: one.kinds for one in plan.derived}
    return derived.get(record.kind, (record.kind,))[0]


def _of_one(
    plan: PlanTables, record: LeafRecord, there: tuple[int, int] | None, asked: Asked
) -> Regrouped | tuple[str, str] | None:
    """Into one model, or into what all members share."""
    if there is None:
        return None
    if isinstance(asked, int):
        return Regrouped(asked, there[1], None, f"member {asked} of {there[0]}")
    hint = f"give each member its own here too: plan.stacked({plan.members}, {record.kind}=0)"
    return f"a value for each of {there[0]} members", hint


def _of_many(
    ours: ArrayRecord, here: tuple[int, int], there: tuple[int, int] | None, asked: Asked
) -> Regrouped | tuple[str, str] | None:
    """Into the members of an ensemble."""
    assert isinstance(asked, tuple), "it was checked"
    if asked == tuple(range(here[0])) and here == there:
        return None
    numbers = [one for one in asked if one is not None]
    if ours.prng is not None and len(set(numbers)) < len(numbers):
        return (
            "one random stream for several members, which would draw the same noise,",
            "restore the kinds without random streams, into a state that has its own: only=('params', 'stats')",
        )
    known = there[0] if there else 1
    axis = None if there is None else there[1]
    return Regrouped(asked, axis, here[1], _chosen_words(asked, known, "kept"))


def _words(plan: PlanTables, kind: str, chosen: tuple[int | None, ...], known: int) -> str:
    return _chosen_words(chosen, known, "restarted" if plan.kinds[kind].missing == "restart" else "kept")


def _chosen_words(chosen: tuple[int | None, ...], known: int, rest: str) -> str:
    numbers = [str(one) for one in chosen if one is not None]
    lacking = [str(at) for at, one in enumerate(chosen) if one is None]
    of = f"member{'s' * (len(numbers) != 1)} {', '.join(numbers)} of {known}" if numbers else f"no member of {known}"
    return of + (f"; {', '.join(lacking)} {rest}" if lacking else "")


def regrouped(array: Any, change: Regrouped, own: Any, sharding: Any) -> Any:
    """The array of the target's members.

    Args:
      array: as it was saved.
      change: what becomes of it.
      own: what the target's members have that get nothing from the checkpoint, in the target's shape; None if all do.
      sharding: where it goes.
    """
    array = jnp.asarray(array)
    if isinstance(change.chosen, int):
        made = _at(array, change.chosen, change.theirs)
    else:
        made = jnp.stack(
            [
                _at(own, at, change.ours) if one is None else _at(array, one, change.theirs)
                for at, one in enumerate(change.chosen)
            ],
            change.ours or 0,
        )
    return made if sharding is None else jax.device_put(made, sharding)


def _at(array: Any, number: int, axis: Axis) -> Any:
    return array if axis is None else jax.lax.index_in_dim(array, number, axis, keepdims=False)
