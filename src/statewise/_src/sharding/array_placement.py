"""The placement of one array on a mesh, and how an optimizer's moment follows its parameter's.

Optax does not say which parameter a moment belongs to, so path and shape decide: a moment's path ends with that of its
parameter.  A moment with the parameter's shape has the parameter's placement; a factored one (a row or column of it, as
in Adafactor) that of the remaining axes; everything else, such as counts and scales, is replicated.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from statewise._src.common.paths import Path

__all__ = ["ArrayPlacement", "Owners", "follow"]


class ArrayPlacement(NamedTuple):
    """The placement of one array on a mesh.

    Attributes:
      axes: for each axis of the array, the mesh axes that split it.
      memory: the kind of memory; None for the devices' default.
      each: the mesh axes along which each device has its own value; they become a leading axis of the stored array.
      before: for each axis in front of that one, such as an ensemble's members, the same as for `axes`.
    """

    axes: tuple[tuple[str, ...], ...] = ()
    memory: str | None = None
    each: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()

    @property
    def split(self) -> bool:
        """Returns whether the devices hold different parts."""
        return any(self.axes) or bool(self.each) or any(self.before)

    def parts(self, sizes: Mapping[str, int]) -> int:
        """Returns the number of parts that one value of the array is split into."""
        return int(np.prod([sizes[name] for names in (*self.axes, *self.before) for name in names], dtype=np.int64))

    def grown(self, axis: int | None, rank: int, over: tuple[str, ...]) -> "ArrayPlacement":
        """Returns the same placement with the axis of an ensemble's members, split over these mesh axes.

        Args:
          axis: the position of the members' axis; None if all members share the array.
          rank: the number of dimensions of a member's array, without that of `each`.
          over: the mesh axes.
        """
        if axis is None:
            return self
        # In the stored array the axis of `each` comes first, so positions in `axes` are one less.
        index = axis % (rank + bool(self.each) + 1) - bool(self.each)
        if index < 0:
            return self._replace(before=(over,))
        axes = (*self.axes, *[()] * (rank - len(self.axes)))
        return self._replace(axes=(*axes[:index], over, *axes[index:]))

    def sharding(self, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> jax.NamedSharding:
        """Returns the JAX sharding."""
        axes = (*self.before, self.each, *self.axes) if self.each else self.axes
        spec = [names[0] if len(names) == 1 else names or None for names in axes]
        while spec and spec[-1] is None:
            spec.pop()
        return jax.NamedSharding(mesh, jax.P(*spec), memory_kind=self.memory)


# A parameter, as its moments see it: its shape and its placement.
Owners = dict[Path, list[tuple[tuple[int, ...], ArrayPlacement]]]


def follow(path: Path, shape: tuple[int, ...], owners: Owners) -> ArrayPlacement:
    """Returns a moment's placement: that of the parameter whose path ends its own; replicated if that is ambiguous."""
    for start in range(len(path)):
        candidates = owners.get(path[start:])
        if candidates is None:
            continue
        inherited = (_as_owner(path, shape, owner_shape, placement) for owner_shape, placement in candidates)
        answers = {placement for placement in inherited if placement is not None}
        return answers.pop() if len(answers) == 1 else ArrayPlacement()
    return ArrayPlacement()


def _as_owner(
    path: Path, shape: tuple[int, ...], owner_shape: tuple[int, ...], placement: ArrayPlacement
) -> ArrayPlacement | None:
    if shape == owner_shape:
        return placement
    # A factored moment lacks one axis of its parameter.
    removed = [axis for axis in range(len(owner_shape)) if owner_shape[:axis] + owner_shape[axis + 1 :] == shape]
    axes = placement.axes or ((),) * len(owner_shape)
    answers = [ArrayPlacement(axes[:axis] + axes[axis + 1 :], placement.memory, placement.each) for axis in removed]
    if len(removed) > 1:
        # Sides of equal length: Adafactor's names tell which one remains; optax.scale_by_factored_rms sorts them by
        # size.
        by_size = np.argsort(owner_shape)
        named = {"v_row": by_size[-1], "v_col": by_size[-2]}
        by_name = [answers[removed.index(axis)] for name, axis in named.items() if name in path and axis in removed]
        answers = by_name or answers
    return answers[0] if len(set(answers)) == 1 else None
