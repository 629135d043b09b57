"""Slots: which entries along its batch axis a restart renews.

Every leaf that lacks this axis, or has another number of slots, is reported, with a declaration that helps: a separate
kind for such leaves of the model, or, for the counts of an optimizer, an optimizer for each slot.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.paths import Leaf, Path
from statewise._src.common.problems import Problems
from statewise._src.core.restart_targets import Chosen, call_of, slot_axis
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import StructureError

__all__ = ["Slots", "axis_of_rows", "only_where", "slots_of"]

# Which slots: one boolean for each of them, or their indices.
Slots = jax.typing.ArrayLike | Sequence[bool] | Sequence[int]

_NO_AXIS = "does not have this axis"
_PER_SLOT = "per_slot = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))"


def slots_of(plan: PlanTables, chosen: Chosen, where: Any) -> Any:
    """Returns the slots to restart as one boolean for each; for an ensemble they may have a row for each member.

    Args:
      plan: the plan of the state.
      chosen: what the restart renews.
      where: booleans, or slot indices.

    Raises:
      StructureError: `where` does not fit the slots, or leaves do not have the same number of slots; lists all of them.
    """
    given = where if isinstance(where, jax.Array) else np.asarray(where)
    is_mask, members = given.dtype == bool, plan.ensemble
    if members is not None and is_mask and given.ndim == 2 and given.shape[0] == members.number:
        _check_own(plan, chosen.kinds)
        slots_of(plan, chosen, np.zeros(given.shape[1], bool))  # checks the number of slots in a row
        return given
    if given.ndim != 1 or not (is_mask or jnp.issubdtype(given.dtype, jnp.integer) or given.size == 0):
        raise StructureError(
            f"where must be booleans or slot numbers in one dimension, not {given.dtype}{list(given.shape)}.",
            hint="where=jnp.array([True, False]) or where=[0]",
        )
    names, kind = ", ".join(chosen.kinds), chosen.kinds[0]
    counts = _slot_counts(chosen)
    sizes = {size for _, size in counts}
    count = given.shape[0] if is_mask else max(sizes)
    if is_mask and len(sizes) == 1 and sizes != {count} and min(sizes) >= 0:
        raise StructureError(
            f"where has {count} entries, but {names} has {min(sizes)} slots.",
            kind=kind,
            hint=f"a boolean for each of the {min(sizes)} slots, or slot numbers",
        )
    problems = Problems()
    for leaf, size in counts:
        if size < 0 or size != count:
            problems.add(leaf, f"{size} slots" if size >= 0 else _NO_AXIS)
    if problems:
        slots = f"{count} slots along its batch axis" if count >= 0 else "its batch axis"
        problems.raise_as(StructureError, f"Not every leaf of {names} has {slots}.", _hint(chosen, problems.leaves))
    if is_mask:
        return given
    if not isinstance(given, jax.core.Tracer):
        outside = [slot for slot in np.asarray(given).tolist() if not -count <= slot < count]
        if outside:
            raise StructureError(
                f"There is no slot {outside[0]}: there are {count}.", kind=kind, hint=f"slots 0 to {count - 1}"
            )
    return jnp.zeros(count, bool).at[given.astype(int)].set(True)


def axis_of_rows(slots: Any) -> int | None:
    """Returns the axis of `slots_of` over the members of an ensemble; None if all restart the same slots."""
    return 0 if slots is not None and slots.ndim == 2 else None


def _check_own(plan: PlanTables, kinds: Sequence[str]) -> None:
    """Checks that each member of an ensemble has values of its own in these kinds."""
    problems = Problems()
    for kind in kinds:
        for slot in plan.stored[kind]:
            if slot.axis is None:
                problems.add(slot.leaf, "shared by all members")
    problems.raise_as(
        StructureError,
        "where has a row for each member, and the members share these leaves.",
        "where= in one dimension: the slots that restart for all of them",
    )


@functools.lru_cache(maxsize=256)
def _slot_counts(chosen: Chosen) -> list[tuple[Leaf, int]]:
    """Returns, for each array that is renewed, its leaf and its number of slots on all devices; -1 without the axis."""
    counts = []
    for name in chosen.kinds:
        declared = chosen.axis(name)
        for array in chosen.renewed(name):
            axis = slot_axis(array, declared)
            counts.append((array.leaf, -1 if axis is None else array.spec.shape[axis] * (array.devices or 1)))
    return counts


def _hint(chosen: Chosen, leaves: Sequence[Leaf]) -> str:
    """Returns what to declare: an optimizer for each slot, or a separate kind for leaves that all slots share."""
    plan = chosen.plan
    derived = frozenset(leaf.path for leaf in plan.leaves[len(plan.rows) :])
    hints = _for_optimizers(chosen, {leaf.path: leaf.note for leaf in leaves}) if OPTIMIZER in chosen.kinds else []
    own = [leaf for leaf in leaves if leaf.path not in derived]
    for name in dict.fromkeys(leaf.kind or "" for leaf in own):
        paths = [leaf.path for leaf in own if leaf.kind == name]
        if name == OPTIMIZER and any(path[-1] != "step" for path in paths):
            hints.append(f"{_PER_SLOT}\nnnx.Optimizer(model, per_slot, wrt=...)")
            paths = [path for path in paths if path[-1] == "step"]  # NNX's own count of its calls
        if 0 < len(paths) < len(plan[name]):  # if no leaf remained in the kind, it would not have slots
            hints.append(_separate(plan, name, paths))
    everything = call_of(chosen.kinds)
    hints.append(f"or restart all slots: {everything}" if hints else everything)
    return "\n".join(hints)


def _for_optimizers(chosen: Chosen, notes: Mapping[Path, str]) -> list[str]:
    """Returns an optimizer for each slot, as code, for each optimizer whose state does not have slots."""
    plan = chosen.plan
    hints: list[str] = []
    optimizers: list[str] = []
    for group in (plan.optimizers[index] for index in chosen.groups):
        axes = {plan.kinds[name].batch_axis for name in group.kinds}
        sizes = {notes.get(path, "") for path in group.leaf_paths}
        # State that has slots, only another number of them, needs no other optimizer.
        if (len(sizes) == 1 and _NO_AXIS not in sizes) or len(axes) > 1 or None in axes:
            continue
        (axis,) = axes
        init = f", in_axes={axis}" if axis else ""
        update = f", in_axes=({axis}, 0, {axis}), out_axes=({axis}, 0)" if axis else ""
        name = f"per_slot{len(optimizers) or ''}"
        hints.append(
            f"tx = plan.optimizers[{group.kinds!r}]\n"
            f"{name} = optax.GradientTransformation(jax.vmap(tx.init{init}), jax.vmap(tx.update{update}))"
        )
        optimizers.append(f"{group.kinds!r}: {name}")
    if optimizers:
        hints.append(f"plan = plan.kinds.plan(model, optimizers={{**plan.optimizers, {', '.join(optimizers)}}})")
    slotted = [name for name in chosen.updated if plan.kinds[name].batch_axis is not None]
    if chosen.whole and 0 < len(slotted) < len(chosen.updated):
        hints.append(f"{call_of([*slotted, OPTIMIZER], 'where=where')}  # only their optimizers")
    return hints


def _separate(plan: PlanTables, name: str, paths: Sequence[Path]) -> str:
    """Returns the declaration of a separate kind for some of a kind's leaves, as code."""
    # A filter sees paths within each object.
    inside = [path[plan.several :] for path in paths]
    others = {leaf.path[plan.several :][-1] for leaf in plan[name] if leaf.path not in paths}
    # By the last key alone where that is enough: "**/step" says it for any number of modules.
    shown = dict.fromkeys(
        path if len(inside) == 1 or path[-1] in others or len(path) < 2 else ("**", path[-1]) for path in inside
    )
    of = " | ".join(f"sw.Path({'/'.join(map(str, path))!r})" for path in shown)
    own = f"plan.kinds[{name!r}]"
    claimed = of if plan.kinds[name].rest else f"nnx.All({own}.of, {of})"
    separate = f"sw.Kinds({name}_of_all=dataclasses.replace({own}, of={claimed}, batch_axis=None))"
    if plan.kinds[name].rest:
        return f"kinds = plan.kinds | {separate}  # a separate kind"
    without = f"dataclasses.replace({own}, of=nnx.All({own}.of, nnx.Not({of})))"
    return f"kinds = plan.kinds.replace({name}={without}) | {separate}  # a separate kind"


def only_where(axis: int, slots: Any, fresh: Any, old: Any, per_device: bool) -> Any:
    """Returns fresh values in the slots that restart, and the old ones in all others.

    Args:
      axis: the axis of the slots.
      slots: a boolean for each slot, those of the first device first.
      fresh: the fresh values.
      old: the values now.
      per_device: whether there is a leading axis, one value for each device.
    """
    if per_device:
        by_device = slots.reshape(old.shape[0], -1)
        return jax.vmap(lambda slots, fresh, old: only_where(axis, slots, fresh, old, False))(by_device, fresh, old)
    axis %= old.ndim
    shape = [-1 if dimension == axis else 1 for dimension in range(old.ndim)]
    return jnp.where(slots.reshape(shape), fresh, old)
