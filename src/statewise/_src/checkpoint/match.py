"""Matching a target with a checkpoint: what a restore would do with each leaf, and everything that prevents it.

All of this is decided from the manifest and the plan.  No array is read, and nothing of the target is changed, before
it is known that the restore succeeds.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.compare_records import CAST, TIE, UNTIE, compare_records, hint_of, is_alike
from statewise._src.checkpoint.format.keys import PathId, path_id
from statewise._src.checkpoint.format.locate import leaves_with_base
from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.checkpoint.format.per_device import Refused, Resized, resize
from statewise._src.checkpoint.format.records import Placed, kinds_of, records_of
from statewise._src.checkpoint.members import Regrouped, asked_members, regroup
from statewise._src.checkpoint.renested import arguments, moved, objects, renamed
from statewise._src.checkpoint.restore_report import LeafRestore, Outcome, RestoreReport
from statewise._src.checkpoint.retyped import Retyped
from statewise._src.common.compare import MISSING, UNEXPECTED, Field, Mismatch, fields_of, note_of, uncastable
from statewise._src.common.nnx_graph import is_abstract, is_deleted
from statewise._src.common.paths import format_path
from statewise._src.core.plan import State
from statewise._src.plan.averages import averaged_kind
from statewise._src.plan.ema import EMA
from statewise._src.plan.fresh_values import takes
from statewise._src.plan.optimizer_state import OPTIMIZER
from statewise._src.plan.tables import PlanTables

__all__ = ["Match", "Matcher", "RestoreSource", "match"]

# For each array, what happens to it for another number of devices or members; None for nothing.
Changes = Sequence[Resized | Regrouped | Refused | None]


class RestoreSource(NamedTuple):
    """A leaf of the target, and where its values come from.

    Attributes:
      placed: the leaf.
      record: its record in a checkpoint.
      checkpoint: the number of that checkpoint: 0, or 1 for the base.
      changes: for each array, what happens to it for another number of devices or members; None for nothing.
    """

    placed: Placed
    record: LeafRecord
    checkpoint: int
    changes: tuple[Resized | Regrouped | None, ...]


@dataclasses.dataclass(frozen=True)
class Match:
    """The match of a target and a checkpoint.

    Attributes:
      report: what happens to each leaf.
      sources: the leaves to read.
      restarted: the leaves that get a fresh value.
      initialized: the arrays of optimizers that start as `init` makes them.
    """

    report: RestoreReport
    sources: tuple[RestoreSource, ...]
    restarted: tuple[Placed, ...]
    initialized: tuple[Placed, ...] = ()


class Matcher:
    """Matches each leaf of a target with a checkpoint, and collects what happens to it."""

    def __init__(self, state: State, manifests: Sequence[Manifest], only: object, cast: bool, members: object) -> None:
        self.plan = state.tables
        self.state = state
        self.manifests = manifests
        hint = "leave it out of only; state.restart('{name}') makes fresh values"
        self.kinds = kinds_of(state, only, ": no checkpoint holds it", hint)
        self.only = only
        self.cast = cast
        self.members = asked_members(self.plan, manifests, members)
        self.saved = leaves_with_base(manifests)
        self.done: list[LeafRestore] = []
        # Hints, by their words; those that declare something have the kinds, and what to declare for each.
        self.hints: dict[str, dict[str, str]] = {}
        self.is_too_wide = functools.cache(_is_too_wide)  # for one restore: the configuration may change later
        self.sources: list[RestoreSource] = []
        self.restarted: list[Placed] = []
        self.initialized: list[Placed] = []
        self.retyped = Retyped(self.plan, manifests)
        self.lacking: list[LeafRecord] = []
        # From the other paths of tied leaves in the checkpoint to those leaves.
        self.aliases = {
            path_id(alias): leaf for manifest in manifests for leaf in manifest.leaves for alias in leaf.aliases
        }

    def result(self, path: object) -> Match:
        """Returns what was found, for a checkpoint at this path."""
        hints = tuple(_hint(words, declared, self.plan) for words, declared in self.hints.items())
        report = RestoreReport(str(path), tuple(self.done), hints, dict(self.manifests[0].written))
        return Match(report, tuple(self.sources), tuple(self.restarted), tuple(self.initialized))

    def say(self, record: LeafRecord, outcome: Outcome, why: str = "", hints: Iterable[str] = ()) -> None:
        self.done.append(LeafRestore(record.leaf(), outcome, why))
        for hint in hints:
            self.hints.setdefault(hint, {})

    def declare(self, why: str, kind: str, handling: str) -> None:
        """Adds a hint that declares something, for all kinds in one line: a second line would undo the first."""
        self.hints.setdefault(why, {})[kind] = handling

    def restart(self, placed: Placed, why: str) -> None:
        self.say(placed.record, "restarted", why)
        self.restarted.append(placed)

    def with_values(self) -> str:
        """Returns the hint for a target that has to have values."""
        options = ("" if self.only is None else f", only={self.only!r}") + (", cast=True" if self.cast else "")
        if self.members is not None:
            options += f", members={self.members if isinstance(self.members, int) else list(self.members)}"
        return f"restore into a state with values: sw.restore(path, plan.take(model){options})"

    def run(self) -> None:
        seen: set[PathId] = set()
        tied: dict[PathId, LeafRecord] = {}
        for placed in records_of(self.plan):
            record = placed.record
            seen.add(record.id)
            if record.aliases:
                tied |= {path_id(alias): record for alias in record.aliases}
            if record.kind not in self.kinds:
                self.without(placed)
            elif record.id not in self.saved:
                self.missing(placed)
            else:
                self.compare(placed, *self.saved[record.id])
        # Of the base, only what the target asks for matters.
        left = [leaf for leaf in self.manifests[0].leaves if leaf.id not in seen and self.is_asked(leaf.kind)]
        for leaf in left:
            if leaf.id in tied:
                why = f"a leaf of its own in the checkpoint, tied to {format_path(tied[leaf.id].path)} in the target"
                self.say(leaf, "problem", why, [UNTIE])
        alone = []
        for leaf in left:
            of = self.retyped.companion_of(leaf)
            if of:
                self.say(leaf, "dropped", of)
            elif leaf.id not in tied:
                alone.append(leaf)
        self.extra(alone)
        # If both sides have leaves of a kind that the other lacks, keeping those of one leads to the other's error.
        both = {leaf.kind for leaf in alone}
        self.hints = {
            words: kinds
            for words, declared in self.hints.items()
            if (kinds := {kind: how for kind, how in declared.items() if kind not in both}) or not declared
        }
        why = moved(self.lacking, alone, self.plan)
        if why:
            self.hints = {why: {}} | self.hints

    def is_asked(self, kind: str) -> bool:
        """Returns whether a leaf of the checkpoint should be in the target; of unknown kinds, if all are restored."""
        return kind in self.kinds or (self.only is None and kind not in self.plan.kinds)

    # --- one leaf ------------------------------------------------------------------------------------------------

    def without(self, placed: Placed) -> None:
        """Handles a leaf that is not restored: it keeps its value, if it has one."""
        record, lost = placed.record, self.lost(placed)
        kind = self.plan.kinds[record.kind]
        why = "not asked for" if kind.saved else "ephemeral, never saved"
        if not kind.saved and record.id in self.saved:
            why = "ephemeral: what the checkpoint has is not used"
        if self.follows(record):
            self.begin(placed, why)
        elif not lost and self.is_outdated(record.kind):
            self.restart(placed, f"{why}, and made from {' and '.join(self.restored_sources(record.kind))}")
        elif not lost:
            optimized = (each.kinds for each in self.plan.optimizers if record.path[:2] == (OPTIMIZER, each.label))
            replaced = [name for name in next(optimized, ()) if name in self.replaced]
            verb = "is" if len(replaced) == 1 else "are"
            also = f", though of {', '.join(replaced)}, which {verb} restored" if replaced else ""
            self.say(record, "kept", why + also)
        elif not kind.saved and takes(kind.restart).key:
            # A restore draws nothing: `state.restart(..., key=key)` does, from a key that the program knows.
            why = f"{why}, and its restart takes a key, which a restore does not have"
            draw = f"state.restart({record.kind!r}, key=jax.random.key(0))"
            self.say(record, "problem", why, [f"{self.with_values()}, and then: {draw}"])
        elif not kind.saved and (kind.restart is not None or kind.of is EMA):
            self.restart(placed, why)
        else:
            self.say(record, "problem", f"{why}, and {lost}", [self.with_values()])
            if not kind.saved:
                self.declare("or declare how it starts", record.kind, "restart=jnp.zeros_like")

    def follows(self, record: LeafRecord) -> bool:
        """Returns whether a leaf is an average of a kind of which this restore replaces anything.

        The average would be of other weights, so it starts again, unless the checkpoint has it.  Derived leaves come
        after the leaves that they are derived from, so those are already matched here.
        """
        return self.plan.kinds[record.kind].of is EMA and averaged_kind(record.path) in self.replaced

    def restored_sources(self, kind: str) -> list[str]:
        """Returns the kinds that a kind depends on and that this restore replaces."""
        return [source for source in self.plan.sources.get(kind, ()) if source in self.kinds]

    def is_outdated(self, kind: str) -> bool:
        """Returns whether a kind that no checkpoint holds restarts: in a restore of everything that it was made from.

        If only some kinds are asked for, it is kept as it is, and is stale.
        """
        declared = self.plan.kinds[kind]
        can_restart = declared.restart is not None and not takes(declared.restart).key and not declared.frozen
        is_due = self.only is None and not declared.saved and declared.stale != "keep"
        return is_due and can_restart and bool(self.restored_sources(kind))

    def begin(self, placed: Placed, why: str) -> None:
        """Restarts an average, as a copy of the values that it follows."""
        self.restart(placed, f"{why}, and of {averaged_kind(placed.record.path)}, which is restored")

    @functools.cached_property
    def replaced(self) -> set[str]:
        """Returns the kinds of which something is restored, cast, resized or restarted; called after these."""
        placed = [*(source.placed for source in self.sources), *self.restarted]
        return {record.kind for record, _ in placed if self.plan.kinds[record.kind].of is not EMA}

    def lost(self, placed: Placed) -> str:
        """Returns why a leaf of the target has no value to keep; empty if it has one."""
        part: Sequence[Any] = self.state.part(placed.record.kind).arrays
        if placed.record.kind not in self.plan.packing:
            part = part[placed.start : placed.start + len(placed.record.arrays)]
        if is_abstract(part):
            return "the target is abstract: it has no value to keep"
        return "the target was donated: its value was donated" if any(map(is_deleted, part)) else ""

    def missing(self, placed: Placed) -> None:
        """Handles a leaf that the checkpoint lacks."""
        record = placed.record
        handling = self.plan.kinds[record.kind].missing
        other = self.aliases.get(record.id)
        why = note_of(MISSING, "checkpoint")
        lost = self.lost(placed) if handling == "keep" else ""
        if handling == "restart":
            self.restart(placed, why)
        elif handling == "keep" and self.follows(record):
            self.begin(placed, why)
        elif handling == "keep" and not lost:
            self.say(record, "kept", why)
        elif of := self.retyped.companion_of(record):
            self.start_companion(placed, f"{why}, {of}")
        elif other is not None:
            self.say(record, "problem", f"tied to {format_path(other.path)} in the checkpoint", [TIE])
        elif lost:
            self.say(record, "problem", f"{why}, and {lost}", [self.with_values()])
        else:
            self.lacking.append(record)
            self.say(record, "problem", why)
            kind = self.plan.kinds[record.kind]
            # The hints of all kinds with the same words become one line.
            if kind.of is EMA:
                self.declare("to begin with what is restored, declare it", record.kind, _RESTART)
            elif not self.lost(placed):
                self.declare("to keep the target's values, declare it", record.kind, _KEEP)
            elif kind.restart is not None:
                self.declare("to begin with fresh values, declare it", record.kind, _RESTART)
            else:  # there is no value to keep until the target has values
                self.declare(_VALUES, record.kind, _KEEP)

    def start_companion(self, placed: Placed, why: str) -> None:
        """Handles a moment or an average that is missing because Flax changed the type of its leaf."""
        record, lost = placed.record, self.lost(placed)
        if self.plan.kinds[record.kind].of is EMA:
            self.restart(placed, why)
        elif placed.start in self.moments and record.kind == OPTIMIZER:
            self.say(record, "restarted", why)
            self.initialized.append(placed)
        elif lost:  # state of an nnx.Optimizer, which only the program knows how to begin
            self.say(record, "problem", f"{why}, and {lost}", [self.with_values()])
        else:
            self.say(record, "kept", why)

    @functools.cached_property
    def moments(self) -> set[int]:
        """Returns the positions, in their kind, of the arrays of the plan's optimizers."""
        groups = [each for each in self.plan.derived_arrays if each.derived.trains]
        return {array.position for each in groups for array in each.arrays}

    def extra(self, leaves: Sequence[LeafRecord]) -> None:
        """Handles leaves that only the checkpoint has."""
        excess = {leaf.kind for leaf in leaves}
        present = {placed.record.kind for placed in records_of(self.plan)}
        complete = tuple(kind for kind in self.kinds if kind in present - excess)
        hint = "plan what was saved, optimizers included"
        if complete:
            kept = [placed for placed in records_of(self.plan) if placed.record.kind not in complete]
            target = "plan.take(model)" if any(map(self.lost, kept)) else "target"
            hint += f"; or ask for the kinds you want: sw.restore(path, {target}, only={complete!r})"
        for leaf in leaves:
            self.say(leaf, "problem", note_of(UNEXPECTED, "checkpoint", expected_in="target"), [hint])

    def compare(self, placed: Placed, checkpoint: int, saved: LeafRecord) -> None:
        """Handles a leaf that both sides have."""
        record = placed.record
        wide = [ours.dtype for ours in record.arrays if ours.prng is None and self.is_too_wide(ours.dtype)]
        if wide:
            self.say(record, "problem", f"is {wide[0]}, and this process has no 64-bit numbers", [_WIDE])
            return
        outcome: Outcome = "restored"
        changes: Changes = (None,) * len(record.arrays)
        words: dict[str, None] = {}
        # Nearly all leaves are alike; the rest of the work is only for the others.
        if self.members is not None or not is_alike(record, saved):
            mismatches, was = self.retyped.accept(record, saved, checkpoint, compare_records(record, saved))
            if Field.STRUCTURE not in fields_of(mismatches):  # otherwise the arrays do not correspond
                changes = [
                    regroup(self.plan, record, *pair, self.members) or resize(self.plan, record, *pair)
                    for pair in zip(record.arrays, saved.arrays, strict=True)
                ]
            if self.refuse(placed, saved, mismatches, changes):
                return
            words = dict.fromkeys(change.words for change in changes if change is not None)
            if words:
                outcome = "resized" if any(isinstance(change, Resized) for change in changes) else "regrouped"
            elif mismatches:  # all others were refused
                outcome, words = "cast", dict.fromkeys(f"from {cast.found} to {cast.expected}" for cast in mismatches)
            elif was:
                outcome = "retyped"
            words |= dict.fromkeys([was] if was else [])
        self.say(record, outcome, ", ".join([*words, *["from the base"] * checkpoint]))
        accepted = tuple(change for change in changes if not isinstance(change, Refused))
        self.sources.append(RestoreSource(placed, saved, checkpoint, accepted))

    def refuse(self, placed: Placed, saved: LeafRecord, mismatches: Sequence[Mismatch], changes: Changes) -> bool:
        """Returns whether a leaf cannot be restored, and says why."""
        # A PRNG key and its words are not different dtypes of the same numbers.
        dtypes = [mismatch for mismatch in mismatches if mismatch.field is Field.DTYPE]
        casts = [mismatch for mismatch in dtypes if "key<" not in mismatch.expected + mismatch.found]
        impossible = uncastable(casts)
        end = impossible if self.cast else ""
        if self.cast and not end:
            mismatches = [mismatch for mismatch in mismatches if mismatch not in casts]
        refused = [change for change in changes if isinstance(change, Refused)]
        if mismatches or refused:
            more = [Mismatch(Field.SHAPE, "", each.words) for each in refused]
            hints = [hint_of(mismatch, placed.record, saved) for mismatch in mismatches]
            hints = [_RECAST if impossible and hint == CAST else hint for hint in hints]
            why = note_of((*mismatches, *more), "checkpoint") + end
            self.say(placed.record, "problem", why, [*hints, *(each.hint for each in refused)])
            return True
        lacks = next((change.lacks for change in changes if isinstance(change, Regrouped) and change.lacks), ())
        lost = self.lost(placed) if lacks and self.plan.kinds[placed.record.kind].missing != "restart" else ""
        if lost:
            why = f"members {', '.join(map(str, lacks))} are not in the checkpoint, and {lost}"
            self.say(placed.record, "problem", why, [self.with_values()])
        return bool(lost)


def _is_too_wide(dtype: str) -> bool:
    """Returns whether this process does not have a dtype: 64-bit numbers have to be enabled."""
    return bool(jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)) != jnp.dtype(dtype))


_WIDE = "jax.config.update('jax_enable_x64', True)  # before any array is made"
_RECAST = "plan the model with the dtype that was saved, restore, and convert it yourself"
_KEEP = "missing='keep'"
_RESTART = "missing='restart'"
_VALUES = "to begin with a model's values, declare it, and restore into a state that has them"


def _hint(words: str, declared: Mapping[str, str], plan: PlanTables) -> str:
    if not declared:
        return words
    changes = (f"{kind}=dataclasses.replace(plan.kinds[{kind!r}], {what})" for kind, what in declared.items())
    code = f"kinds = plan.kinds.replace({', '.join(changes)})"
    if words == _VALUES:
        code += f"; target = kinds.plan({arguments(plan)}).take({objects(plan)})"
    return f"{words}: {code}"


def match(
    path: object, manifests: Sequence[Manifest], state: State, only: object, cast: bool, members: object
) -> Match:
    """Matches a target with a checkpoint, and its base if it has one."""
    matcher = Matcher(state, manifests, only, cast, members)
    matcher.run()
    matched = matcher.result(path)
    if matched.report.hints and (names := renamed(state.tables, manifests[0])):
        # The other differences follow from this one.
        return dataclasses.replace(matched, report=dataclasses.replace(matched.report, hints=(names,)))
    return matched
