"""The members of an ensemble in a checkpoint, and what a restore into another ensemble, or into one model, does.

A checkpoint has an ensemble's array as a state holds it; its placement in the manifest gives the number of members and
their axis: `{"members": {"number": 8, "axis": 0}}`.  Into the same number of members it is restored as it was.  Which
of them go into another number is never guessed: `sw.restore(path, target, members=...)` says so, or, for those that the
checkpoint lacks, the kind's `missing`.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord, Manifest
from statewise._src.checkpoint.format.per_device import Refused, count_members, devices_of, members_of, shape_of_one
from statewise._src.common.numbers import whole_number
from statewise._src.common.placing import placed
from statewise._src.plan.members import Axis
from statewise._src.plan.tables import PlanTables
from statewise.errors import RestoreError

__all__ = ["Asked", "Regrouped", "asked_members", "regroup", "regrouped"]

# The value of `members=`: for each member of the target that of the checkpoint, or None; for one model its number.
Asked = int | tuple[int | None, ...] | None


class Regrouped(NamedTuple):
    """What happens to an array that goes into other members.

    Attributes:
      chosen: as in `Asked`, which of the checkpoint's members go where.
      theirs: the axis of the members in the checkpoint; None for one value.
      ours: their axis in the target.
      words: what the report says about it.
    """

    chosen: int | tuple[int | None, ...]
    theirs: Axis
    ours: Axis
    words: str

    @property
    def lacks(self) -> tuple[int, ...]:
        """Returns the members of the target that get nothing from the checkpoint."""
        if isinstance(self.chosen, int):
            return ()
        return tuple(index for index, member in enumerate(self.chosen) if member is None)


_Change = Regrouped | Refused


def asked_members(plan: PlanTables, manifests: Sequence[Manifest], members: Any) -> Asked:
    """Checks `members=` against the target and the checkpoint, and returns it.

    Raises:
      RestoreError: it is not a number for one model, or not one for each member of an ensemble; it names a member that
        the checkpoint does not have.
    """
    if members is None:
        return None
    number = count_members(manifests)
    known = number or 1
    several = isinstance(members, Iterable) and not isinstance(members, str | bytes)
    given = list(members) if several else [members]
    hint = f"members=[{_numbers(plan.members, known)}]" if plan.members else "members=0"
    explained = f"{hint}  # for each member of the target that of the checkpoint, or None" if plan.members else hint
    if isinstance(members, Mapping | Set):
        raise RestoreError(f"members={members!r} has no order: it is unknown which member goes where.", hint=explained)
    if several is (plan.members is None):
        what = "one model" if plan.members is None else f"an ensemble of {plan.members}"
        raise RestoreError(f"members={_shown(members)} does not fit a target that is {what}.", hint=hint)
    if plan.members is not None and len(given) != plan.members:
        raise RestoreError(
            f"members= names {len(given)} members, and the target is an ensemble of {plan.members}.", hint=explained
        )
    chosen: list[Any] = []
    for member in given:
        index = whole_number(member, -known)
        if member is None and several:
            chosen.append(None)
        elif index is not None and index < known:
            chosen.append(index % known)
        else:
            holds = f"an ensemble of {number}" if number else "one model"
            raise RestoreError(f"The checkpoint is of {holds}: it has no member {_shown(member)}.", hint=hint)
    return tuple(chosen) if several else chosen[0]


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | float | str | list | tuple | None) else type(value).__name__


def _numbers(count: int, known: int) -> str:
    """Returns a list of members as code: the numbers of those that the checkpoint has, then None."""
    return ", ".join(str(index) if index < known else "None" for index in range(count))


def regroup(
    plan: PlanTables, record: LeafRecord, ours: ArrayRecord, theirs: ArrayRecord, asked: Asked
) -> Regrouped | Refused | None:
    """Returns what happens to an array that has other members in the checkpoint.

    Returns:
      None if nothing happens to it, or if the shapes differ, which is another problem.
    """
    own, saved = members_of(ours), members_of(theirs)
    if shape_of_one(ours) != shape_of_one(theirs):
        return None
    if asked is None and (own == saved or (ours.shape == theirs.shape and None in (own, saved))):
        return None  # an array stacked by `nnx.vmap`, planned as one model, is the same array
    if own is None:
        change = _into_one(plan, record, saved, asked)
    elif asked is None:
        change = _by_kind(plan, record, own, saved)
    else:
        change = _as_asked(ours, own, saved, asked)
    if isinstance(change, Regrouped) and devices_of(ours) != devices_of(theirs):
        hint = "restore it onto as many devices first, then sw.transfer the members that you want"
        return Refused(f"of {devices_of(theirs) or 1} devices, and of other members", hint)
    return change


def _into_one(plan: PlanTables, record: LeafRecord, saved: tuple[int, int] | None, asked: Asked) -> _Change | None:
    """Returns the change into one model's array, or into one that all members share."""
    if saved is None:
        return None
    if plan.members:
        hint = f"give each member its own here too: plan.stacked({plan.members}, {record.kind}=0)"
        return Refused(f"a value for each of {saved[0]} members", hint)
    if isinstance(asked, int):
        return Regrouped(asked, saved[1], None, f"member {asked} of {saved[0]}")
    return Refused(f"an ensemble of {saved[0]}", "one of its members: sw.restore(path, target, members=0)")


def _by_kind(plan: PlanTables, record: LeafRecord, own: tuple[int, int], saved: tuple[int, int] | None) -> _Change:
    """Returns the change without `members=`: `missing` decides about members that the checkpoint lacks."""
    if saved is None:
        into_one = f"sw.restore(path, state, members=[{_numbers(own[0], 1)}])  # None: the state's own member"
        into_all = f"sw.restore(path, state, members=[0] * {own[0]}, only=('params',))"
        hint = f"into one member: {into_one}\nor into all, except for the random streams: {into_all}"
        return Refused("one model", hint)
    if own[0] == saved[0]:
        # The axes of optimizer state and averages follow those of the kind that they are derived from.
        owner = {derived.into: derived.kinds for derived in plan.derived}.get(record.kind, (record.kind,))[0]
        hint = f"the axis that it was saved with: plan.stacked({own[0]}, {owner}={saved[1]})"
        return Refused(f"an ensemble along axis {saved[1]}", hint)
    missing = plan.kinds[record.kind].missing
    if own[0] > saved[0] and missing != "error":
        chosen = tuple(index if index < saved[0] else None for index in range(own[0]))
        words = _words(chosen, saved[0], "restarted" if missing == "restart" else "kept")
        return Regrouped(chosen, saved[1], own[1], words)
    hint = f"say which of them: sw.restore(path, target, members=[{_numbers(own[0], saved[0])}])"
    if own[0] > saved[0]:
        hint += "  # None: the target's own member, which has to have values"
    return Refused(f"an ensemble of {saved[0]}", hint)


def _as_asked(ours: ArrayRecord, own: tuple[int, int], saved: tuple[int, int] | None, asked: Asked) -> _Change | None:
    """Returns the change into the members of an ensemble, with `members=`."""
    assert isinstance(asked, tuple), "it was checked"
    if asked == tuple(range(own[0])) and own == saved:
        return None
    members = [member for member in asked if member is not None]
    if ours.prng is not None and len(set(members)) < len(members):
        return Refused(
            "one random stream for several members, which would draw the same noise,",
            "restore the kinds without random streams, into a state that has its own: only=('params', 'stats')",
        )
    known, axis = saved or (1, None)
    return Regrouped(asked, axis, own[1], _words(asked, known, "kept"))


def _words(chosen: tuple[int | None, ...], known: int, rest: str) -> str:
    numbers = [str(member) for member in chosen if member is not None]
    lacking = [str(index) for index, member in enumerate(chosen) if member is None]
    of = f"member{'s' * (len(numbers) != 1)} {', '.join(numbers)} of {known}" if numbers else f"no member of {known}"
    return of + (f"; {', '.join(lacking)} {rest}" if lacking else "")


def regrouped(array: Any, change: Regrouped, own: Any, sharding: Any) -> Any:
    """Returns the array of the target's members.

    Args:
      array: the array, as it was saved.
      change: what happens to it.
      own: the values of the target's members that get nothing from the checkpoint, in the target's shape; None if all
        members get something.
      sharding: the sharding of the result.
    """
    array = jnp.asarray(array)
    if isinstance(change.chosen, int):
        members = _at(array, change.chosen, change.theirs)
    else:
        slices = [
            _at(own, index, change.ours) if member is None else _at(array, member, change.theirs)
            for index, member in enumerate(change.chosen)
        ]
        members = jnp.stack(slices, change.ours or 0)
    return members if sharding is None else placed(members, sharding)


def _at(array: Any, number: int, axis: Axis) -> Any:
    return array if axis is None else jax.lax.index_in_dim(array, number, axis, keepdims=False)
