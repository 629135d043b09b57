"""A proposal of names, from shapes and similar names: code to be read.

Modules of ours and of theirs are paired, and not single arrays: that a bias is the one of an output layer is known from
the kernel beside it.  A pair has a score, the similarity of the names; which patterns fit is known from the shapes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from statewise._src.names.assign import assigned
from statewise._src.names.modules import Link, Module, linked, modules_of
from statewise._src.names.name import Name
from statewise._src.names.shapes import Fitting, Shape, fittings, is_matrix
from statewise._src.names.words import Similarity, has_inputs_first, role_of

__all__ = ["Proposed", "propose"]

# Two ways to pair modules whose scores differ by less are not decided.
_MARGIN = 0.03


@dataclasses.dataclass(frozen=True)
class Proposed:
    """What is proposed for one row.

    Attributes:
      row: our path, with placeholders.
      name: their name; None if it is not decided.
      candidates: their names that fit the shape, the most similar first, if it is not decided.
      note: what a reader should know.
    """

    row: str
    name: Name | None
    candidates: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How the arrays of one module can be those of another: for each of our keys their key, the patterns, the stack."""

    link: Link
    arrays: Mapping[str, tuple[str, list[tuple[int | None, Fitting]]]]
    missing: int


def propose(
    ours: Sequence[tuple[Sequence[object], Shape]], theirs: Sequence[tuple[str, Shape]]
) -> tuple[list[Proposed], list[str]]:
    """Proposes rows.

    Args:
      ours: the path and the shape of each of our arrays.
      theirs: the name and the shape of each of theirs.

    Returns:
      a row for each of ours, in their order; and their names, with placeholders, that no row is about.
    """
    mine, files = modules_of(ours), modules_of([(name.split("."), shape) for name, shape in theirs])
    if not files:
        return [Proposed(one.name(key, "/"), None) for one in mine for key in one.leaves], []
    finder = _Finder(mine, files)
    pairs, doubtful = finder.pairs()
    straight = finder.is_straight(pairs)
    rows: list[Proposed] = []
    used: set[tuple[int, str]] = set()
    for number, module in enumerate(mine):
        partner = pairs.get(number)
        candidates = functools.cache(functools.partial(finder.candidates, number, pairs))
        joined = finder.joined(number, pairs, straight) if partner is None else None
        for key in module.leaves:
            row = module.name(key, "/")
            fit = None if partner is None else finder.fit(number, partner, straight)
            if joined is not None and key in joined[0]:
                rows.append(Proposed(row, joined[0][key], note="several arrays that are joined; check their order"))
                used |= joined[1]
            elif partner is None or fit is None or key not in fit.arrays:
                rows.append(Proposed(row, None, tuple(candidates()(key))))
            elif number in doubtful:
                own = files[partner].name(fit.arrays[key][0], ".", fit.link.fields)
                others = [name for name in candidates()(key) if name != own]
                rows.append(Proposed(row, None, (own, *others), "their names do not say which"))
                used.add((partner, fit.arrays[key][0]))
            else:
                other, ways = fit.arrays[key]
                name, note = _named(files[partner].name(other, ".", fit.link.fields), ways, straight)
                note = note if is_matrix(role_of(key), key, ways[0][1].sizes) else ""
                rows.append(Proposed(row, name, note=note or finder.note(number, partner)))
                used.add((partner, other))
    unused = [
        module.name(key, ".")
        for number, module in enumerate(files)
        for key in module.leaves
        if (number, key) not in used
    ]
    return rows, unused


def _named(name: str, ways: list[tuple[int | None, Fitting]], straight: bool) -> tuple[Name, str]:
    """Returns a name with the most usual of some patterns, and what to say if there are others."""
    stack, first = ways[0]
    pattern, lengths = first.pattern(stack)
    fits_both = any(other.is_transposed != first.is_transposed for _, other in ways[1:])
    how = "as it is, like the other kernels there" if straight else "transposed, as torch's Linear has it"
    return _name(name, pattern, lengths), f"its shape fits both ways; {how}" if fits_both else ""


def _name(names: str | Sequence[str], pattern: str | None, lengths: Mapping[str, Any], **options: Any) -> Name:
    return Name(names, pattern, **options, **lengths)


class _Finder:
    """Scores of pairs of modules.

    Modules that are called alike on both sides, and whose arrays all fit, are pairs: between a model and files of its
    own names there may be tens of thousands.  The others are scored, each with each.
    """

    def __init__(self, ours: Sequence[Module], theirs: Sequence[Module]) -> None:
        self.ours, self.theirs = ours, theirs
        has_own = any("pre_feedforward_layernorm" in module.parts for module in theirs)
        self.words = [[module.words(has_own) for module in side] for side in (ours, theirs)]
        self.similarity = Similarity([words for side in self.words for words in side])
        # What a fit depends on is the same for most modules: each is found once.
        forms: dict[tuple[Any, ...], int] = {}
        self.forms = [[forms.setdefault(_form(module), len(forms)) for module in side] for side in (ours, theirs)]
        self.fits: dict[tuple[int, int, bool], _Fit | None] = {}
        self.equal = self._equal()
        taken = {*self.equal.values()}
        self.rows = [number for number in range(len(ours)) if number not in self.equal]
        self.columns = [partner for partner in range(len(theirs)) if partner not in taken]
        self.row_of = {number: row for row, number in enumerate(self.rows)}
        self.scores = np.full((len(self.rows), len(self.columns)), -1.0)
        for column, partner in enumerate(self.columns):
            letters = difflib.SequenceMatcher(None, "", _letters(self.words[1][partner]))
            for row, number in enumerate(self.rows):
                fit = self.fit(number, partner, False)
                if fit is not None:
                    extra = len(theirs[partner].leaves) - len(fit.arrays)
                    alike = self.likeness(number, partner, letters)
                    self.scores[row, column] = max(0.2 + alike - 0.3 * fit.missing - 0.1 * extra, 0)

    def _equal(self) -> dict[int, int]:
        """Returns their module for each of ours that has one of its own name, with the same arrays."""
        named: dict[tuple[str | None, ...], list[int]] = {}
        for partner, module in enumerate(self.theirs):
            named.setdefault(module.parts, []).append(partner)
        found: dict[int, int] = {}
        for number, module in enumerate(self.ours):
            partners = named.get(module.parts, [])
            fit = self.fit(number, partners[0], False) if len(partners) == 1 else None
            if fit is not None and not fit.missing and len(self.theirs[partners[0]].leaves) == len(fit.arrays):
                found[number] = partners[0]
        return found

    def likeness(self, number: int, partner: int, letters: difflib.SequenceMatcher[str] | None = None) -> float:
        """Returns how alike the names of two modules are, from 0 to about 1; `letters` has those of theirs."""
        one, other = self.words[0][number], self.words[1][partner]
        letters = letters or difflib.SequenceMatcher(None, "", _letters(other))
        letters.set_seq1(_letters(one))
        return self.similarity.of(one, other) + 0.1 * letters.ratio()

    def fit(self, number: int, partner: int, straight: bool) -> _Fit | None:
        """Returns how the arrays of our module can be those of one of theirs; None if not one of them can."""
        forms = self.forms[0][number], self.forms[1][partner], straight
        if forms not in self.fits:
            self.fits[forms] = self._fit(self.ours[number], self.theirs[partner], straight)
        return self.fits[forms]

    def _fit(self, mine: Module, other: Module, straight: bool) -> _Fit | None:
        link = linked(mine, other)
        if link is None:
            return None
        arrays = {}
        for key, shape in mine.leaves.items():
            partners = [each for each in other.leaves if _is_role(key, each)]
            ways = {each: _ways(shape, other.leaves[each], key, link.stacked, straight) for each in partners}
            found = next((each for each in partners if ways[each]), None)
            if found is not None:
                arrays[key] = found, ways[found]
        return _Fit(link, arrays, len(mine.leaves) - len(arrays)) if arrays else None

    def pairs(self) -> tuple[dict[int, int], set[int]]:
        """Returns their module for each of ours; and those of ours for which another would be as good."""
        pairs = assigned(self.scores)
        taken = {column: row for row, column in pairs.items()}
        doubtful = set()
        for row, column in pairs.items():
            for other in range(len(self.columns)):
                score = self.scores[row, other]
                if other == column or score < 0:
                    continue
                rival = taken.get(other)
                gained, lost = score, self.scores[row, column]
                if rival is not None:
                    back = self.scores[rival, column]
                    gained, lost = gained + (back if back >= 0 else -np.inf), lost + self.scores[rival, other]
                if gained > lost - _MARGIN:
                    doubtful.add(self.rows[row])
        found = {self.rows[row]: self.columns[column] for row, column in pairs.items()}
        return {**self.equal, **found}, doubtful

    def is_straight(self, pairs: Mapping[int, int]) -> bool:
        """Returns whether most kernels have their inputs first there: by shapes that fit one way, and by names."""
        straight = sum(has_inputs_first(module.parts) for module in self.theirs)
        turned = 0
        for number, partner in pairs.items():
            fit = self.fit(number, partner, False)
            assert fit is not None, "a pair fits"
            for key, (_, ways) in fit.arrays.items():
                if is_matrix(role_of(key), key, ways[0][1].sizes):
                    kinds = {way.is_transposed for _, way in ways}
                    turned += kinds == {True}
                    straight += kinds == {False}
        return straight > turned

    def candidates(self, number: int, pairs: Mapping[int, int]) -> Callable[[str], list[str]]:
        """Returns a function from a key of our module to their names that fit its shape, the most similar first."""
        scores = self.scores[self.row_of[number]]
        order = [self.columns[each] for each in np.argsort(-scores, kind="stable") if scores[each] >= 0]

        def of(key: str) -> list[str]:
            found = []
            for partner in order:
                fit = self.fit(number, partner, False)
                if fit is not None and key in fit.arrays:
                    found.append(self.theirs[partner].name(fit.arrays[key][0], ".", fit.link.fields))
            return (found or self._by_shape(number, key, pairs))[:4]

        return of

    def _by_shape(self, number: int, key: str, pairs: Mapping[int, int]) -> list[str]:
        """Returns their names that fit the shape, of modules without a partner: `layer4.0` for our `block4_1`."""
        shape, taken = self.ours[number].leaves[key], {*pairs.values()}
        fitting = [
            (partner, other)
            for partner, module in enumerate(self.theirs)
            for other, their in module.leaves.items()
            if partner not in taken and _is_role(key, other) and fittings(shape, their, role_of(key), key, False)
        ]
        fitting.sort(key=lambda pair: -self.likeness(number, pair[0]))
        return [name for partner, other in fitting for name in self.theirs[partner].names(other)]

    def note(self, number: int, partner: int) -> str:
        """Returns what to say of a pair whose names have nothing in common."""
        common = self.words[0][number] & self.words[1][partner]
        return "" if common else "by its shape, because the names have nothing in common"

    def joined(
        self, number: int, pairs: Mapping[int, int], straight: bool
    ) -> tuple[dict[str, Name], set[tuple[int, str]]] | None:
        """Returns names of several of their modules that are joined in one of ours; None if none are."""
        mine, taken = self.ours[number], {*pairs.values()}
        groups: dict[tuple[str | None, ...], list[int]] = {}
        for partner, module in enumerate(self.theirs):
            if partner not in taken and linked(mine, module) is not None:
                groups.setdefault(module.parts[:-1], []).append(partner)
        for group in groups.values():
            order = {"q": 0, "k": 1, "v": 2, "gate": 3, "up": 4}
            known = [partner for partner in group if {*order} & self.words[1][partner]]
            known.sort(key=lambda partner: min(order[word] for word in {*order} & self.words[1][partner]))
            spelled = {word for partner in known for word in {*order} & self.words[1][partner]}
            wanted = self.words[0][number]
            is_meant = any({*word} <= spelled for word in wanted if {*word} <= {*"qkv"}) or spelled <= wanted
            if len(known) < 2 or not is_meant:
                continue
            link = linked(mine, self.theirs[known[0]])
            found = {} if link is None else _joined([self.theirs[each] for each in known], mine, link, straight)
            if found:
                return found, {(each, key) for each in known for key in self.theirs[each].leaves}
        return None


def _form(module: Module) -> tuple[Any, ...]:
    """Returns what decides which arrays fit: all of a module but its name."""
    return module.depth, module.numbers, tuple(module.leaves.items())


def _letters(words: frozenset[str]) -> str:
    return " ".join(sorted(words))


def _is_role(ours: str, theirs: str) -> bool:
    """Returns whether two last keys can be of one array."""
    roles = {role_of(ours) or "weight", role_of(theirs) or "weight"}
    return len(roles) == 1


def _ways(
    ours: Shape, theirs: Shape, key: str, stacked: int | None, straight: bool
) -> list[tuple[int | None, Fitting]]:
    """Returns the patterns that two shapes allow, each with the axis of ours that is stacked."""
    role = role_of(key)
    if stacked is None:
        return [(None, way) for way in fittings(ours, theirs, role, key, straight)]
    found: list[tuple[int | None, Fitting]] = []
    for axis in (axis for axis, size in enumerate(ours) if size == stacked):
        rest = (*ours[:axis], *ours[axis + 1 :])
        found += [(axis, way) for way in fittings(rest, theirs, role, key, straight)]
    return found


def _joined(parts: Sequence[Module], mine: Module, link: Link, straight: bool) -> dict[str, Name]:
    """Returns the names of several modules that are joined, by our keys; empty if the shapes do not allow it."""
    found: dict[str, Name] = {}
    for key, shape in mine.leaves.items():
        names, shapes = [], []
        for module in parts:
            own = next((each for each in module.leaves if _is_role(key, each)), None)
            if own is None:
                return {}
            names.append(module.name(own, ".", link.fields))
            shapes.append(module.leaves[own])
        axes = range(len(shapes[0])) if len({len(each) for each in shapes}) == 1 else ()
        for axis in axes:
            if len({(*each[:axis], *each[axis + 1 :]) for each in shapes}) > 1:
                continue
            sizes = tuple(each[axis] for each in shapes)
            whole = (*shapes[0][:axis], sum(sizes), *shapes[0][axis + 1 :])
            ways = _ways(shape, whole, key, link.stacked, straight)
            if ways:
                pattern, lengths = ways[0][1].pattern(ways[0][0])
                equal = len({*sizes}) == 1
                found[key] = _name(names, pattern, lengths, join=axis, sizes=None if equal else sizes)
                break
        else:
            return {}
    return found
