"""Matching kinds to leaves: each leaf to exactly one kind, or an error with every problem."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ModelGraph, row_of
from statewise._src.common.paths import Leaf, Path, format_path, format_type
from statewise._src.common.problems import Problems, counted
from statewise._src.common.ties import aliases_of
from statewise._src.filters.combinators import predicate
from statewise._src.filters.explain import as_code, type_key, type_only
from statewise._src.filters.primitives import Exactly
from statewise._src.filters.primitives import Path as Glob
from statewise._src.plan.kind import Kind
from statewise._src.plan.spelled_paths import Reading, check_claimed, spelled
from statewise.errors import OverlapError, UnclaimedError

__all__ = ["claim", "claimants", "free_name"]

Claimants = Callable[[Any, Any], tuple[str, ...]]


def claimants(kinds: Mapping[str, Kind]) -> Claimants:
    """Returns a function of (path, leaf) that names the kinds which claim the leaf; the rest kind if no other does.

    The answers of filters that depend on the type alone are cached by type: models have thousands of leaves and a
    handful of types.
    """
    rest = tuple(name for name, kind in kinds.items() if kind.rest)
    by_type = {name: predicate(kind.of) for name, kind in kinds.items() if not kind.rest and type_only(kind.of)}
    others = {name: predicate(kind.of) for name, kind in kinds.items() if not kind.rest and name not in by_type}
    order = {name: position for position, name in enumerate(kinds)}
    known: dict[Any, tuple[str, ...]] = {}

    def claims_of(path: Any, leaf: Any) -> tuple[str, ...]:
        names = known.get(type(leaf))  # of a plain Variable its type is the key
        if names is None and (names := known.get(key := type_key(leaf))) is None:
            names = known[key] = tuple(name for name, matches in by_type.items() if matches(path, leaf))
        if others:
            more = tuple(name for name, matches in others.items() if matches(path, leaf))
            names = tuple(sorted(names + more, key=order.__getitem__)) if more else names
        return names or rest

    return claims_of


def claim(kinds: Mapping[str, Kind], graph: ModelGraph, *, check_paths: bool = True) -> list[str]:
    """Returns the kind of each leaf.

    Args:
      kinds: the declaration.
      graph: the objects, flattened.
      check_paths: whether the paths that kinds spell must exist.

    Raises:
      OverlapError: leaves that several kinds claim; lists all of them.
      UnclaimedError: leaves that no kind claims; lists all of them.
      DeclarationError: kinds that spell a path which matches nothing, or that spell one and claim nothing; names all
        of them.
      FilterError: a path that could mean two different leaves.
    """
    claims_of = claimants(kinds)
    # A filter that looks at paths receives every path of a tied leaf, and claims the leaf by any of them.
    by_path = any(not kind.rest and not type_only(kind.of) for kind in kinds.values())
    aliases = aliases_of(graph.graphdef, graph.paths, graph.several, graph.names) if by_path else {}
    reading = Reading(graph, aliases) if by_path else None
    if reading is not None:
        for kind in kinds.values():
            reading.check(kind.of)
    seen: Iterable[Path] = map(graph.ways, graph.paths) if by_path else graph.paths
    claims = list(map(claims_of, seen, graph.leaves))
    for number, path in enumerate(graph.paths if aliases else ()):
        for alias in aliases.get(path, ()):
            names, more = claims[number], claims_of(graph.ways(alias), graph.leaves[number])
            # A kind that claims the leaf by one path takes precedence over the rest kind at another.
            declared = [name for name in (*names, *more) if not kinds[name].rest]
            claims[number] = tuple(dict.fromkeys(declared)) or names
    if reading is not None and check_paths and all(len(names) < 2 for names in claims):
        unclaimed = [
            row_of(path, leaf) for path, leaf, names in zip(graph.paths, graph.leaves, claims, strict=True) if not names
        ]
        check_claimed(kinds, reading, {name for names in claims for name in names}, unclaimed)
    if any(len(names) != 1 for names in claims):
        _check_claims(kinds, graph, claims, aliases)
    return [names[0] for names in claims]


def _check_claims(
    kinds: Mapping[str, Kind], graph: ModelGraph, claims: Sequence[tuple[str, ...]], aliases: dict[Path, Any]
) -> None:
    overlapping: list[Leaf] = []
    unclaimed: list[Leaf] = []
    types: dict[tuple[str, ...], list[type]] = {}
    tied: dict[tuple[str, ...], list[Path]] = {}
    for path, leaf, names in zip(graph.paths, graph.leaves, claims, strict=True):
        if len(names) == 1:
            continue
        types.setdefault(names, []).append(compat.variable_type(leaf))
        if path in aliases:
            tied.setdefault(names, []).extend(graph.relative(way) for way in (path, *aliases[path]))
        if names:
            overlapping.append(row_of(path, leaf, note="claimed by " + " and ".join(names)))
        else:
            unclaimed.append(row_of(path, leaf))
    if overlapping:
        first = ", ".join(format_path(leaf.path) for leaf in unclaimed[:3]) + (" ..." if len(unclaimed) > 3 else "")
        also = f"  {counted(len(unclaimed), 'leaf is', 'leaves are')} claimed by none: {first}." if unclaimed else ""
        types.pop((), None)
        raise OverlapError(
            f"{counted(len(overlapping), 'leaf is', 'leaves are')} claimed by more than one kind.{also}",
            leaves=overlapping + unclaimed,
            hint=_overlap_hint(kinds, types, tied, {names[0] for names in claims if len(names) == 1}),
        )
    # One kind for each type of the unclaimed leaves, or the rest kind for all of them.
    hints = []
    for cls in dict.fromkeys(types[()]):
        name = free_name(kinds, format_type(cls).strip("_").lower() + "_kind")
        hints.append(f"kinds = kinds | sw.Kinds({name}=sw.Kind({as_code(Exactly(cls))}))")
    hints.append(f"or, for all of them at once: kinds = kinds | sw.Kinds({free_name(kinds, 'rest')}=sw.Kind(...))")
    Problems(unclaimed).raise_as(UnclaimedError, "{n} leaves are claimed by no kind.", "\n".join(hints))


def free_name(kinds: Collection[str], name: str) -> str:
    """Returns a name that no kind has: what a hint adds must not replace what is declared."""
    taken = [name, *(f"{name}_{number}" for number in range(2, len(kinds) + 2))]
    return next(free for free in taken if free not in kinds)


def _overlap_hint(
    kinds: Mapping[str, Kind],
    types: Mapping[tuple[str, ...], Sequence[type]],
    tied: Mapping[tuple[str, ...], Sequence[Path]],
    claimed: Collection[str],
) -> str:
    """Returns code that leaves each overlapping leaf to the most specific kind that claims it; handlings are unchanged.

    A tied leaf is matched path by path, so excluding a filter at one path excludes nothing at another: a kind that
    gives way excludes all of the leaf's paths.
    """
    excluded: dict[str, dict[str, None]] = {}
    for names in types:
        *general, special = sorted(names, key=lambda name: _breadth(kinds[name].of, types[names][0]))
        for name in general:
            excluded.setdefault(name, {})[as_code(kinds[special].of)] = None
            if not (type_only(kinds[name].of) and type_only(kinds[special].of)):
                excluded[name] |= {f"sw.Path({format_path(path)!r})": None for path in tied.get(names, ())}
    lines = []
    for name, others in excluded.items():
        kind = kinds[name]
        of = f"nnx.All({as_code(kind.of)}, {', '.join(f'nnx.Not({other})' for other in others)})"
        # A kind that spells a path may claim nothing after the change, and must then be declared optional.
        may_be_empty = name not in claimed and not kind.optional and any(not path.negated for path in spelled(kind.of))
        optional = ", optional=True" if may_be_empty else ""
        is_plain = kind == Kind(kind.of)
        new = f"sw.Kind({of}{optional})" if is_plain else f"dataclasses.replace(kinds[{name!r}], of={of}{optional})"
        lines.append(f"kinds = kinds.replace({name}={new})")
    return "\n".join(lines)


def _breadth(of: Any, leaf_type: type) -> int:
    """Returns how far a filter's type is above a leaf's type, negated: the widest filter comes first, and gives way.

    The result is 0 if that is unknown, and positive for a filter that spells a path, which was written for this very
    leaf: a model that is frozen by its path would train if the hint gave its parameters to the kind of all parameters.
    """
    if spelled(of):
        return 1 if isinstance(of, Glob) else 2
    if isinstance(of, type) and of in leaf_type.__mro__:
        return -leaf_type.__mro__.index(of)
    return 0
