"""The paths that filters spell: what they mean over several objects, and which of them match nothing.

A filter of types may match nothing: a model without a cache has none.  A filter that spells a path refers to something
that exists, so a path that matches nothing is a mistake, and what the filter was for (a kind that is frozen, say) would
be lost without a message.

Over several objects without names, `sw.Path` is read relative to each object and, if it begins with a position, also as
tables print paths.  Usually one of the two readings matches nothing; if both match, and not the same leaves, the
pattern is an error.  So is a pattern that is the exact text of one leaf's path and matches another leaf as well: keys
may contain slashes and stars, and the keys `0` and `"0"` have the same text.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import difflib
import functools
import keyword
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from statewise._src.common.nnx_graph import ModelGraph, row_of
from statewise._src.common.paths import Leaf, Path, format_path, format_type
from statewise._src.common.problems import counted
from statewise._src.common.ties import aliases_of
from statewise._src.filters.combinators import compound, describe, normalize
from statewise._src.filters.explain import as_code
from statewise._src.filters.primitives import Path as Glob
from statewise._src.plan.kind import Kind
from statewise.errors import DeclarationError, FilterError

__all__ = ["Reading", "Spelled", "check_claimed", "corrected_kind", "nearest", "spelled"]

_SHOWN = 3


class Spelled(NamedTuple):
    """A path that a filter spells.

    Attributes:
      filter: the part of the filter that spells it: a `sw.Path`, an `nnx.PathContains`, or an `nnx.filterlib.PathIn` of
        one path.
      negated: whether the filter means the leaves that do *not* match it.
    """

    filter: Any
    negated: bool


def spelled(filter: Any) -> tuple[Spelled, ...]:
    """Returns the paths that a filter spells, in its order; `**` alone means every leaf and spells none.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise._src.plan.spelled_paths import spelled
      >>> [path.negated for path in spelled(nnx.Param & sw.Path("head/**") & ~sw.Path("head/bias"))]
      [False, True]
    """
    return tuple(_spelled(normalize(filter), False))


def _spelled(filter: Any, negated: bool) -> Iterator[Spelled]:
    sign_and_parts = compound(filter)
    if sign_and_parts is not None:
        sign, parts = sign_and_parts
        for part in parts:
            yield from _spelled(part, negated != (sign == "~"))
    elif type(filter) is nnx.PathContains or (isinstance(filter, Glob) and set(filter.pattern.split("/")) != {"**"}):
        yield Spelled(filter, negated)
    elif type(filter) is nnx.filterlib.PathIn:
        for path in sorted(filter.paths, key=repr):
            yield Spelled(nnx.filterlib.PathIn(path), negated)


class Reading:
    """The leaves of objects as filters that look at paths see them.

    Args:
      graph: the objects, flattened.
      aliases: the other paths of leaves that several paths reach; found if None.
    """

    def __init__(self, graph: ModelGraph, aliases: Mapping[Path, tuple[Path, ...]] | None = None) -> None:
        self.graph = graph
        if aliases is None:
            aliases = aliases_of(graph.graphdef, graph.paths, graph.several, graph.names)
        # Each leaf's paths, its own first.
        self.all = tuple((path, *aliases.get(path, ())) for path in graph.paths)
        self._matched: dict[Any, list[int]] = {}
        self._corrections: dict[Any, Any] = {}

    def matched(self, filter: Any) -> list[int]:
        """Returns the leaves that a part of a filter which spells a path matches, by any of their paths.

        Raises:
          FilterError: it could mean two different leaves.
        """
        if filter not in self._matched:
            if isinstance(filter, Glob):
                self._matched[filter] = self._matched_by_glob(filter)
            else:
                graph = self.graph
                self._matched[filter] = [
                    number
                    for number, paths in enumerate(self.all)
                    if any(filter(graph.relative(path), graph.leaves[number]) for path in paths)
                ]
        return self._matched[filter]

    def _matched_by_glob(self, filter: Glob) -> list[int]:
        relative = _matching(filter, self._relative)
        printed: dict[int, list[Path]] = {}
        if filter.positional and self.graph.several and not self.graph.names:
            printed = _matching(filter, self._printed)
        if relative and printed and relative.keys() != printed.keys():
            raise self._ambiguous(filter, relative, printed)
        self._check_exact(filter, printed or relative, bool(printed))
        return sorted(printed or relative)

    @functools.cached_property
    def ways(self) -> tuple[Path, ...]:
        """Returns all paths of each leaf, as filters receive them."""
        return tuple(self.graph.ways(*paths) for paths in self.all)

    @functools.cached_property
    def _relative(self) -> list[list[tuple[Path, str]]]:
        """Returns the paths of each leaf, with their text within the object."""
        return [[(path, _segments(self.graph.relative(path))) for path in paths] for paths in self.all]

    @functools.cached_property
    def _printed(self) -> list[list[tuple[Path, str]]]:
        """Returns the paths of each leaf, with their text as tables print it."""
        return [[(path, _segments(path)) for path in paths] for paths in self.all]

    def check(self, filter: Any) -> None:
        """Checks that no path in a filter could mean two different leaves.

        Raises:
          FilterError: one could.
        """
        for path in spelled(filter):
            self.matched(path.filter)

    def _ambiguous(self, filter: Glob, relative: Mapping[int, Any], printed: Mapping[int, Any]) -> FilterError:
        """Returns the error for a pattern whose two readings match different leaves."""
        notes = dict.fromkeys(printed, "by the path as it is printed")
        for number in relative:
            within = f"by the path within object {self.graph.paths[number][0]}"
            notes[number] = f"{notes[number]}, and {within}" if number in notes else within
        # Two examples that differ: one leaf of each reading, the second of them in one reading only.
        second = next((number for number in relative if number not in printed), None)
        if second is None:
            second = next(number for number in printed if number not in relative)
        first = next(iter(printed))
        if first == second:
            first = next(iter(relative))
        paths = [format_path(self.graph.paths[number]) for number in (first, second)]
        return FilterError(
            f"{filter!r} could mean {paths[0]} or {paths[1]}.",
            leaves=self._rows(notes),
            hint="kinds.plan(first=..., second=...)  # objects with names: paths then begin with these, in filters too",
        )

    def _check_exact(self, filter: Glob, matched: Mapping[int, Sequence[Path]], printed: bool) -> None:
        """Checks that the exact text of a leaf's path matches no other leaf of the same object."""
        graph = self.graph
        exact: dict[Any, dict[int, None]] = {}  # by object, the leaves of which the pattern is the exact text
        for number, paths in matched.items():
            for path in paths:
                if format_path(path if printed else graph.relative(path)) == filter.pattern:
                    exact.setdefault(path[0] if graph.several else None, {})[number] = None
        alike = next((numbers for numbers in exact.values() if len(numbers) > 1), None)
        own = {number for numbers in exact.values() for number in numbers}
        if alike:
            first, *others = alike
        elif own and set("*?") & set(filter.pattern):
            first, others = min(own), [number for number in matched if number not in own]
        else:
            return  # a pattern without stars matches its exact text only
        if not others:
            return
        paths = graph.paths[first], graph.paths[others[0]]
        raise FilterError(
            f"{filter!r} could mean the leaf at {paths[0]!r} or that at {paths[1]!r}"
            f"{', which are written alike' if alike else ''}.",
            leaves=self._rows({number: f"its keys are {graph.paths[number]!r}" for number in (first, *others)}),
            hint="sw.Where(lambda path, leaf: path == {!r})  # or {!r}".format(*map(graph.relative, paths)),
        )

    def _rows(self, notes: Mapping[int, str]) -> list[Leaf]:
        graph = self.graph
        return [row_of(graph.paths[number], graph.leaves[number], note=note) for number, note in sorted(notes.items())]

    # --- corrections -------------------------------------------------------------------------------------------

    @functools.cached_property
    def texts(self) -> dict[str, None]:
        """Returns every path as tables print it."""
        return {format_path(path): None for paths in self.all for path in paths}

    @functools.cached_property
    def keys(self) -> dict[str, None]:
        """Returns every key of every path as text."""
        return {str(key): None for paths in self.all for path in paths for key in path}

    def corrected(self, filter: Any) -> Any | None:
        """Returns a filter with each key that does not exist replaced by the nearest; None if that matches nothing."""
        if filter not in self._corrections:
            candidates = self._candidates(filter)
            self._corrections[filter] = next((fixed for fixed in candidates if self._matches(fixed)), None)
        return self._corrections[filter]

    def _candidates(self, filter: Any) -> Iterator[Any]:
        if type(filter) is nnx.PathContains:
            for key in self._nearest_key(str(filter.key)):
                yield nnx.PathContains(key, filter.exact)
        if not isinstance(filter, Glob):
            return
        fixed = []
        for segment in filter.pattern.split("/"):
            is_known = segment in self.keys or set("*?") & set(segment)
            near = [] if is_known else self._nearest_key(segment)
            fixed.append(near[0] if near and near[0] and not set("[]{}/") & set(near[0]) else segment)
        if all(set("*?") & set(segment) for segment in fixed):
            return  # stars alone would match too much one level down
        for segments in (fixed, ["**", *fixed], *([str(name), *fixed] for name in self.graph.names)):
            if (text := "/".join(segments)) != filter.pattern:
                yield Glob(text)

    def _nearest_key(self, text: str) -> list[str]:
        return difflib.get_close_matches(text, self.keys, n=1)

    def _matches(self, filter: Any) -> bool:
        try:
            return bool(self.matched(filter))
        except FilterError:
            return False


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
    """Returns the paths that are nearest to a filter which matches nothing, as text; the nearest first."""
    fixed = reading.corrected(filter)
    if fixed is not None:
        return [format_path(reading.graph.paths[number]) for number in reading.matched(fixed)][:_SHOWN]
    if isinstance(filter, Glob):
        wanted = filter.pattern.replace("/**", "").replace("**/", "")
    else:
        wanted = str(filter.key) if type(filter) is nnx.PathContains else format_path(next(iter(filter.paths)))
    best: list[tuple[float, str]] = []
    matcher = difflib.SequenceMatcher(b=wanted)
    for text in reading.texts:
        # A later path must be nearer than the last of the best.  A full comparison is slow: the quick one, which gives
        # an upper bound, excludes most paths first.
        least = best[-1][0] if len(best) == _SHOWN else -1.0
        likeness = -1.0
        for part in {text, text.rpartition("/")[0] or text, text.partition("/")[2] or text}:
            matcher.set_seq1(part)
            if matcher.quick_ratio() > least:
                likeness = max(likeness, matcher.ratio())
        if likeness > least:
            # The sort is stable: among paths that are equally near, the first comes first.
            best = sorted([*best, (likeness, text)], key=lambda pair: -pair[0])[:_SHOWN]
    return [text for _, text in best]


# --- kinds -----------------------------------------------------------------------------------------------------


def check_claimed(
    kinds: Mapping[str, Kind], reading: Reading, claimed: Collection[str], unclaimed: Sequence[Leaf]
) -> None:
    """Checks that kinds which spell paths match some leaf with each path, and claim some leaf, unless optional.

    Args:
      kinds: the declaration.
      reading: the leaves.
      claimed: the kinds that claim some leaf, alone or with others.
      unclaimed: leaves that no kind claims, which usually has the same cause.

    Raises:
      DeclarationError: some kinds do not; the error names all of them.
    """
    facts, hints, wrong, names = [], [], [], []
    for name, kind in kinds.items():
        paths = () if kind.optional else spelled(kind.of)
        wanted = [path.filter for path in paths if not path.negated]
        lost = [filter for filter in wanted if not reading.matched(filter)]
        if not lost and (name in claimed or not wanted):
            continue
        wrong.append(name)
        facts.append(_fact(name, kind, name in claimed, lost, reading))
        hints.append(corrected_kind(name, kind, lost, reading))
        # The first segment of a pattern that has no correction may be meant as an object's name.
        globs = [filter for filter in lost if isinstance(filter, Glob) and reading.corrected(filter) is None]
        names += [glob.pattern.partition("/")[0] for glob in globs if "/" in glob.pattern]
    if not wrong:
        return
    objects = [name for name in dict.fromkeys(names) if name.isidentifier() and not keyword.iskeyword(name)]
    if objects and reading.graph.several and not reading.graph.names:
        given = ", ".join(f"{name}={name}" for name in objects)
        by_name = f"kinds.plan({given})  # all objects by name: paths then begin with the name"
        hints = [by_name, "or, as they are:", *hints]
    if unclaimed:
        facts.append(f"{counted(len(unclaimed), 'leaf is', 'leaves are')} claimed by no kind.")
    raise DeclarationError(
        " ".join(facts), leaves=unclaimed, kind=wrong[0] if len(wrong) == 1 else None, hint="\n".join(hints)
    )


def _fact(name: str, kind: Kind, claims: bool, lost: Sequence[Any], reading: Reading) -> str:
    if lost:
        shown = "; ".join(
            f"{describe(filter)} matches no path, the nearest are {', '.join(nearest(reading, filter))}"
            for filter in lost
        )
        return f"Kind {name!r} {'spells a path that does not exist' if claims else 'claims no leaf'}: {shown}."
    paths = [path.filter for path in spelled(kind.of) if not path.negated]
    numbers = sorted({number for filter in paths for number in reading.matched(filter)})
    rows = [row_of(reading.graph.paths[number], reading.graph.leaves[number]) for number in numbers[:_SHOWN]]
    shown = ", ".join(f"{format_path(row.path)} ({format_type(row.type)})" for row in rows)
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"Kind {name!r} claims no leaf: {describe(kind.of)} matches none, although its paths exist: {shown}{more}."


def corrected_kind(name: str, kind: Kind, lost: Sequence[Any], reading: Reading) -> str:
    """Returns code that replaces the paths of a kind which match nothing by the nearest ones, or declares it optional.

    Args:
      name: the kind's name.
      kind: the kind.
      lost: the parts of its filter that match nothing.
      reading: the leaves.
    """
    optional = f"kinds = kinds.replace({name}=dataclasses.replace(kinds[{name!r}], optional=True))"
    fixes = {filter: reading.corrected(filter) for filter in lost}
    if not fixes or None in fixes.values():
        return f"{optional}  # if there need not be any"
    of = _replaced(normalize(kind.of), fixes)
    return (
        f"kinds = kinds.replace({name}=dataclasses.replace(kinds[{name!r}], of={as_code(of)}))\n"
        f"or, if there need not be any: {optional}"
    )


def _replaced(filter: Any, fixes: Mapping[Any, Any]) -> Any:
    """Returns a filter with some of its parts replaced."""
    sign_and_parts = compound(filter)
    if sign_and_parts is None:
        return fixes.get(filter, filter)
    sign, parts = sign_and_parts
    new = [_replaced(part, fixes) for part in parts]
    return nnx.Not(*new) if sign == "~" else nnx.All(*new) if sign == "&" else tuple(new)
