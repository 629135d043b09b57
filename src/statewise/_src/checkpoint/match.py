"""A target against a checkpoint: what a restore would do with each leaf, and everything that is in its way.

All of this is decided from the manifest and the plan.  No array is read, and nothing of the target is touched, before
it is known that the restore goes through.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.compare_records import CAST, TIE, UNTIE, compare_records, hints_of, is_alike
from statewise._src.checkpoint.format.keys import PathId, path_id
from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.checkpoint.format.per_device import Resized, resize
from statewise._src.checkpoint.format.records import Placed, kinds_of, records_of
from statewise._src.checkpoint.members import Regrouped, asked_members, regroup
from statewise._src.checkpoint.renested import arguments, moved, objects, renamed
from statewise._src.checkpoint.restore_report import LeafRestore, Outcome, RestoreReport
from statewise._src.common.compare import (
    MISSING,
    UNEXPECTED,
    Field,
    Mismatch,
    fields_of,
    note_of,
    uncastable,
)
from statewise._src.common.nnx_graph import is_abstract, is_deleted
from statewise._src.common.paths import Path, format_path
from statewise._src.core.plan import State
from statewise._src.plan.averages import averaged_kind
from statewise._src.plan.ema import EMA
from statewise._src.plan.fresh_values import takes
from statewise._src.plan.optimizer_state import OPTIMIZER
from statewise._src.plan.tables import PlanTables

__all__ = ["Match", "kinds_to_restore", "match"]


class RestoreSource(NamedTuple):
    """A leaf of the target and the record of it in a checkpoint: the own one's (0) or its base (1).

    `changes` tells of each of its arrays what becomes of it on another number of devices, or of members.
    """

    placed: Placed
    record: LeafRecord
    checkpoint: int
    changes: tuple[Resized | Regrouped | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Match:
    """How a target and a checkpoint fit.

    Attributes:
      report: what happens to each leaf.
      sources: the leaves to read.
      restarted: the leaves that get a fresh value.
    """

    report: RestoreReport
    sources: tuple[RestoreSource, ...]
    restarted: tuple[Placed, ...]


def kinds_to_restore(state: State, only: object) -> tuple[str, ...]:
    """The kinds that a restore writes.

    Raises:
      DeclarationError: a kind that is not there, or is never saved.
    """
    hint = "leave it out of only; state.restart('{name}') makes fresh values"
    return kinds_of(state, only, ": no checkpoint holds it", hint)


class _Matcher:
    def __init__(self, state: State, manifests: Sequence[Manifest], only: object, cast: bool, members: object) -> None:
        self.plan = state.tables
        self.state = state
        self.manifests = manifests
        self.kinds = kinds_to_restore(state, only)
        self.all = only is None
        self.cast = cast
        self.members = asked_members(self.plan, manifests, members)
        self.saved = [manifest.by_id() for manifest in manifests]
        self.done: list[LeafRestore] = []
        self.only = only
        # Hints in words; and those that declare something, with the kinds and what is declared of each.
        self.hints: dict[str, dict[str, str]] = {}
        self.wide: dict[str, bool] = {}
        self.sources: list[RestoreSource] = []
        self.restarted: list[Placed] = []
        self.lacking: list[LeafRecord] = []
        # Under which leaf a path stands in the checkpoint that is another leaf's alias there.
        self.aliases = {
            path_id(alias): leaf for manifest in manifests for leaf in manifest.leaves for alias in leaf.aliases
        }

    def say(self, record: LeafRecord, outcome: Outcome, why: str = "", hints: Iterable[str] = ()) -> None:
        self.done.append(LeafRestore(record.leaf(), outcome, why))
        for hint in hints:
            self.hints.setdefault(hint, {})

    def declare(self, why: str, kind: str, handling: str) -> None:
        """A hint that declares something; of all kinds at once, as a line for each would undo the one before."""
        self.hints.setdefault(why, {})[kind] = handling

    def with_values(self) -> str:
        """The hint for a target that has to have values."""
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
            found = self.find(record)
            if record.kind not in self.kinds:
                self.without(placed)
            elif found is None:
                self.missing(placed)
            else:
                self.compare(placed, *found)
        left = [leaf for name, leaf in self.saved[0].items() if name not in seen and self.is_asked(leaf.kind)]
        for leaf in left:
            if leaf.id in tied:
                why = f"a leaf of its own in the checkpoint, tied to {format_path(tied[leaf.id].path)} in the target"
                self.say(leaf, "problem", why, [UNTIE])
        alone = [leaf for leaf in left if leaf.id not in tied]
        self.extra(alone)
        both = {leaf.kind for leaf in alone}
        for words, declared in list(self.hints.items()):
            # Where a kind has leaves on either side alone, to keep one side's would lead to the other's error.
            kinds = {kind: how for kind, how in declared.items() if kind not in both}
            self.hints[words] = kinds
            if declared and not kinds:
                del self.hints[words]
        why = moved(self.lacking, alone, self.plan)
        if why:
            self.hints = {why: {}} | self.hints

    def find(self, record: LeafRecord) -> tuple[LeafRecord, int] | None:
        """The record of a leaf, in the checkpoint (0) or, of a kind that this leaves to its base, there (1)."""
        for at, saved in enumerate(self.saved):
            there = saved.get(record.id)
            if there is not None and (at == 0 or not self.has_saved(there.kind)):
                return there, at
        return None

    def has_saved(self, kind: str) -> bool:
        """Whether the checkpoint itself holds a kind."""
        declared = self.manifests[0].kinds.get(kind)
        return declared is not None and declared.saved

    def is_asked(self, kind: str) -> bool:
        """Whether a leaf of the checkpoint, of this kind, should be in the target: of unknown kinds, if all should."""
        return kind in self.kinds or (self.all and kind not in self.plan.kinds)

    # --- one leaf ------------------------------------------------------------------------------------------------

    def without(self, placed: Placed) -> None:
        """A leaf that keeps its value, if it has one."""
        record, lost = placed.record, self.lost(placed)
        kind = self.plan.kinds[record.kind]
        why = "not asked for" if kind.saved else "ephemeral, never saved"
        if self.follows(record):
            self.begin(placed, why)
        elif not lost:
            of = [name for name in optimized_kinds(self.plan, record.path) if name in self.replaced]
            also = f", though of {', '.join(of)}, which {'is' if len(of) == 1 else 'are'} restored" if of else ""
            self.say(record, "kept", why + also)
        elif not kind.saved and takes(kind.restart).key:
            # Whatever is drawn is drawn by `state.restart(..., key=key)`, from a key that the program knows.
            why = f"{why}, and its restart takes a key, which a restore does not have"
            draw = f"state.restart({record.kind!r}, key=jax.random.key(0))"
            self.say(record, "problem", why, [f"{self.with_values()}, and then: {draw}"])
        elif not kind.saved and (kind.restart is not None or kind.of is EMA):
            self.say(record, "restarted", why)
            self.restarted.append(placed)
        else:
            self.say(record, "problem", f"{why}, and {lost}", [self.with_values()])
            if not kind.saved:
                self.declare("or declare how it starts", record.kind, "restart=jnp.zeros_like")

    def follows(self, record: LeafRecord) -> bool:
        """Whether a leaf is an average of a kind of which this restore replaces anything.

        It would be of other weights, so it begins again, unless it comes from the checkpoint itself.  What is derived
        stands after the leaves that it is of: those have been compared when this is asked.
        """
        if self.plan.kinds[record.kind].of is not EMA:
            return False
        return averaged_kind(record.path) in self.replaced

    def begin(self, placed: Placed, why: str) -> None:
        """An average that begins as a copy of what it is of."""
        of = averaged_kind(placed.record.path)
        self.say(placed.record, "restarted", f"{why}, and of {of}, which is restored")
        self.restarted.append(placed)

    @functools.cached_property
    def replaced(self) -> set[str]:
        """The kinds of which something is restored, cast, resized or restarted."""
        placed = [*(source.placed for source in self.sources), *self.restarted]
        return {one.record.kind for one in placed if self.plan.kinds[one.record.kind].of is not EMA}

    def lost(self, placed: Placed) -> str:
        """Why a leaf of the target has no value to keep; empty if it has one."""
        part: Sequence[Any] = self.state.part(placed.record.kind).arrays
        if placed.record.kind not in self.plan.packing:
            part = part[placed.start : placed.start + len(placed.record.arrays)]
        if is_abstract(part):
            return "the target is abstract: it has no value to keep"
        return "the target was donated: its value was donated" if any(map(is_deleted, part)) else ""

    def missing(self, placed: Placed) -> None:
        record = placed.record
        handling = self.plan.kinds[record.kind].missing
        other = self.aliases.get(record.id)
        why = note_of(MISSING, "checkpoint")
        lost = self.lost(placed) if handling == "keep" else ""
        if handling == "restart":
            self.say(record, "restarted", why)
            self.restarted.append(placed)
        elif handling == "keep" and self.follows(record):
            self.begin(placed, why)
        elif handling == "keep" and not lost:
            self.say(record, "kept", why)
        elif other is not None:
            self.say(record, "problem", f"tied to {format_path(other.path)} in the checkpoint", [TIE])
        elif lost:
            self.say(record, "problem", f"{why}, and {lost}", [self.with_values()])
        else:
            self.lacking.append(record)
            self.say(record, "problem", why)
            kind = self.plan.kinds[record.kind]
            if kind.of is EMA:
                self.declare("to begin with what is restored, declare it", record.kind, _ANEW)
            elif not self.lost(placed):
                self.declare("to keep the target's values, declare it", record.kind, _KEEP)
            elif kind.restart is not None:
                self.declare("to begin with fresh values, declare it", record.kind, _ANEW)
            else:  # there is nothing to keep before there are values
                self.declare(_VALUES, record.kind, _KEEP)

    def extra(self, leaves: Sequence[LeafRecord]) -> None:
        """Leaves that the checkpoint alone has."""
        too_many = {leaf.kind for leaf in leaves}
        there = {placed.record.kind for placed in records_of(self.plan)}
        whole = tuple(kind for kind in self.kinds if kind in there - too_many)
        hint = "plan what was saved, optimizers included"
        if whole:
            kept = [placed for placed in records_of(self.plan) if placed.record.kind not in whole]
            target = "plan.take(model)" if any(map(self.lost, kept)) else "target"
            hint += f"; or ask for the kinds you want: sw.restore(path, {target}, only={whole!r})"
        for leaf in leaves:
            self.say(leaf, "problem", note_of(UNEXPECTED, "checkpoint", expected_in="target"), [hint])

    def compare(self, placed: Placed, there: LeafRecord, checkpoint: int) -> None:
        record = placed.record
        wide = [ours.dtype for ours in record.arrays if ours.prng is None and self.is_too_wide(ours.dtype)]
        if (
            not wide and self.members is None and is_alike(record, there)
        ):  # as nearly all are: what follows looks for the difference
            self.say(record, "restored", "from the base" if checkpoint else "")
            self.sources.append(RestoreSource(placed, there, checkpoint, (None,) * len(record.arrays)))
            return
        if wide:
            self.say(record, "problem", f"is {wide[0]}, and this process has no 64-bit numbers", [_WIDE])
            return
        mismatches = compare_records(record, there)
        casts = [mismatch for mismatch in mismatches if mismatch.field is Field.DTYPE and _is_cast(mismatch)]
        changes = self.changed(record, there, mismatches)
        end = uncastable(casts) if self.cast else ""
        if self.cast and not end:
            mismatches = tuple(mismatch for mismatch in mismatches if mismatch not in casts)
        words = [one for one in changes if isinstance(one, tuple) and not isinstance(one, Resized | Regrouped)]
        if mismatches or words:
            more = tuple(Mismatch(Field.SHAPE, "", word) for word, _ in words)
            hints = [_RECAST if end and hint == CAST else hint for hint in hints_of(mismatches, record, there)]
            why = note_of((*mismatches, *more), "checkpoint") + end
            self.say(record, "problem", why, [*hints, *(hint for _, hint in words)])
            return
        lacks = self.lacking_members(placed, changes)
        if lacks:
            self.say(record, "problem", lacks, [self.with_values()])
            return
        onto = list(dict.fromkeys(one.words for one in changes if one is not None))
        if onto:
            outcome: Outcome = "resized" if any(isinstance(one, Resized) for one in changes) else "regrouped"
            self.say(record, outcome, ", ".join([*onto, *["from the base"] * checkpoint]))
        elif casts:
            onto = list(dict.fromkeys(f"from {cast.found} to {cast.expected}" for cast in casts))
            self.say(record, "cast", ", ".join([*onto, *["from the base"] * checkpoint]))
        else:
            self.say(record, "restored", "from the base" if checkpoint else "")
        self.sources.append(RestoreSource(placed, there, checkpoint, tuple(changes)))

    def is_too_wide(self, dtype: str) -> bool:
        """Whether this process has no such numbers."""
        if dtype not in self.wide:
            self.wide[dtype] = jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)) != jnp.dtype(dtype)
        return self.wide[dtype]

    def changed(self, record: LeafRecord, there: LeafRecord, mismatches: Sequence[Mismatch]) -> list[Any]:
        """What becomes of each array on another number of devices, or of members; words where nothing can."""
        if Field.STRUCTURE in fields_of(mismatches):
            return [None] * len(record.arrays)
        return [
            regroup(self.plan, record, *pair, self.members) or resize(self.plan, record, *pair)
            for pair in zip(record.arrays, there.arrays, strict=True)
        ]

    def lacking_members(self, placed: Placed, changes: Sequence[Any]) -> str:
        """What is in the way where members that the checkpoint lacks are to keep values, and have none."""
        lacks = [one.lacks for one in changes if isinstance(one, Regrouped) and one.lacks]
        if not lacks or self.plan.kinds[placed.record.kind].missing == "restart":
            return ""
        lost = self.lost(placed)
        return lost and f"members {', '.join(map(str, lacks[0]))} are not in the checkpoint, and {lost}"


def _is_cast(mismatch: Mismatch) -> bool:
    """Whether two dtypes differ in what they hold of numbers; a PRNG key is another matter."""
    return not any(dtype.startswith("key<") for dtype in (mismatch.expected, mismatch.found))


def optimized_kinds(plan: PlanTables, path: Path) -> tuple[str, ...]:
    """The kinds that an optimizer's state is of, from the path of one of its leaves; none for any other leaf."""
    return next((one.kinds for one in plan.optimizers if path[:2] == (OPTIMIZER, one.label)), ())


_WIDE = "jax.config.update('jax_enable_x64', True)  # before any array is made"
_RECAST = "plan the model with the dtype that was saved, restore, and convert it yourself"
_KEEP = "missing='keep'"
_ANEW = "missing='restart'"


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
    path: Any,
    manifests: Sequence[Manifest],
    state: State,
    only: object,
    cast: bool,
    members: object = None,
) -> Match:
    """Compares a target with a checkpoint, and its base if it has one."""
    matcher = _Matcher(state, manifests, only, cast, members)
    matcher.run()
    written: Mapping[str, str] = manifests[0].written
    hints = tuple(_hint(words, declared, state.tables) for words, declared in matcher.hints.items())
    if hints and (names := renamed(state.tables, manifests[0])):
        hints = (names,)  # what else could be said of each leaf follows from that
    report = RestoreReport(str(path), tuple(matcher.done), hints, dict(written))
    return Match(report, tuple(matcher.sources), tuple(matcher.restarted))
