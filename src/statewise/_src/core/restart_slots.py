"""Slots: which entries along its batch axis a restart renews.

Leaves that have no such axis, or another number of slots, are refused, all of them, with a declaration that helps: of
the model's own leaves a kind apart, of an optimizer's counts an optimizer for each slot.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.paths import Leaf, Path
from statewise._src.core.restart_targets import Chosen
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import StructureError

__all__ = ["only_where", "slots_of"]

_NO_AXIS = "has no such axis"


def slots_of(chosen: Chosen, where: Any) -> Any:
    """The slots as booleans, one for each; every leaf that has no such axis, or another length, is listed."""
    given = where if isinstance(where, jax.Array) else np.asarray(where)
    if given.ndim != 1 or not (given.dtype == bool or jnp.issubdtype(given.dtype, jnp.integer) or given.size == 0):
        raise StructureError(
            f"where must be booleans or slot numbers in one dimension, not {given.dtype}{list(given.shape)}.",
            hint="where=jnp.array([True, False]) or where=[0]",
        )
    kinds = chosen.kinds
    sizes = _slot_counts(chosen)
    is_mask = given.dtype == bool
    count = given.shape[0] if is_mask else max(size for _, size in sizes)
    odd = [
        dataclasses.replace(leaf, note=f"{size} slots" if size >= 0 else _NO_AXIS)
        for leaf, size in sizes
        if size < 0 or size != count
    ]
    found = {size for _, size in sizes}
    if is_mask and len(found) == 1 and found != {count} and min(found) >= 0:
        raise StructureError(
            f"where has {count} entries, but {', '.join(kinds)} has {min(found)} slots.",
            kind=kinds[0],
            hint=f"a boolean for each of the {min(found)} slots, or slot numbers",
        )
    if odd:
        slots = f"{count} slots along its batch axis" if count >= 0 else "its batch axis"
        raise StructureError(
            f"Not every leaf of {', '.join(kinds)} has {slots}.", leaves=odd, kind=kinds[0], hint=_hint(chosen, odd)
        )
    if is_mask:
        return given
    if not isinstance(given, jax.core.Tracer) and given.size:
        outside = [slot for slot in np.asarray(given).tolist() if not -count <= slot < count]
        if outside:
            raise StructureError(
                f"There is no slot {outside[0]}: there are {count}.", kind=kinds[0], hint=f"slots 0 to {count - 1}"
            )
    return jnp.zeros(count, bool).at[given.astype(int)].set(True)


@functools.lru_cache(maxsize=256)
def _slot_counts(chosen: Chosen) -> list[tuple[Leaf, int]]:
    """How many slots each array has along its batch axis, on all devices, with its leaf; -1 where it has none."""
    plan, counts = chosen.plan, []
    for name in chosen.kinds:
        axis, renewed = chosen.axis(name) or 0, chosen.positions(name)
        for at, (leaf, spec) in enumerate(zip(plan.leaf_of_array[name], plan.specs[name], strict=True)):
            if at not in renewed:
                continue
            here = spec.shape[axis] if -len(spec.shape) <= axis < len(spec.shape) else -1
            each = plan.per_device.devices if plan.per_device and at in plan.per_device.of(name) else 1
            counts.append((leaf, here * each if here >= 0 else here))
    return counts


def _hint(chosen: Chosen, odd: Sequence[Leaf]) -> str:
    """What to declare: an optimizer for each slot, or a kind apart for leaves that all slots share."""
    plan = chosen.plan
    derived = frozenset(leaf.path for leaf in plan.leaves[len(plan.rows) :])
    hints = _for_optimizers(chosen, {leaf.path: leaf.note for leaf in odd}) if OPTIMIZER in chosen.kinds else []
    for name in dict.fromkeys(leaf.kind or "" for leaf in odd if leaf.path not in derived):
        paths = list(dict.fromkeys(leaf.path for leaf in odd if leaf.kind == name and leaf.path not in derived))
        if name == OPTIMIZER and any(path[-1] != "step" for path in paths):
            hints.append(f"{_PER_SLOT}\nnnx.Optimizer(model, per_slot, wrt=...)")
            paths = [path for path in paths if path[-1] == "step"]  # NNX's own count of its calls
        if 0 < len(paths) < len(plan[name]):  # a kind of which nothing is left has no slots to tell apart
            hints.append(_apart(plan, name, paths))
    whole = f"state.restart({', '.join(map(repr, chosen.kinds))})"
    hints.append(f"or restart them whole: {whole}" if hints else whole)
    return "\n".join(hints)


_PER_SLOT = "per_slot = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))"


def _for_optimizers(chosen: Chosen, odd: Mapping[Path, str]) -> list[str]:
    """An optimizer for each slot, in the place of one whose state is not made of slots."""
    plan = chosen.plan
    hints: list[str] = []
    made: list[str] = []
    for group in (plan.optimizers[number] for number in chosen.groups):
        axes = {plan.kinds[name].batch_axis for name in group.kinds}
        sizes = {odd.get(path, "") for path in group.leaf_paths}
        if len(sizes) == 1 and _NO_AXIS not in sizes:  # made of slots already, if of another number than the others
            continue
        if len(axes) > 1 or None in axes:
            continue
        (axis,) = axes
        mapped = f", in_axes=({axis}, 0, {axis}), out_axes=({axis}, 0)" if axis else ""
        name = f"per_slot{len(made) or ''}"
        hints.append(
            f"tx = plan.optimizers[{group.kinds!r}]\n"
            f"{name} = optax.GradientTransformation(jax.vmap(tx.init{f', in_axes={axis}' if axis else ''}), "
            f"jax.vmap(tx.update{mapped}))"
        )
        made.append(f"{group.kinds!r}: {name}")
    if made:
        hints.append(f"plan = plan.kinds.plan(model, optimizers={{**plan.optimizers, {', '.join(made)}}})")
    others = [name for number in chosen.groups for name in plan.optimizers[number].kinds]
    slotted = [name for name in others if plan.kinds[name].batch_axis is not None]
    if chosen.whole and 0 < len(slotted) < len(others):
        hints.append(f"state.restart({', '.join(map(repr, [*slotted, OPTIMIZER]))}, where=where)  # theirs alone")
    return hints


def _apart(plan: PlanTables, name: str, paths: Sequence[Path]) -> str:
    """The declaration of a kind apart for some of a kind's leaves, as code."""
    # A filter sees paths within each object.
    inside = [path[plan.several :] for path in paths]
    others = {leaf.path[plan.several :][-1] for leaf in plan[name] if leaf.path not in paths}
    shown = dict.fromkeys(
        path if len(inside) == 1 or path[-1] in others or len(path) < 2 else ("**", path[-1]) for path in inside
    )
    of = " | ".join(f"sw.Path({'/'.join(map(str, path))!r})" for path in shown)
    own = f"plan.kinds[{name!r}]"
    apart = f"sw.Kinds({name}_of_all=dataclasses.replace({own}, of=nnx.All({own}.of, {of}), batch_axis=None))"
    if plan.kinds[name].rest:
        return f"kinds = plan.kinds | {apart.replace(f'nnx.All({own}.of, {of})', of)}  # a kind apart"
    without = f"dataclasses.replace({own}, of=nnx.All({own}.of, nnx.Not({of})))"
    return f"kinds = plan.kinds.replace({name}={without}) | {apart}  # a kind apart"


def only_where(axis: int, slots: Any, fresh: Any, old: Any, each: bool) -> Any:
    """Fresh values in the slots that are restarted, the old ones in all others.

    Args:
      axis: the axis of the slots.
      slots: a boolean for each slot, those of the first device first.
      fresh: the fresh values.
      old: the values of now.
      each: whether there is a leading axis, one value for each device.
    """
    if each:
        by_device = slots.reshape(old.shape[0], -1)
        return jax.vmap(lambda slots, fresh, old: only_where(axis, slots, fresh, old, False))(by_device, fresh, old)
    axis %= old.ndim
    return jnp.where(slots.reshape([-1 if at == axis else 1 for at in range(old.ndim)]), fresh, old)
