"""Matching kinds to leaves: every leaf to exactly one, or every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ModelGraph, row_of
from statewise._src.common.paths import Leaf, Path, format_path, format_type
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
    """A function of (path, leaf) that names the kinds which claim the leaf; the rest kind only if no other does.

    Where a filter looks at nothing but the type, its answer is remembered by type: models have thousands of
    leaves and a handful of types.
    """
    rest = tuple(name for name, kind in kinds.items() if kind.rest)
    by_type = {name: predicate(kind.of) for name, kind in kinds.items() if not kind.rest and type_only(kind.of)}
    others = {name: predicate(kind.of) for name, kind in kinds.items() if not kind.rest and name not in by_type}
    order = {name: position for position, name in enumerate(kinds)}
    known: dict[Any, tuple[str, ...]] = {}

    def claims_of(path: Any, leaf: Any) -> tuple[str, ...]:
        key = type_key(leaf)
        names = known.get(key)
        if names is None:
            names = known[key] = tuple(name for name, matches in by_type.items() if matches(path, leaf))
        if others:
            more = tuple(name for name, matches in others.items() if matches(path, leaf))
            names = tuple(sorted(names + more, key=order.__getitem__)) if more else names
        return names or rest

    return claims_of


def claim(kinds: Mapping[str, Kind], found: ModelGraph, *, there: bool = True) -> list[str]:
    """The kind of each leaf.

    Args:
      kinds: the declaration.
      found: the objects, flattened.
      there: whether the paths that kinds spell have to be there.

    Raises:
      OverlapError: leaves that several kinds claim, all of them.
      UnclaimedError: leaves that no kind claims, all of them.
      DeclarationError: kinds that spell a path which matches nothing, or that spell one and claim nothing; all of them.
      FilterError: a path that could mean one leaf or another.
    """
    claims_of = claimants(kinds)
    # A filter that looks at the path sees every path of a tied leaf: it claims the leaf by any of them.
    by_path = any(not kind.rest and not type_only(kind.of) for kind in kinds.values())
    aliases = aliases_of(found.graphdef, found.paths, found.several, found.names) if by_path else {}
    reading = Reading(found, aliases) if by_path else None
    if reading is not None:
        for kind in kinds.values():
            reading.check(kind.of)
    seen = found.ways if by_path else found.relative
    claims = []
    for path, leaf in zip(found.paths, found.leaves, strict=True):
        names = claims_of(seen(path), leaf)
        for alias in aliases.get(path, ()):
            more = claims_of(found.ways(alias), leaf)
            # What the rest kind would get by one path belongs to whoever claims it by another.
            named = [name for name in (*names, *more) if not kinds[name].rest]
            names = tuple(dict.fromkeys(named)) or names
        claims.append(names)
    if reading is not None and there and all(len(names) < 2 for names in claims):
        unclaimed = [
            row_of(path, leaf) for path, leaf, names in zip(found.paths, found.leaves, claims, strict=True) if not names
        ]
        check_claimed(kinds, reading, {name for names in claims for name in names}, unclaimed)
    if any(len(names) != 1 for names in claims):
        _check_claims(kinds, found, claims, aliases)
    return [names[0] for names in claims]


def _check_claims(
    kinds: Mapping[str, Kind], found: ModelGraph, claims: Sequence[tuple[str, ...]], aliases: dict[Path, Any]
) -> None:
    overlapping, unclaimed = [], []
    types: dict[tuple[str, ...], list[type]] = {}
    tied: dict[tuple[str, ...], list[Path]] = {}
    for path, leaf, names in zip(found.paths, found.leaves, claims, strict=True):
        if len(names) == 1:
            continue
        types.setdefault(names, []).append(compat.variable_type(leaf))
        if path in aliases:
            tied.setdefault(names, []).extend(found.relative(way) for way in (path, *aliases[path]))
        if names:
            overlapping.append(row_of(path, leaf, note="claimed by " + " and ".join(names)))
        else:
            unclaimed.append(row_of(path, leaf))
    if overlapping:
        also = f"  {_counted(unclaimed)} claimed by none: {_first_paths(unclaimed)}." if unclaimed else ""
        raise OverlapError(
            f"{_counted(overlapping)} claimed by more than one kind.{also}",
            leaves=overlapping + unclaimed,
            hint=_hint_contested(
                kinds,
                {names: found_types for names, found_types in types.items() if names},
                tied,
                {names[0] for names in claims if len(names) == 1},
            ),
        )
    raise UnclaimedError(
        f"{_counted(unclaimed)} claimed by no kind.", leaves=unclaimed, hint=_hint_unclaimed(kinds, types[()])
    )


def _counted(leaves: Sequence[Leaf]) -> str:
    return "1 leaf is" if len(leaves) == 1 else f"{len(leaves)} leaves are"


def _first_paths(leaves: Sequence[Leaf]) -> str:
    shown = ", ".join(format_path(leaf.path) for leaf in leaves[:3])
    return shown + (" ..." if len(leaves) > 3 else "")


def _hint_unclaimed(kinds: Mapping[str, Kind], types: Sequence[type]) -> str:
    """One kind for each type that is left over, or the rest kind for all of them."""
    lines = []
    for cls in dict.fromkeys(types):
        name = free_name(kinds, format_type(cls).strip("_").lower() + "_kind")
        lines.append(f"kinds = kinds | sw.Kinds({name}=sw.Kind({as_code(Exactly(cls))}))")
    lines.append(f"or, for all of them at once: kinds = kinds | sw.Kinds({free_name(kinds, 'rest')}=sw.Kind(...))")
    return "\n".join(lines)


def free_name(kinds: Mapping[str, Kind], name: str) -> str:
    """A name that no kind has: a hint must not push out what is declared."""
    taken = [name, *(f"{name}_{number}" for number in range(2, len(kinds) + 2))]
    return next(free for free in taken if free not in kinds)


def _hint_contested(
    kinds: Mapping[str, Kind],
    types: dict[tuple[str, ...], list[type]],
    tied: dict[tuple[str, ...], list[Path]],
    claimed: set[str],
) -> str:
    """Leaves each overlapping leaf to one kind, the most special one that claims it; the handlings stay.

    A tied leaf is matched path by path, so that what one filter says of one path excludes nothing at another:
    the kind that gives way excludes all of the leaf's paths.
    """
    gives_way: dict[str, dict[str, None]] = {}
    for names in types:
        *general, special = sorted(names, key=lambda name: _breadth(kinds, name, types[names]))
        for name in general:
            gives_way.setdefault(name, {})[as_code(kinds[special].of)] = None
            if not (type_only(kinds[name].of) and type_only(kinds[special].of)):
                gives_way[name] |= {f"sw.Path({format_path(path)!r})": None for path in tied.get(names, ())}
    lines = []
    for name, others in gives_way.items():
        nots = ", ".join(f"nnx.Not({other})" for other in others)
        of = f"nnx.All({as_code(kinds[name].of)}, {nots})"
        plain = kinds[name] == Kind(kinds[name].of)
        # A kind that spells a path may then claim nothing, which it has to say.
        empty = name not in claimed and not kinds[name].optional and not type_only(kinds[name].of)
        optional = ", optional=True" if empty and any(not one.negated for one in spelled(kinds[name].of)) else ""
        kind = f"sw.Kind({of}{optional})" if plain else f"dataclasses.replace(kinds[{name!r}], of={of}{optional})"
        lines.append(f"kinds = kinds.replace({name}={kind})")
    return "\n".join(lines)


def _breadth(kinds: Mapping[str, Kind], name: str, types: Sequence[type]) -> int:
    """How far a kind's own type stands above the overlapping leaf's: the wider filter gives way. 0 if unknown.

    What spells a path was written for these very leaves, and types give way to it: a model that is frozen by its path
    would train, if the hint gave its parameters to the kind of all parameters.
    """
    of = kinds[name].of
    if not type_only(of) and spelled(of):
        return 1 if isinstance(of, Glob) else 2
    if isinstance(of, type) and of in types[0].__mro__:
        return -types[0].__mro__.index(of)
    return 0
