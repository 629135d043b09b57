"""How one array lies on a mesh, and how a moment of an optimizer lies: as the parameter that it is of.

Optax tells no owner of a moment, so it is told by path and shape: the path of a moment ends with that of its parameter.
A moment of the parameter's shape lies as the parameter does, a factored one (a row or column of it, as Adafactor keeps)
as the axes that are left of it; all else, counts and scales, is on every device.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from statewise._src.common.paths import Path

__all__ = ["ArrayPlacement", "Owners", "follow"]


class ArrayPlacement(NamedTuple):
    """How one array lies on a mesh.

    Attributes:
      axes: for each axis of the array the mesh axes that it is split over.
      memory: the kind of memory; None for the devices' own.
      each: the mesh axes along which each device has a value of its own; they are a leading axis of what lies there.
      before: for each axis that stands before that one, as an ensemble's members do, the same as for `axes`.
    """

    axes: tuple[tuple[str, ...], ...] = ()
    memory: str | None = None
    each: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()

    @property
    def split(self) -> bool:
        """Whether the devices hold different parts."""
        return any(self.axes) or bool(self.each) or any(self.before)

    def parts(self, sizes: Mapping[str, int]) -> int:
        """Into how many parts one value of the array is split."""
        return int(np.prod([sizes[name] for names in (*self.axes, *self.before) for name in names], dtype=np.int64))

    def grown(self, axis: int | None, rank: int, over: tuple[str, ...]) -> "ArrayPlacement":
        """The same with the axis of an ensemble's members, split over these mesh axes.

        Args:
          axis: which; None where all members share the array.
          rank: of how many dimensions a member's array is, without that of `each`.
          over: the mesh axes.
        """
        if axis is None:
            return self
        at = axis % (rank + bool(self.each) + 1) - bool(self.each)
        if at < 0:
            return self._replace(before=(over,))
        axes = (*self.axes, *[()] * (rank - len(self.axes)))
        return self._replace(axes=(*axes[:at], over, *axes[at:]))

    def sharding(self, mesh: Any) -> jax.NamedSharding:
        """The sharding that JAX takes."""
        axes = (*self.before, self.each, *self.axes) if self.each else self.axes
        spec = [names[0] if len(names) == 1 else names or None for names in axes]
        while spec and spec[-1] is None:
            spec.pop()
        return jax.NamedSharding(mesh, jax.P(*spec), memory_kind=self.memory)


# A parameter as its moments see it: its shape, and how it lies.
Owners = dict[Path, list[tuple[tuple[int, ...], ArrayPlacement]]]


def follow(path: Path, shape: tuple[int, ...], owners: Owners) -> ArrayPlacement:
    """How a moment lies: as the parameter whose path ends its own; replicated where none does, or several differ."""
    for start in range(len(path)):
        candidates = owners.get(path[start:])
        if candidates is None:
            continue
        found = (_as_owner(path, shape, of, lies) for of, lies in candidates)
        answers = {lies for lies in found if lies is not None}
        return answers.pop() if len(answers) == 1 else ArrayPlacement()
    return ArrayPlacement()


def _as_owner(path: Path, shape: tuple[int, ...], of: tuple[int, ...], lies: ArrayPlacement) -> ArrayPlacement | None:
    if shape == of:
        return lies
    removed = [axis for axis in range(len(of)) if of[:axis] + of[axis + 1 :] == shape]
    axes = lies.axes or ((),) * len(of)
    answers = [ArrayPlacement(axes[:axis] + axes[axis + 1 :], lies.memory, lies.each) for axis in removed]
    if len(removed) > 1:
        # Sides of equal length: Adafactor's names tell which one is left, as optax.scale_by_factored_rms sorts them.
        by_size = np.argsort(of)
        named = {"v_row": by_size[-1], "v_col": by_size[-2]}
        answers = [
            answers[removed.index(at)] for name, at in named.items() if name in path and at in removed
        ] or answers
    return answers[0] if len(set(answers)) == 1 else None
