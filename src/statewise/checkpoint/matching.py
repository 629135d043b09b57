"""A target against a checkpoint: what a restore would do with each leaf, and everything that is in its way.

All of this is decided from the manifest and the plan.  No array is read, and nothing of the target is touched, before
it is known that the restore goes through.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise.checkpoint.keys import encode_path, path_id, same_type
from statewise.checkpoint.manifest import ArrayRecord, LeafRecord, Manifest
from statewise.checkpoint.records import Placed, records_of
from statewise.checkpoint.report import Outcome, RestoredLeaf, RestoreReport
from statewise.errors import KindError
from statewise.kinds import unknown_kind
from statewise.paths import Path, format_path, format_shape
from statewise.state import State

__all__ = ["Match", "kinds_to_restore", "match"]


def _ids(paths: Collection[Path]) -> set[str]:
    return {path_id(encode_path(path)) for path in paths}


class Source(NamedTuple):
    """A leaf of the target and the record of it in a checkpoint: the own one's (0) or its base (1)."""

    placed: Placed
    record: LeafRecord
    checkpoint: int


@dataclasses.dataclass(frozen=True)
class Match:
    """How a target and a checkpoint fit.

    Attributes:
      report: what happens to each leaf.
      sources: the leaves to read.
      restarted: the leaves that get a fresh value.
    """

    report: RestoreReport
    sources: tuple[Source, ...]
    restarted: tuple[Placed, ...]


def kinds_to_restore(state: State, only: str | Sequence[str] | None) -> tuple[str, ...]:
    """The kinds that a restore writes.

    Raises:
      KindError: a kind that is not there, or is never saved.
    """
    kinds = state.plan.kinds
    if only is None:
        return tuple(name for name, kind in kinds.items() if kind.saved)
    names = (only,) if isinstance(only, str) else tuple(only)
    for name in names:
        if name not in kinds:
            raise unknown_kind(name, kinds)
        if not kinds[name].saved:
            raise KindError(
                f"The kind {name!r} is declared ephemeral: no checkpoint holds it.",
                kind=name,
                mend=f"leave it out of only; state.restart({name!r}) makes fresh values",
            )
    return tuple(name for name in kinds if name in names)


class _Matcher:
    def __init__(self, state: State, manifests: Sequence[Manifest], kinds: Collection[str], cast: bool) -> None:
        self.plan = state.plan
        self.state = state
        self.kinds = kinds
        self.cast = cast
        self.saved = [manifest.by_id() for manifest in manifests]
        self.done: list[RestoredLeaf] = []
        self.mends: dict[str, None] = {}
        self.sources: list[Source] = []
        self.restarted: list[Placed] = []
        # Under which leaf a path stands in the checkpoint that is another leaf's alias there.
        self.aliases = {
            path_id(encode_path(alias)): leaf
            for manifest in manifests
            for leaf in manifest.leaves
            for alias in leaf.aliases
        }

    def say(self, record: LeafRecord, outcome: Outcome, why: str = "", mend: str = "") -> None:
        self.done.append(RestoredLeaf(record.leaf(), outcome, why))
        if mend:
            self.mends[mend] = None

    def run(self) -> None:
        seen: set[str] = set()
        for placed in records_of(self.plan):
            record = placed.record
            seen.add(record.id)
            found = next(((at, saved[record.id]) for at, saved in enumerate(self.saved) if record.id in saved), None)
            if record.kind not in self.kinds:
                declared = self.plan.kinds[record.kind].saved
                self.without(placed, "not asked for" if declared else "ephemeral, never saved", ephemeral=not declared)
            elif found is None:
                self.missing(placed)
            else:
                self.compare(placed, found[1], found[0])
        tied = {
            path_id(encode_path(alias)): placed.record
            for placed in records_of(self.plan)
            for alias in placed.record.aliases
        }
        for name, leaf in self.saved[0].items():
            if name not in seen:
                self.extra(leaf, tied.get(name))

    # --- one leaf ------------------------------------------------------------------------------------------------

    def without(self, placed: Placed, why: str, *, ephemeral: bool) -> None:
        """A leaf that keeps its value, if it has one."""
        record = placed.record
        if self.has_values(placed):
            self.say(record, "kept", why)
        elif ephemeral and self.plan.kinds[record.kind].restart is not None:
            self.say(record, "restarted", why)
            self.restarted.append(placed)
        else:
            self.say(
                record,
                "problem",
                f"{why}, and the target is abstract: it has no value to keep",
                f"restore into a state with values: sw.restore(path, plan.take(model)); or declare a restart for "
                f"{record.kind!r}",
            )

    def has_values(self, placed: Placed) -> bool:
        part = self.state.part(placed.record.kind).arrays
        return not any(isinstance(array, jax.ShapeDtypeStruct) for array in part)

    def missing(self, placed: Placed) -> None:
        record = placed.record
        treatment = self.plan.kinds[record.kind].missing
        other = self.aliases.get(record.id)
        if treatment == "keep" and self.has_values(placed):
            self.say(record, "kept", "missing from the checkpoint")
        elif treatment == "restart":
            self.say(record, "restarted", "missing from the checkpoint")
            self.restarted.append(placed)
        elif other is not None:
            self.say(
                record,
                "problem",
                f"tied to {format_path(other.path)} in the checkpoint",
                "tie the two in the model before planning it, as they were when it was saved",
            )
        else:
            self.say(
                record,
                "problem",
                "missing from the checkpoint",
                f"to keep the target's values, declare it: kinds.replace({record.kind}=dataclasses.replace("
                f"kinds[{record.kind!r}], missing='keep'))  # or 'restart'",
            )

    def extra(self, leaf: LeafRecord, tied_to: LeafRecord | None) -> None:
        kind = self.plan.kinds.get(leaf.kind)
        if kind is not None and not (kind.saved and leaf.kind in self.kinds):
            return  # of a kind that is not restored here
        if kind is None and len(self.kinds) < sum(kind.saved for kind in self.plan.kinds.values()):
            return  # `only` asks for others
        if tied_to is not None:
            self.say(
                leaf,
                "problem",
                f"a leaf of its own in the checkpoint, tied to {format_path(tied_to.path)} in the target",
                "untie the two in the model before planning it, as they were when it was saved",
            )
            return
        asked = tuple(sorted({placed.record.kind for placed in records_of(self.plan)} & set(self.kinds) - {leaf.kind}))
        self.say(
            leaf,
            "problem",
            "in the checkpoint only",
            "plan what was saved, optimizers included; or ask for the kinds you want: "
            f"sw.restore(path, target, only={asked!r})",
        )

    def compare(self, placed: Placed, there: LeafRecord, checkpoint: int) -> None:
        record = placed.record
        why = self.difference(record, there)
        if why is not None:
            self.say(record, "problem", *why)
            return
        recast = [
            (ours, theirs)
            for ours, theirs in zip(record.arrays, there.arrays, strict=True)
            if ours.dtype != theirs.dtype
        ]
        if recast:
            from_, to = recast[0][1].dtype, recast[0][0].dtype
            if not self.cast:
                self.say(record, "problem", f"is {from_} in the checkpoint", "sw.restore(path, target, cast=True)")
                return
            if not all(_castable(ours, theirs) for ours, theirs in recast):
                self.say(record, "problem", f"is {from_} in the checkpoint, which does not become {to}", _RECAST_MEND)
                return
            self.say(record, "cast", f"from {from_} to {to}")
        else:
            self.say(record, "restored", "from the base" if checkpoint else "")
        self.sources.append(Source(placed, there, checkpoint))

    def difference(self, record: LeafRecord, there: LeafRecord) -> tuple[str, str] | None:
        """What is in the way of restoring one leaf, and the mend; None if nothing is."""
        if there.kind != record.kind:
            return (
                f"of kind {there.kind!r} in the checkpoint",
                f"declare it as it was saved: of kind {there.kind!r}",
            )
        if not same_type(record.type, there.type):
            return (
                f"is a {there.type.replace(':', '.')} in the checkpoint",
                f"give the leaf that type; a class that only moved can say where it was: "
                f"{record.type.rpartition(':')[2]}.__module__ = {there.type.rpartition(':')[0]!r}",
            )
        if record.structure != there.structure or [a.within for a in record.arrays] != [a.within for a in there.arrays]:
            return (
                "holds a value of another structure in the checkpoint",
                "give the Variable a value of the saved structure",
            )
        for ours, theirs in zip(record.arrays, there.arrays, strict=True):
            if ours.prng != theirs.prng:
                is_ = f"a PRNG key of {theirs.prng}" if theirs.prng else "no PRNG key"
                mend = (
                    f"make the key with jax.random.key(seed, impl={theirs.prng!r})"
                    if theirs.prng
                    else "plan a raw array there"
                )
                return f"is {is_} in the checkpoint", mend
            if ours.shape != theirs.shape:
                return (
                    f"is {format_shape(theirs.shape)} in the checkpoint",
                    "build the model with the sizes that it was saved with",
                )
        if _ids(record.aliases) != _ids(there.aliases):
            tied = ", ".join(map(format_path, there.aliases)) or "nothing"
            return f"tied to {tied} in the checkpoint", "tie the same leaves in the model before planning it"
        return None


_RECAST_MEND = "plan the model with the dtype that was saved, restore, and convert it yourself"


def _castable(ours: ArrayRecord, theirs: ArrayRecord) -> bool:
    """Floats become floats, integers integers; anything else would be another number."""
    for family in (jnp.floating, jnp.complexfloating, jnp.integer):
        if jnp.issubdtype(jnp.dtype(theirs.dtype), family):
            return bool(jnp.issubdtype(jnp.dtype(ours.dtype), family))
    return False


def match(
    path: Any, manifests: Sequence[Manifest], state: State, only: str | Sequence[str] | None, cast: bool
) -> Match:
    """Compares a target with a checkpoint, and its base if it has one."""
    matcher = _Matcher(state, manifests, kinds_to_restore(state, only), cast)
    matcher.run()
    written: Mapping[str, str] = manifests[0].written
    report = RestoreReport(str(path), tuple(matcher.done), tuple(matcher.mends), dict(written))
    return Match(report, tuple(matcher.sources), tuple(matcher.restarted))
