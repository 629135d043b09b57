"""Matching a target with files that have other names: `sw.restore(path, target, names=...)`.

The names make a source of the target's own paths and shapes out of the files; of this source the manifest is made that
a checkpoint of ours would have.  What a restore does with each leaf is then decided as for any other checkpoint.  The
difference is in what the files cannot have: optimizer state, random streams, averages, metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.checkpoint.format.records import Placed, records_of
from statewise._src.checkpoint.interop.adapter_folder import as_read
from statewise._src.checkpoint.interop.match import is_of_run, note_of_tied, same_values
from statewise._src.checkpoint.interop.named import arrays_of, as_ours
from statewise._src.checkpoint.interop.placed import read_placed
from statewise._src.checkpoint.interop.sources import Source
from statewise._src.checkpoint.match import Match, Matcher, RestoreSource
from statewise._src.checkpoint.restore_report import LeafRestore, Outcome
from statewise._src.common.narrowing import may_lose
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.core.plan import State
from statewise._src.names.names import NamesData
from statewise._src.plan.ema import EMA
from statewise._src.plan.tables import OPTIMIZER

__all__ = ["NamedMatch", "match_names"]

# Reads the arrays of a leaf, with the sharding of each.
Reader = Callable[[RestoreSource, Sequence[Any]], list[Any]]


@dataclasses.dataclass(frozen=True)
class NamedMatch:
    """The match of a target and files of other names.

    Attributes:
      matched: what happens to each leaf.
      read: reads the arrays of a leaf.
    """

    matched: Match
    read: Reader


class _NamedMatcher(Matcher):
    def __init__(
        self,
        state: State,
        manifest: Manifest,
        only: object,
        cast: bool,
        source: Source,
        problems: Problems,
        check: bool,
        names: NamesData,
    ) -> None:
        super().__init__(state, [manifest], only, cast, None)
        self.source, self.check, self.names = source, check, names
        self.types: dict[Path, Any] = {leaf.path: leaf.type for leaf in self.plan.leaves}
        self.wrong: dict[Path, list[Leaf]] = {}
        for leaf in problems.leaves:
            self.wrong.setdefault(leaf.path, []).append(leaf)
        self.found_hints = problems.hints
        self.without_value: dict[str, None] = {}

    def missing(self, placed: Placed) -> None:
        """Handles a leaf that the files lack."""
        record = placed.record
        if record.path in self.wrong:
            for leaf in self.wrong[record.path]:
                self.say(record, "problem", leaf.note, self.found_hints)
        elif self.plan.kinds[record.kind].of is EMA:
            self.restart(placed, "not in the files")
        elif record.kind == OPTIMIZER and placed.start in self.moments and self.lost(placed):
            self.say(record, "restarted", "not in the files: as the optimizer's init makes it")
            self.initialized.append(placed)
        elif record.kind == OPTIMIZER or is_of_run(self.types.get(record.path)):
            self.keep(placed, "not in the files")
        elif self.by_design(record):
            self.keep(placed, "not in the files, as the names say")
        elif self.plan.kinds[record.kind].missing != "error":
            super().missing(placed)
        else:
            self.say(record, "problem", "has no row in the names", [self.names.hint_of(record.path)])

    def keep(self, placed: Placed, why: str) -> None:
        """Keeps the target's value; a check of the names alone does not ask for one."""
        lost = self.lost(placed)
        if not lost or self.check:
            self.say(placed.record, "kept", why)
        elif self.plan.kinds[placed.record.kind].missing == "restart":
            self.restart(placed, why)
        else:
            self.say(placed.record, "problem", f"{why}, and {lost}", [self.with_values()])
            self.without_value[placed.record.kind] = None

    def with_values(self) -> str:
        """Returns the hint for a target that has to have values."""
        return f"{super().with_values().removesuffix(')')}, names=names)"

    def run(self) -> None:
        """Matches everything."""
        super().run()
        if self.without_value:
            # A program of these values alone: what the files have is not computed, and takes no memory.
            computed = (f"{kind}=jax.jit(lambda: plan.take(make_model())[{kind!r}])()" for kind in self.without_value)
            self.hints[f"or compute only what the files lack: target = target.replace({', '.join(computed)})"] = {}

    def by_design(self, record: LeafRecord) -> bool:
        """Returns whether the names say that no array of a leaf is in the files."""
        paths = {format_path(record.path + array.within) for array in record.arrays}
        return paths <= self.source.by_design

    def without(self, placed: Placed) -> None:
        """Handles a leaf that is not asked for, or never saved."""
        if self.check:
            self.say(placed.record, "kept", "not asked for")
        else:
            super().without(placed)


def match_names(
    path: object, source: Source, names: NamesData, state: State, only: object, cast: bool, check: bool = False
) -> NamedMatch:
    """Matches a target with files of other names.

    Args:
      path: where the files are, for the report.
      source: the files.
      names: what the leaves of the target are called there.
      state: the target.
      only: the kinds to restore; None for all that are saved.
      cast: whether other dtypes are allowed.
      check: whether only the names are of interest, and leaves that the files cannot have need no value.
    """
    ours, problems = as_ours(as_read(path, source), names, state)
    entry_of = _entries(state, ours, problems)
    by_name = {entry.name: entry for entry in ours.entries}
    found: list[LeafRecord] = []
    wrong = {leaf.path for leaf in problems.leaves}
    for record, _ in records_of(state.tables):
        keys = [(record.path, array.within) for array in record.arrays]
        if keys and record.path not in wrong and all(key in entry_of for key in keys):
            arrays = tuple(
                array if array.prng else dataclasses.replace(array, dtype=by_name[entry_of[key]].dtype, stored=None)
                for key, array in zip(keys, record.arrays, strict=True)
            )
            found.append(dataclasses.replace(record, arrays=arrays))
    matcher = _NamedMatcher(state, Manifest({}, "named", {}, tuple(found)), only, cast, ours, problems, check, names)
    matcher.run()
    matched = matcher.result(source.name if isinstance(path, (list, tuple)) else path)
    report = matched.report
    unused, hints = _unused(ours, names, state, problems), report.hints
    if any(each.why.endswith("which is not saved") for each in unused):
        hints = (*hints, "leave the row out, or declare the kind with Kind(..., saved=True)")
    if any(each.why.endswith("matches no leaf for it") for each in unused):
        hints = (*hints, "a model of the size of the files: as many layers, and every leaf that a row is about")
    report = dataclasses.replace(report, leaves=(*report.leaves, *unused), hints=hints)

    def read(leaf: RestoreSource, shardings: Sequence[Any]) -> list[Any]:
        arrays = []
        pairs = zip(leaf.record.arrays, leaf.placed.record.arrays, shardings, strict=True)
        for record, target, sharding in pairs:
            entry = by_name[entry_of[leaf.placed.record.path, record.within]]
            # A cast that cannot lose a number needs no check of them all, and no second array.
            exact = record.prng is None and not may_lose(jnp.dtype(record.dtype), jnp.dtype(target.dtype))
            arrays.append(read_placed(ours, entry, record.prng, sharding, target.dtype if exact else None))
        return arrays

    return NamedMatch(dataclasses.replace(matched, report=report), read)


def _entries(state: State, ours: Source, problems: Problems) -> dict[tuple[Path, Path], str]:
    """Returns the entry that each array is read from, by its leaf's path and its keys within.

    A tied leaf may have several.  Only these are read for it: their values have to be equal, because a leaf has one.
    """
    known = {entry.name for entry in ours.entries}
    found: dict[tuple[Path, Path], str] = {}
    for array in arrays_of(state):
        ways = (array.leaf.path, *array.leaf.aliases)
        texts = [text for text in (format_path(way + array.within) for way in ways) if text in known]
        if not texts:
            continue
        first = ours.read(texts[:1]) if len(texts) > 1 else {}
        differs = next((text for text in texts[1:] if not same_values(first[texts[0]], ours.read((text,))[text])), None)
        if differs is None:
            found[array.leaf.path, array.within] = texts[0]
            continue
        note = note_of_tied(texts[0], differs)
        problems.add(array.leaf, note, f"untie the leaves in the model, or leave the row {differs!r} out of the names")
    return found


def _unused(ours: Source, names: NamesData, state: State, problems: Problems) -> list[LeafRestore]:
    """Returns what is said of each name in the files that no leaf is read from."""
    # A leaf whose array was not used has a problem of its own, and then the row does match one.
    reported = {format_path(way) for leaf in problems.leaves for way in (leaf.path, *leaf.aliases)}
    unsaved = {
        format_path(way): leaf.kind
        for leaf in state.tables.leaves
        if leaf.kind is not None and not state.tables.kinds[leaf.kind].saved
        for way in (leaf.path, *leaf.aliases)
    }
    found = []
    for name in ours.others:
        paths, rows = names.paths_of(name), names.rows_about(name)
        kind = next((unsaved[path] for path in paths if path in unsaved), None)
        outcome: Outcome = "dropped"
        why = "no leaf is read from it" if rows else "no row of the names is about it"
        if kind is not None:
            outcome, why = "problem", f"belongs to a leaf of kind {kind!r}, which is not saved"
        elif len(rows) == 1 and reported.isdisjoint(paths):  # several rows about one name are another problem
            outcome, why = "problem", f"is in the files, and the row {rows[0]!r} matches no leaf for it"
        found.append(LeafRestore(Leaf((name,), None, jax.Array, None, None), outcome, why))
    return found
