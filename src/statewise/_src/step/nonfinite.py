"""A step that changes nothing if the loss, a gradient, or a value that the function writes is not finite.

Random streams are the exception: they advance, so that the next step draws other numbers.  `train_program` decides
whether the update is a branch, or is computed as always and then selected or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.plan.arrays import Spot
from statewise._src.plan.tables import PlanTables
from statewise._src.sharding.explicit_axes import as_it_came, is_split
from statewise._src.step.operands import Arrays

__all__ = ["all_finite", "everywhere", "keep_old", "protected", "stays_finite"]

# Elements.  Smaller arrays are joined before they are looked at: on the CPU each reduction is a kernel of its own.
_SMALL = 16 * 1024


def all_finite(arrays: Iterable[Any]) -> Any:
    """Returns whether all elements of these arrays are finite; integers and keys always are."""
    floats = [array for array in arrays if jnp.issubdtype(array.dtype, jnp.inexact) and array.size]
    small: dict[Any, list[Any]] = {}
    groups = []
    for array in floats:
        if array.size > _SMALL or is_split(array):
            groups.append(array)
        else:
            small.setdefault(array.dtype, []).append(jnp.ravel(array))
    groups += [arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays) for arrays in small.values()]
    is_finite = jnp.ones((), bool)
    for group in groups:
        is_finite &= jnp.isfinite(group).all()
    return is_finite


def stays_finite(new: Sequence[Any], old: Sequence[Any]) -> Any:
    """Returns whether no finite element became one that is not: a bound may be infinite from the start."""
    is_finite = jnp.ones((), bool)
    for after, before in zip(new, old, strict=True):
        if after is not before and jnp.issubdtype(after.dtype, jnp.inexact) and after.size:
            is_finite &= (jnp.isfinite(after) | ~jnp.isfinite(before)).all()
    return is_finite


def keep_old(changes: Any, plan: PlanTables, arrays: Arrays, before: Sequence[Any], slots: Mapping[Spot, Any]) -> None:
    """Puts the old arrays back where a step changes nothing; those of random streams stay new.

    Args:
      changes: whether the step changes anything, as an array.
      plan: the plan.
      arrays: the arrays of the program, with their new values.
      before: the old arrays, by number.
      slots: what came in, by kind and slot.
    """
    for number in protected(plan, range(len(plan.arrays)), before):
        new, old = arrays.flat[number], before[number]
        if new is not old:
            arrays.flat[number] = jnp.where(changes, as_it_came(new, old), old)
    for spot, new in arrays.computed.items():
        arrays.computed[spot] = jnp.where(changes, new, slots[spot])


def protected(plan: PlanTables, numbers: Iterable[int], before: Sequence[Any]) -> list[int]:
    """Returns which of these arrays stay as they are in a step that changes nothing: all but random streams."""
    infos = (plan.arrays[number] for number in numbers if before[number] is not None)
    return [info.number for info in infos if not issubclass(info.leaf.type, nnx.RngState)]


def everywhere(is_true: Any, axes: tuple[str, ...]) -> Any:
    """Returns whether a flag is true on every device along these mesh axes."""
    return jax.lax.pmin(is_true.astype(jnp.int32), axes) > 0 if axes else is_true
