"""Where one of our arrays is found in another program: in which of its arrays, of which shapes; and the way back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from statewise._src.names.name import Name
from statewise._src.names.pattern import Axes

__all__ = ["Layout"]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of our arrays, as another program has it.

    Attributes:
      name: its name there.
      shape: our array's shape.
      stacked: the number of arrays along each stacked axis; empty if none is stacked.
      parts: for each position in the stack the names of the arrays that are joined; one name if none are.
      shapes: the shape of each of these.
    """

    name: Name
    shape: Shape
    stacked: Shape
    parts: tuple[tuple[str, ...], ...]
    shapes: tuple[Shape, ...]

    @classmethod
    def of(cls, name: Name, values: Mapping[str, str], shape: Sequence[int]) -> Layout:
        """Returns the layout of an array of this shape.

        Args:
          name: what it is called.
          values: what the placeholders of our path stand for.
          shape: the shape of our array.

        Raises:
          ValueError: the pattern, or the lengths, do not fit the shape; the text says why, and follows our path.
        """
        theirs = tuple(shape) if name.parsed is None else name.parsed.their_shape(shape)
        fields = [field for field in name.templates[0].fields if field not in values]
        if len(fields) > len(theirs):
            raise ValueError(f"has {len(theirs)} axes there, which is not enough to stack {', '.join(fields)}")
        stacked, each = theirs[: len(fields)], theirs[len(fields) :]
        parts = []
        for index in itertools.product(*map(range, stacked)):
            numbered = {**values, **dict(zip(fields, index, strict=True))}
            parts.append(tuple(template.fill(numbered) for template in name.templates))
        return cls(name, tuple(shape), stacked, tuple(parts), _joined_shapes(name, each))

    @property
    def names(self) -> dict[str, Shape]:
        """Returns the shape of each of their arrays."""
        return {name: shape for part in self.parts for name, shape in zip(part, self.shapes, strict=True)}

    @functools.cached_property
    def factors(self) -> tuple[dict[str, int], Axes, Axes]:
        """Returns the length of each axis of the pattern; ours and theirs as products of these, with those stacked."""
        if self.name.parsed is not None:
            return self.name.parsed.factors(self.shape)
        axes = tuple((str(number),) for number in range(len(self.shape)))
        return {axis: size for (axis,), size in zip(axes, self.shape, strict=True)}, axes, axes

    @property
    def joined_axis(self) -> int | None:
        """Returns along which axis of theirs several are joined; None if none are."""
        return self._join if len(self.shapes) > 1 else None

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """Returns which of our axes are the stacked ones; none if one of them is only a part of one of ours."""
        _, ours, theirs = self.factors
        stacked = theirs[: len(self.stacked)]
        return tuple(map(ours.index, stacked)) if all(len(group) == 1 and group in ours for group in stacked) else ()

    def to_theirs(self, array: Any) -> dict[str, Any]:
        """Returns their arrays for one of ours."""
        if self.name.parsed is not None:
            array = self.name.parsed.to_theirs(array)
        found: dict[str, Any] = {}
        for index, part in zip(np.ndindex(self.stacked), self.parts, strict=True):
            each = array[index] if index else array
            if len(part) > 1:
                ends = list(itertools.accumulate(shape[self._join] for shape in self.shapes))[:-1]
                cuts = zip([0, *ends], [*ends, None], strict=True)
                before = (slice(None),) * self._join
                found |= {name: each[(*before, slice(*cut))] for name, cut in zip(part, cuts, strict=True)}
            else:
                found[part[0]] = each
        return found

    def to_ours(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Returns our array; reads their arrays one after another, and holds one position of the stack at a time."""
        if not self.stacked:
            return self._rearranged(self._one(read, self.parts[0]))
        axes = self._stack_axes()
        if axes is None or not self.parts:  # a stacked axis is a part of one of ours, which needs all of them at once
            every = [self._one(read, part) for part in self.parts]
            dtype = every[0].dtype if every else np.float32
            whole = np.asarray(every, dtype).reshape(self.stacked + (every[0].shape if every else self._each))
            return self._rearranged(whole)
        ours: np.ndarray | None = None
        for index, part in zip(np.ndindex(self.stacked), self.parts, strict=True):
            one = self._one(read, part)
            if ours is None:
                ours = np.empty(self.shape, one.dtype)
            at: list[Any] = [slice(None)] * len(self.shape)
            for axis, number in zip(axes, index, strict=True):
                at[axis] = slice(number, number + 1)
            ours[tuple(at)] = self._rearranged(one.reshape((1,) * len(index) + one.shape), len(index))
        assert ours is not None
        return ours

    def numbered(self) -> Layout:
        """Returns the layout with numbers for names: equal for all arrays that are laid out alike."""
        name = self.name
        plain = Name(
            [*map(str, range(len(name.names)))], name.pattern, join=name.join, sizes=name.sizes, **dict(name.axes)
        )
        numbers = map(str, itertools.count())
        return dataclasses.replace(
            self, name=plain, parts=tuple(tuple(next(numbers) for _ in part) for part in self.parts)
        )

    def joined(self, arrays: Mapping[str, Any]) -> Any:
        """Returns our array, from JAX arrays of theirs by name: all at once, on their device."""
        every = [
            arrays[part[0]] if len(part) == 1 else jnp.concatenate([arrays[name] for name in part], self._join)
            for part in self.parts
        ]
        if not self.stacked:
            return self._rearranged(every[0])
        whole = jnp.stack(every) if every else jnp.zeros((0, *self._each))
        return self._rearranged(whole.reshape(self.stacked + self._each))

    @property
    def _join(self) -> int:
        assert self.name.join is not None
        return self.name.join % len(self.shapes[0])

    @property
    def _each(self) -> Shape:
        """Returns the shape of one position of the stack, joined."""
        first = self.shapes[0]
        if len(self.shapes) == 1:
            return first
        total = sum(shape[self._join] for shape in self.shapes)
        return (*first[: self._join], total, *first[self._join + 1 :])

    def _one(self, read: Callable[[str], np.ndarray], part: Sequence[str]) -> np.ndarray:
        arrays = [read(name) for name in part]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, self._join)

    def _rearranged(self, array: Any, one_of: int = 0) -> Any:
        parsed = self.name.parsed
        return array if parsed is None else parsed.to_ours(array, self.shape, one_of)

    def _stack_axes(self) -> list[int] | None:
        """Returns which of our axes are the stacked ones; None if one of them is only a part of one of ours."""
        if self.name.parsed is None:
            return list(range(len(self.stacked)))
        found = [self.name.parsed.position_of(axis) for axis in range(len(self.stacked))]
        known = [axis for axis in found if axis is not None]
        return known if len(known) == len(found) else None


def _joined_shapes(name: Name, shape: Shape) -> tuple[Shape, ...]:
    """Returns the shapes of the arrays that are joined into one of this shape."""
    if name.is_single:
        return (shape,)
    assert name.join is not None
    if not -len(shape) <= name.join < len(shape):
        raise ValueError(f"has {len(shape)} axes there, and is joined along axis {name.join}")
    join, count = name.join % len(shape), len(name.names)
    sizes = name.sizes
    if sizes is None:
        if shape[join] % count:
            raise ValueError(f"has an axis of {shape[join]} there, which is not {count} equal parts: it needs sizes=")
        sizes = (shape[join] // count,) * count
    elif sum(sizes) != shape[join]:
        raise ValueError(f"has an axis of {shape[join]} there, and sizes={sizes} add up to {sum(sizes)}")
    return tuple((*shape[:join], size, *shape[join + 1 :]) for size in sizes)
