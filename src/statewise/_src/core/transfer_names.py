"""Matching the leaves of two states whose models are not alike: by names, which say what one calls the other's leaves.

The left side of names is the source, or the target if they are read backwards.  Which of the two it is follows from the
paths: names fit the state whose leaves they are about.  Leaves that no row is about are matched by path.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence

from statewise._src.common.nnx_graph import ONE
from statewise._src.common.paths import Leaf, format_path
from statewise._src.common.problems import Problems
from statewise._src.core.transfer_match import TIED, PlacedLeaf, difference, leaves_of
from statewise._src.names.layout import Layout, Shape
from statewise._src.names.names import NamesData
from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.tables import PlanTables

__all__ = ["NamedMatch", "NamedMove", "match_names"]

_ROW = "another name in the row {!r}, or a {} that has this leaf"


@dataclasses.dataclass(frozen=True, slots=True)
class NamedMove:
    """Arrays of the source that become arrays of the target.

    Attributes:
      layout: how one array of one of them is laid out in the other.
      sources: the arrays of the source; one, unless the names are read backwards.
      targets: the arrays of the target, in the order of the names there; None for one of a kind that is not filled.
      backward: whether several arrays of the source become one of the target.
    """

    layout: Layout
    sources: tuple[ArrayInfo, ...]
    targets: tuple[ArrayInfo | None, ...]
    backward: bool

    @property
    def pairs(self) -> Iterator[tuple[ArrayInfo, ArrayInfo]]:
        """Yields each array of the target with each array that it is made from."""
        return ((target, source) for target in self.targets if target is not None for source in self.sources)


@dataclasses.dataclass(frozen=True, slots=True)
class NamedMatch:
    """What the names say of a transfer.

    Attributes:
      moves: the moves by name.
      kept: the leaves of the target that the source does not have, as the names say.
      decided: the paths of the target's leaves that the names decide about, whether they fit or not.
      taken: the paths of the source's leaves that have another name in the target.
      unmatched: the number of rows that are about no leaf.
      problems: what does not fit.
    """

    moves: list[NamedMove] = dataclasses.field(default_factory=list)
    kept: list[PlacedLeaf] = dataclasses.field(default_factory=list)
    decided: set[object] = dataclasses.field(default_factory=set)
    taken: set[object] = dataclasses.field(default_factory=set)
    unmatched: int = 0
    problems: Problems = dataclasses.field(default_factory=Problems)


def match_names(src: PlanTables, plan: PlanTables, kinds: Collection[str], names: NamesData, cast: bool) -> NamedMatch:
    """Returns what names say of a transfer; read backwards if more of their rows are about leaves of the target.

    Args:
      src: the source's plan.
      plan: the target's plan.
      kinds: the kinds of the target that are filled.
      names: the names.
      cast: whether other dtypes are allowed.
    """
    forward = _Forward(src, plan, kinds, names, cast).match()
    if not forward.problems and not forward.unmatched:
        return forward
    backward = _Backward(src, plan, kinds, names, cast).match()
    found = [(each.unmatched, len(each.problems)) for each in (forward, backward)]
    return backward if found[1] < found[0] else forward


class _Matcher:
    """What both directions have in common: `left` is the plan that the names are about, `right` the other."""

    def __init__(
        self, left: PlanTables, right: PlanTables, kinds: Collection[str], names: NamesData, cast: bool
    ) -> None:
        self._left, self._kinds, self._names, self._cast = left, kinds, names, cast
        self._lefts = list(_single(left))
        self._rights = _by_text(right)
        self._owner: dict[object, PlacedLeaf] = {}
        rows = {row for placed in self._lefts for row in self._rows_of(placed)}
        unmatched = [row for row, name in names.items() if name is not None and row not in rows]
        self._unmatched = set(unmatched)
        self._found = NamedMatch(unmatched=len(unmatched))

    def _rows_of(self, placed: PlacedLeaf) -> list[str]:
        texts = _texts(self._left, placed.leaf)
        return [row for text in texts for row, _ in self._names.rows_of(text)]

    def _layouts(self, placed: PlacedLeaf) -> list[Layout]:
        (array,) = placed.arrays
        layouts = self._names.layouts(_with_ways(self._left, placed.leaf), (), array.spec.shape, self._found.problems)
        return [layout for _, layout in layouts]

    def _say(self, leaf: Leaf, note: str, hint: str = "") -> None:
        self._found.problems.add(leaf, note, hint)

    def _is_of_one_model(self, *leaves: PlacedLeaf) -> bool:
        """Returns whether leaves are of one model; says so of those that are not."""
        for placed in leaves:
            if placed.members:
                hint = "one = ensemble.member(0)  # a state of one member"
                self._say(placed.leaf, "is of an ensemble, which names do not describe", hint)
        return not any(placed.members for placed in leaves)

    def _row_about(self, text: str) -> str | None:
        """Returns the row that is about a leaf on the right side, but matches none on the left."""
        return next((row for row in self._names.rows_about(text) if row in self._unmatched), None)


class _Forward(_Matcher):
    """One array of the source becomes one or several of the target."""

    def __init__(self, src: PlanTables, plan: PlanTables, kinds: Collection[str], names: NamesData, cast: bool) -> None:
        super().__init__(src, plan, kinds, names, cast)

    def match(self) -> NamedMatch:
        """Returns what the names say."""
        for source in self._lefts:
            if self._rows_of(source):
                self._found.taken.add(source.leaf.path)
                problems = len(self._found.problems)
                layouts = self._layouts(source)
                for layout in layouts:
                    self._add(source, layout)
                if not layouts and len(self._found.problems) == problems:
                    self._keep(source)
        for text, placed in self._rights.items():
            row = self._row_about(text)
            if row is not None and placed.leaf.kind in self._kinds and placed.leaf.path not in self._found.decided:
                self._found.decided.add(placed.leaf.path)
                self._say(placed.leaf, f"is in the row {row!r}, which is about no leaf of the source", "its path there")
        return self._found

    def _keep(self, source: PlacedLeaf) -> None:
        """Keeps the target's value of a leaf that is not there by the names, but by its path."""
        for text in _texts(self._left, source.leaf):
            placed = self._rights.get(text)
            if placed is not None and placed.leaf.kind in self._kinds and placed.leaf.path not in self._found.decided:
                self._found.decided.add(placed.leaf.path)
                self._found.kept.append(placed)

    def _add(self, source: PlacedLeaf, layout: Layout) -> None:
        absent = [name for name in layout.names if name not in self._rights]
        # Of kinds that are not asked for, only what is there can be known.
        present = {self._rights[name].leaf.kind for name in layout.names if name in self._rights}
        if absent and not {*present, source.leaf.kind}.isdisjoint(self._kinds):
            row = self._rows_of(source)[0]
            self._say(source.leaf, f"would be {_and_more(absent)}, which the target lacks", _ROW.format(row, "target"))
        targets: list[ArrayInfo | None] = []
        for name, shape in layout.names.items():
            placed = self._rights.get(name)
            is_filled = placed is not None and placed.leaf.kind in self._kinds
            if placed is None or not is_filled or self._is_second_name(placed, source, layout):
                targets.append(None)
                continue
            self._found.decided.add(placed.leaf.path)
            owner = self._owner.setdefault(placed.leaf.path, source)
            if owner is not source:
                note = f"would be {format_path(owner.leaf.path)} of the source, and {format_path(source.leaf.path)}"
                self._say(placed.leaf, note, "names in which each leaf of the target has one source")
            elif self._is_of_one_model(placed, source):
                note, hint = difference(placed, [_piece(source, shape)], self._cast)
                if not note and source.devices:
                    note, hint = _per_device(source)
                if note:
                    self._say(placed.leaf, note, hint)
            targets.append(placed.arrays[0])
        if any(target is not None for target in targets):
            self._found.moves.append(NamedMove(layout, source.arrays, tuple(targets), False))

    def _is_second_name(self, placed: PlacedLeaf, source: PlacedLeaf, layout: Layout) -> bool:
        """Returns whether a leaf that is tied in both states has been found by another of its names."""
        if self._owner.get(placed.leaf.path) is not source:
            return False
        first = next((move.layout for move in self._found.moves if placed.arrays[0] in move.targets), None)
        is_whole = first is not None and len(layout.names) == len(first.names) == 1
        if first is None or not is_whole or layout.name.parsed != first.name.parsed:
            path = format_path(source.leaf.path)
            self._say(placed.leaf, f"would be two parts of {path} in the source", "untie the leaves of the target")
        return True


class _Backward(_Matcher):
    """One or several arrays of the source become one of the target."""

    def __init__(self, src: PlanTables, plan: PlanTables, kinds: Collection[str], names: NamesData, cast: bool) -> None:
        super().__init__(plan, src, kinds, names, cast)
        # The rows about leaves that are filled, and the leaves of the source that these ask for.
        self._rows: set[str] = set()
        self._asked: set[object] = set()

    def match(self) -> NamedMatch:
        """Returns what the names say."""
        for target in self._lefts:
            if target.leaf.kind not in self._kinds or not self._rows_of(target):
                continue
            self._found.decided.add(target.leaf.path)
            problems = len(self._found.problems)
            layouts = self._layouts(target)
            self._rows.update(self._rows_of(target))
            named = (name for layout in layouts for name in layout.names)
            self._asked.update(self._rights[name].leaf.path for name in named if name in self._rights)
            if not layouts:
                if len(self._found.problems) == problems:
                    self._found.kept.append(target)
                continue
            present = [layout for layout in layouts if all(name in self._rights for name in layout.names)]
            if present:
                self._add(target, present)
            else:
                absent = [name for name in layouts[0].names if name not in self._rights]
                hint = _ROW.format(self._rows_of(target)[0], "source")
                self._say(target.leaf, f"the source has no {_and_more(absent)}", hint)
        for text, source in self._rights.items():
            row = self._row_about(text)
            if row is not None:
                self._say(source.leaf, f"is in the row {row!r}, which is about no leaf of the target", "its path there")
        self._check_rest()
        return self._found

    def _check_rest(self) -> None:
        """Checks that no leaf of the source is left over: the fourth layer, where the target has a stack of three."""
        by_path = {text for target in self._lefts for text in _texts(self._left, target.leaf)}
        for text, source in self._rights.items():
            row = next((row for row in self._names.rows_about(text) if row in self._rows), None)
            if row is not None and source.leaf.path not in self._asked and text not in by_path:
                note = f"is in the row {row!r}, which matches no leaf of the target for it"
                self._say(source.leaf, note, "a target of the source's size: as many layers")

    def _add(self, target: PlacedLeaf, layouts: Sequence[Layout]) -> None:
        layout = layouts[0]
        pieces = [self._rights[name] for name in layout.names]
        for other in layouts[1:]:
            # Several names of a tied leaf: they have to be those of one leaf, whose values are equal by being one.
            if [self._rights[name].leaf.path for name in other.names] != [piece.leaf.path for piece in pieces]:
                listed = f"{next(iter(layout.names))} and {next(iter(other.names))}"
                self._say(target.leaf, f"tied here, apart in the source as {listed}", TIED)
                return
        for piece, (name, shape) in zip(pieces, layout.names.items(), strict=True):
            self._found.taken.add(piece.leaf.path)
            owner = self._owner.setdefault(piece.leaf.path, target)
            if owner is not target:
                note = f"would be {name} of the source, which is also {format_path(owner.leaf.path)}"
                self._say(target.leaf, note, "names that differ; or tie the leaves in the model")
            elif self._is_of_one_model(target, piece):
                note, hint = difference(_piece(target, shape), [piece], self._cast)
                if note:
                    self._say(target.leaf, f"{name} {note}", hint)
                elif piece.devices:
                    self._say(target.leaf, *_per_device(piece))
        sources = tuple(piece.arrays[0] for piece in pieces)
        self._found.moves.append(NamedMove(layout, sources, target.arrays, True))


def _single(plan: PlanTables) -> Iterator[PlacedLeaf]:
    """Yields the leaves of the model that are one array: a row is about one array."""
    for placed in leaves_of(plan):
        if placed.structure is ONE and len(placed.arrays) == 1 and placed.arrays[0].derived is None:
            yield placed


def _by_text(plan: PlanTables) -> dict[str, PlacedLeaf]:
    """Returns leaves by their paths; the path within an object means a leaf only if no other object has it."""
    leaves = list(_single(plan))
    ways = [(text, placed) for placed in leaves for text in _texts(plan, placed.leaf)]
    counts = collections.Counter(text for text, _ in ways)
    printed = {format_path(path): placed for placed in leaves for path in (placed.leaf.path, *placed.leaf.aliases)}
    return {text: placed for text, placed in ways if counts[text] == 1} | printed


def _with_ways(plan: PlanTables, leaf: Leaf) -> Leaf:
    """Returns a leaf with all paths that a row may give it: of several objects, also those within its object."""
    if not plan.several:
        return leaf
    return dataclasses.replace(leaf, aliases=(*leaf.aliases, *(path[1:] for path in (leaf.path, *leaf.aliases))))


def _texts(plan: PlanTables, leaf: Leaf) -> list[str]:
    ways = _with_ways(plan, leaf)
    return list(dict.fromkeys(map(format_path, (ways.path, *ways.aliases))))


def _piece(placed: PlacedLeaf, shape: Shape) -> PlacedLeaf:
    """Returns a leaf with the shape that one array of it has in the other state."""
    (array,) = placed.arrays
    spec = array.spec._replace(shape=shape)
    return dataclasses.replace(placed, arrays=(array._replace(spec=spec),))


def _per_device(source: PlacedLeaf) -> tuple[str, str]:
    hint = f"sw.transfer(src.reduce_devices({source.leaf.kind!r}, how='mean'), ...)  # or how='first'"
    return f"has a value for each of {source.devices} devices in the source", hint


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
