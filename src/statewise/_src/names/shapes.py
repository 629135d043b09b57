"""Which patterns the shapes of two arrays allow, the most usual first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

__all__ = ["Fitting", "Shape", "fittings", "is_matrix"]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fitting:
    """One pattern that fits two shapes.

    Attributes:
      groups: which axes of the finer of the two arrays are together one axis of the other, in the other's order.
      sizes: the shape of the finer one.
      is_ours_finer: whether that is ours.
      is_transposed: whether the first axis of theirs is not our first.
    """

    groups: tuple[tuple[int, ...], ...]
    sizes: Shape
    is_ours_finer: bool
    is_transposed: bool

    def pattern(self, stack: int | None = None) -> tuple[str | None, dict[str, int]]:
        """Returns the pattern, None for axes that are the same; and the lengths that it needs.

        Args:
          stack: which of our axes is one of arrays that are stacked; None if they are not.
        """
        letters = _letters(len(self.sizes), self.groups if self.is_ours_finer else ())
        coarse = [_group([letters[axis] for axis in group]) for group in self.groups]
        left, right = (coarse, letters) if self.is_ours_finer else (letters, coarse)
        if stack is not None:
            left, right = ["layer", *left], [*right[:stack], "layer", *right[stack:]]
        inner = () if self.is_ours_finer else [axis for group in self.groups for axis in group[1:]]
        lengths = {letters[axis]: self.sizes[axis] for axis in inner}
        return (None, {}) if left == right else (f"{' '.join(left)} -> {' '.join(right)}", lengths)


def _letters(count: int, groups: Sequence[Sequence[int]]) -> list[str]:
    """Returns names of the axes of the finer array: those that are usual for a linear layer, heads, a convolution."""
    merged = [len(group) for group in groups if group]
    if count == 2:
        return ["n", "h"] if merged == [2] else ["i", "o"] if merged == [1, 1] else ["a", "b"]
    if count == 3 and merged in ([2, 1], [1, 2]):
        split = next(group for group in groups if len(group) == 2)
        return ["d", "n", "h"] if 0 not in split else ["n", "h", "d"]
    if count == 4 and merged == [1, 1, 1, 1]:
        return ["h", "w", "i", "o"]
    if count == 4 and sorted(merged) == [1, 3] and 0 not in max(groups, key=len):
        return ["d", "c", "n", "h"]
    if count == 3 and merged == [3]:
        return ["c", "n", "h"]
    return list("abcdefgk"[:count]) if count <= 8 else [f"a{number}" for number in range(count)]


def _group(names: Sequence[str]) -> str:
    return "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"


def is_matrix(role: str | None, key: str, shape: Shape) -> bool:
    """Returns whether an array is a kernel, which other programs may have with its outputs first."""
    return role == "weight" and key not in ("embedding", "scale", "gamma") and len(shape) > 1


@functools.lru_cache(maxsize=4096)
def fittings(ours: Shape, theirs: Shape, role: str | None, key: str, straight: bool) -> Sequence[Fitting]:
    """Returns the patterns that two shapes allow, the most usual first.

    Args:
      ours: the shape of our array.
      theirs: the shape of theirs.
      role: what the array is to its module.
      key: the last key of our path.
      straight: whether matrices have their inputs first in the files, as ours do.
    """
    if math.prod(ours) != math.prod(theirs):
        return []
    if 0 in ours:  # lengths do not say which axis is which
        return [Fitting(tuple((axis,) for axis in range(len(ours))), ours, True, False)] if ours == theirs else []
    is_kernel = is_matrix(role, key, ours) and len(theirs) > 1
    found: dict[tuple[tuple[int, ...], ...], Fitting] = {}
    for order in _orders(len(ours), is_kernel and not straight, len(ours) == len(theirs)):
        groups = _groups([ours[axis] for axis in order], theirs)
        if groups is not None:
            named = tuple(tuple(order[at] for at in group) for group in groups)
            first = next((axis for group in named for axis in group if ours[axis] > 1), 0)
            moved = any(size > 1 for size in ours[:first])
            found.setdefault(named, Fitting(named, ours, True, moved))
    merged = None if found else _groups(theirs, ours)
    if merged is not None:
        return [Fitting(tuple(merged), theirs, False, False)]
    return list(found.values())


def _orders(count: int, transposed: bool, same: bool) -> Iterator[tuple[int, ...]]:
    """Yields orders of our axes in theirs, the most usual first.

    Args:
      count: how many axes we have.
      transposed: whether outputs come before inputs.
      same: whether they have as many axes: if there are more than two, it is a convolution.
    """
    axes = tuple(range(count))
    turned = [axes[at:] + axes[:at] for at in range(1, count)]
    if count > 2:
        turned.insert(0 if same else count, (count - 1, count - 2, *range(count - 2)))
    if transposed:
        yield from turned
    yield axes
    yield from turned
    if count <= 4:
        yield from itertools.permutations(axes)


def _groups(sizes: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, ...]] | None:
    """Groups consecutive sizes so that the products are the wanted sizes; None if that is not possible."""
    groups: list[tuple[int, ...]] = []
    at = 0
    for size in wanted:
        group: list[int] = []
        product = 1
        while at < len(sizes) and (product < size or (size == 1 and sizes[at] == 1 and not group)):
            product *= sizes[at]
            group.append(at)
            at += 1
        if product != size:
            return None
        groups.append(tuple(group))
    rest = range(at, len(sizes))
    if any(sizes[each] != 1 for each in rest) or (rest and not groups):
        return None
    if rest:
        groups[-1] += tuple(rest)
    return groups
