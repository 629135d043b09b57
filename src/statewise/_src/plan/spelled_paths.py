"""The paths that filters spell: what they mean over several objects, and which of them match nothing.

A filter of types may well match nothing: a model without a cache has none.  A filter that spells a path means
something that is there, so a path that matches nothing is a slip, and whatever the filter was for (a kind that is
frozen, say) would be lost without a word.

Of several objects without names, `sw.Path` is read relative to each object and, where it begins with a position, as
tables print paths too.  Mostly one of the two readings matches nothing; where both match, and not the same leaves,
the pattern is refused.  So is a pattern that is the exact text of one leaf's path and matches another leaf as well:
keys may hold slashes and stars, and the keys `0` and `"0"` are written alike.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import difflib
import functools
import keyword
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from statewise._src.common.nnx_graph import ModelGraph, row_of
from statewise._src.common.paths import Leaf, Path, format_path, format_type
from statewise._src.common.ties import aliases_of
from statewise._src.filters.combinators import compound, describe, normalize
from statewise._src.filters.explain import as_code, type_only
from statewise._src.filters.primitives import Path as Glob
from statewise._src.plan.kind import Kind
from statewise.errors import DeclarationError, FilterError

__all__ = ["Reading", "Spelled", "check_claimed", "corrected", "corrected_kind", "nearest", "spelled"]

_SHOWN = 3


class Spelled(NamedTuple):
    """A path that a filter spells.

    Attributes:
      filter: the part of the filter that spells it: a `sw.Path`, an `nnx.PathContains`, or an `nnx.filterlib.PathIn` of
        one path.
      negated: whether the filter means what does *not* match it.
    """

    filter: Any
    negated: bool


def spelled(filter: Any) -> tuple[Spelled, ...]:
    """The paths that a filter spells, in its order; `**` alone means every leaf and spells none.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise._src.plan.spelled_paths import spelled
      >>> [one.negated for one in spelled(nnx.Param & sw.Path("head/**") & ~sw.Path("head/bias"))]
      [False, True]
    """
    return tuple(_spelled(normalize(filter), False))


def _spelled(filter: Any, negated: bool) -> Iterator[Spelled]:
    made_of = compound(filter)
    if made_of is not None:
        sign, parts = made_of
        for part in parts:
            yield from _spelled(part, negated != (sign == "~"))
    elif isinstance(filter, Glob):
        if set(filter.pattern.split("/")) != {"**"}:
            yield Spelled(filter, negated)
    elif type(filter) is nnx.PathContains:
        yield Spelled(filter, negated)
    elif type(filter) is nnx.filterlib.PathIn:
        for path in sorted(filter.paths, key=repr):
            yield Spelled(nnx.filterlib.PathIn(path), negated)


class Reading:
    """The leaves of objects as filters that look at paths see them.

    Args:
      found: the objects, flattened.
      aliases: the other paths of leaves that several paths reach; looked for if None.
    """

    def __init__(self, found: ModelGraph, aliases: Mapping[Path, tuple[Path, ...]] | None = None) -> None:
        self.found = found
        if aliases is None:
            aliases = aliases_of(found.graphdef, found.paths, found.several, found.names)
        # Each leaf's paths, its own first.
        self.all = tuple((path, *aliases.get(path, ())) for path in found.paths)
        self._matched: dict[Glob, list[int]] = {}
        self.corrections: dict[Any, Any] = {}  # what `corrected` has worked out

    def matched(self, filter: Any) -> list[int]:
        """The leaves that a part of a filter which spells a path matches, by any of their paths.

        Raises:
          FilterError: it could mean one leaf or another.
        """
        if not isinstance(filter, Glob):
            graph = self.found
            return [
                number
                for number, paths in enumerate(self.all)
                if any(filter(graph.relative(path), graph.leaves[number]) for path in paths)
            ]
        if filter not in self._matched:
            self._matched[filter] = self._matched_by_glob(filter)
        return self._matched[filter]

    def _matched_by_glob(self, filter: Glob) -> list[int]:
        relative = _matching(filter, self._relative)
        printed: dict[int, list[Path]] = {}
        if filter.positional and self.found.several and not self.found.names:
            printed = _matching(filter, self._printed)
        if relative and printed and relative.keys() != printed.keys():
            raise self._twofold(filter, relative, printed)
        self._check_exact(filter, printed or relative, bool(printed))
        return sorted(printed or relative)

    @functools.cached_property
    def ways(self) -> tuple[Path, ...]:
        """All paths of each leaf, as filters see them."""
        return tuple(self.found.ways(*paths) for paths in self.all)

    @functools.cached_property
    def _relative(self) -> list[list[tuple[Path, str]]]:
        """The paths of each leaf, with their text within the object."""
        return [[(path, _segments(self.found.relative(path))) for path in paths] for paths in self.all]

    @functools.cached_property
    def _printed(self) -> list[list[tuple[Path, str]]]:
        """The paths of each leaf, with their text as they are printed."""
        return [[(path, _segments(path)) for path in paths] for paths in self.all]

    def check(self, filter: Any) -> None:
        """Refuses a filter in which a path could mean one leaf or another.

        Raises:
          FilterError: so it is.
        """
        for one in spelled(filter):
            self.matched(one.filter)

    def _twofold(self, filter: Glob, relative: Mapping[int, Any], printed: Mapping[int, Any]) -> FilterError:
        notes = dict.fromkeys(printed, "by the path as it is printed")
        for number in relative:
            within = f"by the path within object {self.found.paths[number][0]}"
            notes[number] = f"{notes[number]}, and {within}" if number in notes else within
        only = [number for number in relative if number not in printed] or [n for n in printed if n not in relative]
        one, other = next(iter(printed)), only[0]
        if one == other:
            one = next(iter(relative))
        return FilterError(
            f"{filter!r} could mean {format_path(self.found.paths[one])} or {format_path(self.found.paths[other])}.",
            leaves=self._rows(notes),
            hint="kinds.plan(first=..., second=...)  # objects with names: paths then begin with these, in filters too",
        )

    def _check_exact(self, filter: Glob, matched: Mapping[int, Sequence[Path]], whole: bool) -> None:
        """Refuses the exact text of a leaf's path that matches another leaf of the same object too."""
        found = self.found
        exact: dict[Any, list[int]] = {}
        for number, paths in matched.items():
            for path in paths:
                if format_path(path if whole else found.relative(path)) == filter.pattern:
                    exact.setdefault(path[0] if found.several else None, []).append(number)
        alike = next((list(dict.fromkeys(numbers)) for numbers in exact.values() if len(set(numbers)) > 1), None)
        own = {number for numbers in exact.values() for number in numbers}
        if alike:
            first, *others = alike
        elif own and set("*?") & set(filter.pattern):
            first, others = min(own), [number for number in matched if number not in own]
        else:
            return  # without stars nothing else can be meant
        if not others:
            return
        one, other = found.relative(found.paths[first]), found.relative(found.paths[others[0]])
        raise FilterError(
            f"{filter!r} could mean the leaf at {found.paths[first]!r} or that at {found.paths[others[0]]!r}"
            f"{', which are written alike' if alike else ''}.",
            leaves=self._rows({number: f"its keys are {found.paths[number]!r}" for number in (first, *others)}),
            hint=f"sw.Where(lambda path, leaf: path == {one!r})  # or {other!r}",
        )

    def _rows(self, notes: Mapping[int, str]) -> list[Leaf]:
        found = self.found
        return [row_of(found.paths[number], found.leaves[number], note=note) for number, note in sorted(notes.items())]

    # --- what is near ------------------------------------------------------------------------------------------

    @functools.cached_property
    def texts(self) -> dict[str, None]:
        """Every path as text, as it is printed."""
        return {format_path(path): None for paths in self.all for path in paths}

    @functools.cached_property
    def keys(self) -> dict[str, None]:
        """Every key of every path as text."""
        return {str(key): None for paths in self.all for path in paths for key in path}


def _segments(path: Path) -> str:
    """Returns a path as text, with a slash after each segment."""
    return format_path(path) + "/" if path else ""


def _matching(filter: Glob, texts: Sequence[Sequence[tuple[Path, str]]]) -> dict[int, list[Path]]:
    """Returns the leaves that a glob matches, by number, each with those of its paths that it matches."""
    matching = {}
    for number, ways in enumerate(texts):
        if paths := [path for path, text in ways if filter.matches_text(text)]:
            matching[number] = paths
    return matching


def nearest(reading: Reading, filter: Any) -> list[str]:
    """The paths that are nearest to one that matches nothing, as text; the nearest first."""
    fixed = corrected(reading, filter)
    if fixed is not None:
        return [format_path(reading.found.paths[number]) for number in reading.matched(fixed)][:_SHOWN]
    wanted = _text(filter).replace("/**", "").replace("**/", "")
    best: list[tuple[float, str]] = []
    letters = Counter(wanted)
    for text in reading.texts:
        # What comes later must be nearer to be shown.  Comparing in full is slow: most are out by their letters.
        least = best[-1][0] if len(best) == _SHOWN else -1.0
        parts = {text, text.rpartition("/")[0] or text, text.partition("/")[2] or text}
        close = [part for part in parts if _at_most(wanted, letters, part) > least]
        likeness = max((difflib.SequenceMatcher(None, wanted, part).ratio() for part in close), default=-1.0)
        if likeness > least:
            # The sort is stable: of paths that are equally near, the first comes first.
            best = sorted([*best, (likeness, text)], key=lambda pair: -pair[0])[:_SHOWN]
    return [text for _, text in best]


def _at_most(wanted: str, letters: Mapping[str, int], part: str) -> float:
    """Returns an upper bound of how like two texts are: their letters alone, in any order."""
    shared = sum(min(count, part.count(letter)) for letter, count in letters.items())
    return 2 * shared / ((len(wanted) + len(part)) or 1)


def _text(filter: Any) -> str:
    if isinstance(filter, Glob):
        return str(filter.pattern)
    return str(filter.key) if type(filter) is nnx.PathContains else format_path(next(iter(filter.paths)))


def _first(filter: Any) -> str:
    """The first segment of a pattern of at least two, which may be meant as an object's name."""
    return str(filter.pattern).split("/")[0] if isinstance(filter, Glob) and "/" in filter.pattern else ""


def corrected(reading: Reading, filter: Any) -> Any | None:
    """Returns the filter with each key that no path has replaced by the nearest; None where that matches nothing."""
    if filter not in reading.corrections:
        reading.corrections[filter] = _corrected(reading, filter)
    return reading.corrections[filter]


def _corrected(reading: Reading, filter: Any) -> Any | None:
    if type(filter) is nnx.PathContains:
        near = difflib.get_close_matches(str(filter.key), reading.keys, n=1)
        return (
            nnx.PathContains(near[0], filter.exact) if near and _matches(reading, nnx.PathContains(near[0])) else None
        )
    if not isinstance(filter, Glob):
        return None
    segments = filter.pattern.split("/")
    fixed = []
    for segment in segments:
        wild = bool(set("*?") & set(segment))
        near = [] if wild or segment in reading.keys else difflib.get_close_matches(segment, reading.keys, n=1)
        fixed.append(near[0] if near and not set("[]{}/") & set(near[0]) and near[0] else segment)
    named = [str(name) for name in reading.found.names]
    if all(set("*?") & set(segment) for segment in fixed):
        return None  # what is all stars would match too much one level down
    for candidate in (fixed, ["**", *fixed], *([name, *fixed] for name in named)):
        made = Glob("/".join(candidate))
        if made != filter and _matches(reading, made):
            return made
    return None


def _matches(reading: Reading, filter: Any) -> bool:
    try:
        return bool(reading.matched(filter))
    except FilterError:
        return False


# --- kinds -----------------------------------------------------------------------------------------------------


def check_claimed(kinds: Mapping[str, Kind], reading: Reading, claimed: set[str], unclaimed: Sequence[Leaf]) -> None:
    """Refuses kinds that spell a path which matches no leaf, or that spell one and claim no leaf, unless optional.

    Args:
      kinds: the declaration.
      reading: the leaves.
      claimed: the kinds that claim some leaf, alone or with others.
      unclaimed: leaves that no kind claims, which is mostly for the same reason.

    Raises:
      DeclarationError: there are such kinds; all of them are told.
    """
    facts, hints, empty, segments = [], [], [], []
    for name, kind in kinds.items():
        paths = [] if kind.optional or kind.rest or type_only(kind.of) else spelled(kind.of)
        wanted = [one.filter for one in paths if not one.negated]
        lost = [filter for filter in wanted if not reading.matched(filter)]
        if not lost and (name in claimed or not wanted):
            continue
        empty.append(name)
        facts.append(_fact(name, kind, name in claimed, lost, reading))
        hints.append(corrected_kind(name, kind, lost, reading))
        segments += [_first(filter) for filter in lost if corrected(reading, filter) is None]
    if not empty:
        return
    objects = [name for name in dict.fromkeys(segments) if name.isidentifier() and not keyword.iskeyword(name)]
    if objects and reading.found.several and not reading.found.names:
        given = ", ".join(f"{name}={name}" for name in objects)
        hints = [
            f"kinds.plan({given})  # all objects by name: paths then begin with the name",
            "or, as they are:",
            *hints,
        ]
    if unclaimed:
        count = "1 leaf is" if len(unclaimed) == 1 else f"{len(unclaimed)} leaves are"
        facts.append(f"{count} claimed by no kind.")
    raise DeclarationError(
        " ".join(facts), leaves=unclaimed, kind=empty[0] if len(empty) == 1 else None, hint="\n".join(hints)
    )


def _fact(name: str, kind: Kind, claims: bool, lost: Sequence[Any], reading: Reading) -> str:
    if lost:
        shown = "; ".join(
            f"{describe(filter)} matches no path, the nearest are {', '.join(nearest(reading, filter))}"
            for filter in lost
        )
        return (
            f"Kind {name!r} spells a path that is not there: {shown}."
            if claims
            else (f"Kind {name!r} claims no leaf: {shown}.")
        )
    numbers = sorted({number for one in spelled(kind.of) if not one.negated for number in reading.matched(one.filter)})
    found = reading.found
    shown = ", ".join(
        f"{format_path(found.paths[number])} ({format_type(row_of(found.paths[number], found.leaves[number]).type)})"
        for number in numbers[:_SHOWN]
    )
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"Kind {name!r} claims no leaf: {describe(kind.of)} matches none, though its paths are there: {shown}{more}."


def corrected_kind(name: str, kind: Kind, lost: Sequence[Any], reading: Reading) -> str:
    """Code that gives a kind the paths which are nearest to those that match nothing, or says that they may.

    Args:
      name: the kind's name.
      kind: the kind.
      lost: the parts of its filter that match nothing.
      reading: the leaves.
    """
    optional = f"kinds = kinds.replace({name}=dataclasses.replace(kinds[{name!r}], optional=True))"
    fixes = [(filter, corrected(reading, filter)) for filter in lost]
    if not fixes or any(fixed is None for _, fixed in fixes):
        return f"{optional}  # if there need not be any"
    of = _replaced(normalize(kind.of), dict(fixes))
    return (
        f"kinds = kinds.replace({name}=dataclasses.replace(kinds[{name!r}], of={as_code(of)}))\n"
        f"or, if there need not be any: {optional}"
    )


def _replaced(filter: Any, by: Mapping[Any, Any]) -> Any:
    """A filter with some of its parts replaced."""
    made_of = compound(filter)
    if made_of is None:
        return by.get(filter, filter)
    sign, parts = made_of
    new = [_replaced(part, by) for part in parts]
    return nnx.Not(*new) if sign == "~" else nnx.All(*new) if sign == "&" else tuple(new)
