"""Which kinds depend on which: checked for a declaration as a whole, and followed from kind to kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from statewise._src.plan.kind import Kind
from statewise.errors import DeclarationError

__all__ = ["all_sources", "check_depends_on"]


def check_depends_on(kinds: Mapping[str, Kind]) -> None:
    """Checks `depends_on` of all kinds: that what they depend on exists, and that none depends on itself.

    A plan checks it, not the declaration: the kind `optimizer` and those of averages exist only in a plan, and a
    declaration may be completed by `|`.

    Raises:
      DeclarationError: a kind that does not exist, or kinds in a circle; every problem is named.
    """
    problems: list[str] = []
    hints: dict[str, tuple[str, ...]] = {}
    named: dict[str, None] = {}
    for name, kind in kinds.items():
        unknown = [source for source in kind.depends_on if source not in kinds]
        problems += [f"{name!r} depends on {source!r}, and there is no such kind" for source in unknown]
        if name in kind.depends_on:
            problems.append(f"{name!r} depends on itself")
        wrong = {*unknown, *([name] if name in kind.depends_on else [])}
        if wrong:
            named[name] = None
            hints[name] = tuple(source for source in kind.depends_on if source not in wrong)
    for circle in _circles(kinds):
        problems.append(f"{' -> '.join(map(repr, circle))} is a circle")
        named |= dict.fromkeys(circle)
        last = circle[-2]
        hints[last] = tuple(source for source in hints.get(last, kinds[last].depends_on) if source != circle[0])
    if not problems:
        return
    changed = ", ".join(
        f"{name}=dataclasses.replace(kinds[{name!r}], depends_on={left!r}"
        # Without anything to depend on, nothing can be said of a stale kind.
        f"{'' if left or kinds[name].stale == 'error' else ', stale=' + repr('error')})"
        for name, left in hints.items()
    )
    raise DeclarationError(
        f"depends_on does not fit the kinds: {'; '.join(problems)}.",
        kind=next(iter(named)) if len(named) == 1 else None,
        hint=f"kinds = kinds.replace({changed})\nthe kinds are: {', '.join(kinds)}",
    )


def _circles(kinds: Mapping[str, Kind]) -> Iterator[tuple[str, ...]]:
    """Yields each circle of more than one kind once, from its first kind in the order of the declaration."""
    order = list(kinds)

    def paths(path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for source in kinds[path[-1]].depends_on:
            if source == path[0] and len(path) > 1:
                yield (*path, source)
            # Kinds before the first are the first of circles of their own.
            elif source in kinds and source not in path and order.index(source) > order.index(path[0]):
                yield from paths((*path, source))

    for name in order:
        yield from paths((name,))


def all_sources(kinds: Mapping[str, Kind], present: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns, for each kind that depends on others, all that it depends on, directly or through another kind.

    Args:
      kinds: the declaration, without circles.
      present: the kinds that have arrays; others never change.
    """
    sources: dict[str, tuple[str, ...]] = {}
    for name in present:
        reached: dict[str, None] = {}
        left = list(kinds[name].depends_on)
        while left:
            source = left.pop(0)
            if source not in reached:
                reached[source] = None
                left += kinds[source].depends_on
        own = tuple(kind for kind in present if kind in reached)
        if own:
            sources[name] = own
    return sources
