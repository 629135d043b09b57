"""How an array of a file becomes one of ours, and back: a pattern in the notation of einops.

The notation and its parser are those of einops (https://einops.rocks/api/rearrange).  What is added here is that a
pattern has an inverse, and that shapes follow from it in both directions, before an array is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from statewise._src.common.numbers import whole_number
from statewise.errors import DeclarationError, StatewiseError

__all__ = ["Pattern", "einops_package"]

# What einops' parser has for `...`.
_ELLIPSIS = "…"

# The axes of one side: each a product of named axes; none of them for an axis of length 1.
Axes = tuple[tuple[str, ...], ...]


def einops_package() -> Any:
    """Imports the package `einops`, which is optional.

    Raises:
      StatewiseError: it is not installed.
    """
    try:
        import einops.parsing
    except ImportError as error:
        raise StatewiseError(
            "A pattern needs the package einops, which is not installed.", hint="pip install 'statewise[names]'"
        ) from error
    return einops


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """A rearrangement of axes that has an inverse.

    Attributes:
      text: the pattern, from theirs to ours: `(n h) d -> d n h`.
      lengths: the lengths of some axes.
      theirs: the axes of their array.
      ours: the axes of ours.
    """

    text: str
    lengths: Mapping[str, int]
    theirs: Axes
    ours: Axes

    @classmethod
    def parse(cls, text: Any, lengths: Mapping[str, Any]) -> Pattern:
        """Reads a pattern.

        Raises:
          DeclarationError: it is not a pattern, or cannot be inverted.
          StatewiseError: the package einops is not installed.
        """
        if not isinstance(text, str):
            raise DeclarationError(f"A pattern is a text, not {type(text).__name__}.", hint="'o i -> i o'")
        left, arrow, right = text.partition("->")
        if not arrow or "->" in right:
            raise _refused(text, "has to have one arrow, from their axes to ours", "o i -> i o")
        theirs, ours = _axes(text, left), _axes(text, right)
        one_side = {*_named(theirs)} ^ {*_named(ours)}
        if one_side:
            raise _refused(text, f"cannot be inverted: {', '.join(sorted(one_side))} is on one side only", "o i -> i o")
        unknown = sorted({*lengths} - {*_named(ours)})
        if unknown:
            raise _refused(text, f"has no axis {', '.join(unknown)}, whose length is given", text)
        for name, length in lengths.items():
            if whole_number(length, 1) is None:
                raise _refused(text, f"has an axis {name} of length {length!r}", f"{name}=64")
        # Their shape follows from ours, so that it is enough if the lengths of ours are known.
        for group in ours:
            open_axes = [name for name in group if name not in lengths]
            if len(open_axes) > 1:
                raise _refused(
                    text,
                    f"does not say how ({' '.join(group)}) is divided into {' and '.join(open_axes)}",
                    f"sw.Name(..., {text!r}, {open_axes[-1]}=64)",
                )
        return cls(text, {name: int(length) for name, length in lengths.items()}, theirs, ours)

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of their array for one of ours.

        Raises:
          ValueError: the pattern does not fit this shape; the text says why.
        """
        lengths = self._solve(shape)
        covered = self._covered(shape)
        found: list[int] = []
        for group in self.theirs:
            found += covered if group == (_ELLIPSIS,) else [math.prod(lengths[name] for name in group)]
        return tuple(found)

    def factors(self, shape: Sequence[int]) -> tuple[dict[str, int], Axes, Axes]:
        """Returns the length of each axis; our axes as products of these, for our array of this shape; and theirs."""
        covered = {f"{_ELLIPSIS}{number}": length for number, length in enumerate(self._covered(shape))}
        many = tuple((axis,) for axis in covered)
        ours, theirs = (
            tuple(itertools.chain.from_iterable(many if group == (_ELLIPSIS,) else (group,) for group in side))
            for side in (self.ours, self.theirs)
        )
        return self._solve(shape) | covered, ours, theirs

    def to_ours(self, array: Any, shape: Sequence[int], one_of: int = 0) -> Any:
        """Returns their array as one of ours; a view where NumPy can give one.

        Args:
          array: their array.
          shape: the shape of ours.
          one_of: of how many leading axes of theirs the array has one position only; the result has one then, too.
        """
        lengths = self._solve(shape) | {name: 1 for group in self.theirs[:one_of] for name in group}
        return einops_package().rearrange(array, self.text, **lengths)

    def to_theirs(self, array: Any) -> Any:
        """Returns one of our arrays as theirs."""
        left, _, right = self.text.partition("->")
        return einops_package().rearrange(array, f"{right} -> {left}", **self._solve(array.shape))

    def position_of(self, axis: int) -> int | None:
        """Returns which of our axes is an axis of theirs and nothing else; None if none is."""
        group = self.theirs[axis] if _ELLIPSIS not in _named(self.theirs) else ()
        alone = len(group) == 1 and _ELLIPSIS not in _named(self.ours)
        return self.ours.index(group) if alone and group in self.ours else None

    def _covered(self, shape: Sequence[int]) -> list[int]:
        """Returns the lengths that `...` stands for."""
        if (_ELLIPSIS,) not in self.ours:
            return []
        at = self.ours.index((_ELLIPSIS,))
        return list(shape[at : at + len(shape) - len(self.ours) + 1])

    def _solve(self, shape: Sequence[int]) -> dict[str, int]:
        """Returns the length of each named axis, for our array of this shape."""
        has_ellipsis = (_ELLIPSIS,) in self.ours
        least = len(self.ours) - has_ellipsis
        if len(shape) < least or (len(shape) > least and not has_ellipsis):
            raise ValueError(f"has {len(shape)} axes, and {self.text!r} {'at least ' * has_ellipsis}{least}")
        sizes = list(shape)
        lengths = dict(self.lengths)
        for group in self.ours:
            if group == (_ELLIPSIS,):
                del sizes[: len(shape) - least]
                continue
            size = sizes.pop(0)
            unknown = next((name for name in group if name not in self.lengths), None)
            known = math.prod(self.lengths[name] for name in group if name != unknown)
            if size % known or (unknown is None and size != known):
                shown = " ".join(f"{name}={self.lengths[name]}" for name in group if name in self.lengths) or "1"
                verb = "is not divisible by" if unknown else "is not"
                raise ValueError(f"has an axis of {size}, which {verb} {shown} as {self.text!r} has it")
            if unknown is not None:
                lengths[unknown] = size // known
        return lengths


def _axes(text: str, side: str) -> Axes:
    package = einops_package()
    try:
        parsed = package.parsing.ParsedExpression(side.strip())
    except package.EinopsError as error:
        raise _refused(text, f"cannot be read: {str(error).splitlines()[0]}", "o i -> i o") from error
    if parsed.has_ellipsis_parenthesized:
        raise _refused(text, "has ... in parentheses, which has no inverse", "... o i -> ... i o")
    if parsed.has_non_unitary_anonymous_axes:
        raise _refused(text, "has a number as an axis; only 1 can be one", "sw.Name(..., '(n h) d -> d n h', h=64)")
    return tuple((_ELLIPSIS,) if group == _ELLIPSIS else tuple(group) for group in parsed.composition)


def _named(axes: Axes) -> list[str]:
    return [name for group in axes for name in group]


def _refused(text: str, fact: str, hint: str) -> DeclarationError:
    return DeclarationError(f"The pattern {text!r} {fact}.", hint=hint)
