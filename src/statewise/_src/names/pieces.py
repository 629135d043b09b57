"""A part of one of our arrays, in pieces: each is a part of one of theirs, and a view of the buffer where it goes.

Once each axis that is a product is split into its factors, a pattern only permutes axes.  So a buffer of ours, reshaped
to the factors, is a view in which each of their arrays is a block: blocks are read one after another into it, and there
is never a second copy of the whole.  What one device of a mesh has of an axis that is a product is not always a block
of its factors; then it is a few of them (`_boxes`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from statewise._src.names.layout import Layout

__all__ = ["Piece", "pieces"]

# The positions of one axis, from the first to after the last.
Range = tuple[int, int]
# An index with `...` at its end, which makes a view also of an array without axes.
Index = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one of their arrays, and where it goes.

    Attributes:
      name: the array's name.
      index: the positions of the part along each of its axes.
      shape: the part's shape, each axis split into its factors.
      within: what is wanted of that; nearly always all.
      into: a view of our buffer, of the shape that is wanted.
    """

    name: str
    index: tuple[slice, ...]
    shape: tuple[int, ...]
    within: tuple[slice, ...]
    into: np.ndarray

    @property
    def is_direct(self) -> bool:
        """Returns whether the part can be read straight into the buffer."""
        return self.into.shape == self.shape and self.into.flags.c_contiguous

    def cut(self, elements: int) -> Iterator[Piece]:
        """Yields this piece in smaller ones, of about this many elements, along the first axis that has several."""
        axis = next((axis for axis, size in enumerate(self.shape) if size > 1), None)
        if axis is None or math.prod(self.shape) <= elements or self.into.shape != self.shape:
            yield self
            return
        # All axes before it have one position, so that it is the outermost factor of the axis that it is part of.
        theirs = next(number for number, each in enumerate(self.index) if each.stop - each.start > 1)
        first = self.index[theirs].start
        factor = (self.index[theirs].stop - first) // self.shape[axis]
        step = max(elements // math.prod(self.shape[axis + 1 :]), 1)
        before = (slice(None),) * axis
        for start in range(0, self.shape[axis], step):
            stop = min(start + step, self.shape[axis])
            index = list(self.index)
            index[theirs] = slice(first + start * factor, first + stop * factor)
            shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
            yield Piece(self.name, tuple(index), shape, self.within, self.into[(*before, slice(start, stop))])


def pieces(layout: Layout, index: Sequence[slice], out: np.ndarray) -> Iterator[Piece]:
    """Yields the pieces of a part of one of our arrays: together they are all of it, and none is there twice.

    Args:
      layout: where the array is.
      index: the positions of the part along each axis, without steps.
      out: a buffer of the part's shape.
    """
    if 0 in out.shape:
        return
    lengths, ours, theirs = layout.factors
    order = [axis for group in ours for axis in group]
    back = [order.index(axis) for group in theirs for axis in group]
    along = []
    for group, part, size in zip(ours, index, layout.shape, strict=True):
        start, stop, _ = part.indices(size)
        boxes = list(_boxes([lengths[axis] for axis in group], start, stop))
        ends = list(itertools.accumulate((math.prod(end - begin for begin, end in box) for box in boxes), initial=0))
        along.append([(slice(*each), box) for each, box in zip(itertools.pairwise(ends), boxes, strict=True)])
    for chosen in itertools.product(*along):
        box = dict(zip(order, itertools.chain.from_iterable(ranges for _, ranges in chosen), strict=True))
        # Splitting axes never copies; merging them might.
        parts: Index = (*(part for part, _ in chosen), ...)
        view = out[parts].reshape([end - begin for begin, end in box.values()])
        yield from _of_box(layout, box, view.transpose(back))


def _of_box(layout: Layout, box: dict[str, Range], view: np.ndarray) -> Iterator[Piece]:
    """Yields the pieces of a block of factors; the view has their axes in the order of theirs."""
    lengths, _, theirs = layout.factors
    depth = len(layout.stacked)
    stack = [axis for group in theirs[:depth] for axis in group]
    each = theirs[depth:]
    for number in itertools.product(*(range(*box[axis]) for axis in stack)):
        at = dict(zip(stack, number, strict=True))
        position = [_at([lengths[axis] for axis in group], [at[axis] for axis in group]) for group in theirs[:depth]]
        part = layout.parts[int(np.ravel_multi_index(position, layout.stacked)) if position else 0]
        fixed: Index = (*(at[axis] - box[axis][0] for axis in stack), ...)
        block = view[fixed]
        for name, first, cut in _cuts(layout, part, each):
            wanted = {axis: _overlap(box[axis], cut.get(axis, box[axis])) for group in each for axis in group}
            if any(begin >= end for begin, end in wanted.values()):
                continue
            spans = (slice(begin - box[axis][0], end - box[axis][0]) for axis, (begin, end) in wanted.items())
            inner: Index = (*spans, ...)
            into = block[inner]
            index, shape, within = [], [], []
            for axis, group in enumerate(each):
                span, sizes, inside = _span([lengths[factor] for factor in group], [wanted[factor] for factor in group])
                offset = first if axis == layout.joined_axis else 0
                index.append(slice(span[0] - offset, span[1] - offset))
                shape += sizes
                within += inside
            yield Piece(name, tuple(index), tuple(shape), tuple(within), into)


def _cuts(
    layout: Layout, part: Sequence[str], each: Sequence[tuple[str, ...]]
) -> Iterator[tuple[str, int, dict[str, Range]]]:
    """Yields the arrays that are joined: the name, its first position, and the factors of the axis that it has."""
    join = layout.joined_axis
    if join is None:
        yield part[0], 0, {}
        return
    first = 0
    lengths, _, _ = layout.factors
    for name, shape in zip(part, layout.shapes, strict=True):
        for box in _boxes([lengths[axis] for axis in each[join]], first, first + shape[join]):
            yield name, first, dict(zip(each[join], box, strict=True))
        first += shape[join]


def _boxes(lengths: Sequence[int], start: int, stop: int) -> Iterator[list[Range]]:
    """Yields, in order, blocks of an axis's factors (the outermost first) that together cover these positions."""
    if start >= stop:
        return
    if not lengths:
        yield []
        return
    inner = math.prod(lengths[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        for rest in _boxes(lengths[1:], start - first * inner, stop - first * inner):
            yield [(first, first + 1), *rest]
        return
    if start % inner:
        yield from _boxes(lengths, start, (first + 1) * inner)
        first += 1
    whole = stop // inner
    if whole > first:
        yield [(first, whole), *((0, length) for length in lengths[1:])]
    yield from _boxes(lengths, whole * inner, stop)


def _span(lengths: Sequence[int], wanted: Sequence[Range]) -> tuple[Range, list[int], list[slice]]:
    """Returns the positions of an axis that cover a block of its factors; their shape; and the block within it."""
    several = next((at for at, (begin, end) in enumerate(wanted) if end - begin > 1), len(wanted))
    # Inside of a factor that has several positions, everything is covered.
    covered = [*wanted[: several + 1], *((0, length) for length in lengths[several + 1 :])]
    begin = _at(lengths, [each[0] for each in covered])
    end = _at(lengths, [each[1] - 1 for each in covered]) + 1
    inside = [slice(b - c, e - c) for (b, e), (c, _) in zip(wanted, covered, strict=True)]
    return (begin, end), [e - b for b, e in covered], inside


def _at(lengths: Sequence[int], position: Sequence[int]) -> int:
    """Returns the position along an axis, from the position along each of its factors."""
    found = 0
    for length, each in zip(lengths, position, strict=True):
        found = found * length + each
    return found


def _overlap(one: Range, other: Range) -> Range:
    return max(one[0], other[0]), min(one[1], other[1])
