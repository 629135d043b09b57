"""Arrays of a model or of files, grouped: those of one module together, and those of numbered modules as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from statewise._src.names.words import role_of, words_of_name

__all__ = ["Link", "Module", "linked", "modules_of"]

Shape = tuple[int, ...]
Numbers = tuple[str, ...]

_FIELDS = "ijklmnop"


@dataclasses.dataclass(frozen=True)
class Module:
    """A module, or all those whose names differ only in numbers.

    Attributes:
      parts: the keys of its name; None for each number.
      numbers: the numbers of each of the modules.
      leaves: the shape of each of its arrays, by its last key; "" for an array that is not a part of a module.
    """

    parts: tuple[str | None, ...]
    numbers: frozenset[Numbers]
    leaves: Mapping[str, Shape]

    @property
    def depth(self) -> int:
        """Returns how many numbers a name has."""
        return self.parts.count(None)

    def words(self, has_own: bool) -> frozenset[str]:
        """Returns what the module's name is about."""
        return words_of_name([part for part in self.parts if part is not None], has_own=has_own)

    def name(self, key: str, separator: str, fields: Sequence[str] = _FIELDS) -> str:
        """Returns the name of one of its arrays, with placeholders for the numbers."""
        left = iter(fields)
        parts = [f"{{{next(left)}}}" if part is None else part for part in self.parts]
        return separator.join([*parts, *([key] if key else [])])

    def names(self, key: str) -> list[str]:
        """Returns the name of one of the arrays of each of the modules."""
        ordered = sorted(self.numbers, key=lambda numbers: [*map(int, numbers)])
        filled = ([next(left) if part is None else part for part in self.parts] for left in map(iter, ordered))
        return [".".join([*parts, *([key] if key else [])]) for parts in filled]


def modules_of(arrays: Iterable[tuple[Sequence[object], Shape]]) -> list[Module]:
    """Groups arrays, each given by the keys of its name and its shape; in the order of the first of each."""
    found: dict[tuple[str | None, ...], dict[Numbers, dict[str, Shape]]] = {}
    for keys, shape in arrays:
        parts = [str(key) for key in keys]
        last = parts.pop() if role_of(parts[-1]) is not None else ""
        template = tuple(None if part.isdecimal() else part for part in parts)
        numbers = tuple(part for part in parts if part.isdecimal())
        found.setdefault(template, {}).setdefault(numbers, {})[last] = shape
    modules = []
    for template, members in found.items():
        first = next(iter(members.values()))
        if all(member == first for member in members.values()):
            modules.append(Module(template, frozenset(members), first))
            continue
        for numbers, member in members.items():  # of other shapes: each by itself
            left = iter(numbers)
            literal = tuple(next(left) if part is None else part for part in template)
            modules.append(Module(literal, frozenset([()]), member))
    return modules


@dataclasses.dataclass(frozen=True)
class Link:
    """How the numbers of theirs are those of ours.

    Attributes:
      fields: the placeholder of each of their numbers.
      stacked: how many of theirs are stacked in one of ours; None if they are not.
    """

    fields: tuple[str, ...]
    stacked: int | None = None


def linked(ours: Module, theirs: Module) -> Link | None:
    """Returns how the numbers of two modules belong together; None if they do not."""
    if ours.depth == theirs.depth:
        return Link(tuple(_FIELDS[: theirs.depth])) if ours.numbers == theirs.numbers else None
    if theirs.depth != ours.depth + 1:
        return None
    for at in range(theirs.depth):
        rest = {(*numbers[:at], *numbers[at + 1 :]) for numbers in theirs.numbers}
        along = {numbers[at] for numbers in theirs.numbers}
        is_whole = len(theirs.numbers) == len(rest) * len(along) and along == set(map(str, range(len(along))))
        if rest == ours.numbers and is_whole:
            fields = list(_FIELDS[: ours.depth])
            return Link((*fields[:at], _FIELDS[ours.depth], *fields[at:]), len(along))
    return None
