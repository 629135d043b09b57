"""Checks of a traced step beyond its contract: that it trains something, and that its writes are not lost.

What certainly has no effect is rejected.  What may be intended is a `StatewiseWarning`, once for each trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from statewise._src.common.nnx_graph import rebuild
from statewise._src.common.paths import Leaf
from statewise._src.plan.tables import PlanTables
from statewise._src.step.closures import brought, read_by
from statewise._src.step.contract import Contract
from statewise._src.step.dependence import differentiably_reached
from statewise._src.step.function import called_as
from statewise._src.step.outside_writes import own_name
from statewise._src.step.trace import Traced
from statewise.errors import StatewiseWarning, StructureError

__all__ = ["check_trains", "objects_of", "warnings_of"]


def objects_of(plan: PlanTables) -> tuple[Any, ...]:
    """Returns the planned objects, with empty leaves."""
    return rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)


def _spots(plan: PlanTables, contract: Contract) -> dict[str, list[tuple[str, int]]]:
    """Returns kind and position of each non-empty array that is differentiated, by kind."""
    spots_of: dict[str, list[tuple[str, int]]] = {}
    for group in contract.groups:
        for array in plan.arrays_of(group).sources:
            if array.spec.size:
                spots_of.setdefault(array.kind, []).append((array.kind, array.position))
    return spots_of


def _reaching(plan: PlanTables, traced: Traced, spots: Sequence[tuple[str, int]]) -> bool:
    """Returns whether a gradient may pass from the loss to one of these arrays."""
    chosen = set(plan.numbers(spots))
    read = [number for number, is_read in enumerate(traced.effects.read) if is_read]
    return differentiably_reached(traced.effects.jaxpr, [number in chosen for number in read])[0]


def check_trains(plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str) -> None:
    """Checks that some leaf that a train step differentiates reaches its loss.

    Args:
      plan: the plan.
      traced: the traced call.
      contract: what the step may do.
      fn: the function.
      name: the step's name.

    Raises:
      StructureError: the step would train nothing.
    """
    spots = [spot for kind in _spots(plan, contract).values() for spot in kind]
    if not spots or _reaching(plan, traced, spots):
        return
    leaves, any_read = [], False
    for kind, position in spots:
        read = traced.effects.read[plan.by_kind[kind][position].number]
        any_read |= read
        note = "read, but no gradient passes" if read else "not read"
        leaves.append(dataclasses.replace(plan.leaf_of_array[kind][position], note=note))
    fact = f"{name} trains nothing: no leaf that it differentiates reaches the loss."
    lines = []
    for used, _ in read_by(traced.effects.jaxpr, traced.effects.consts, brought(fn)):
        fact += f" The function reads {used}."
        own = own_name(used, objects_of(plan), fn)
        if own:
            lines.append(f"use `{own}`, the step's argument, instead of `{used.name}`")
    if any_read:
        lines.append(
            "jax.lax.stop_gradient, argmax, rounding, comparisons and integers do not pass gradients: "
            f"sw.audit({called_as(name)}, state, ...)"
        )
    if not lines:
        lines.append("compute the loss from the function's arguments: return loss(model(x), y)")
        lines.append("if nothing should be trained: @sw.step")
    raise StructureError(fact, leaves=list(dict.fromkeys(leaves)), hint="\n".join(lines))


def warnings_of(plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str) -> list[StatewiseWarning]:
    """Returns the warnings about a step.

    Args:
      plan: the plan.
      traced: the traced call.
      contract: what the step may do.
      fn: the function.
      name: the step's name.
    """
    return [
        *_unwritten(plan, traced, contract, name),
        *_dropped(plan, traced, contract, name),
        *_kinds_untrained(plan, traced, contract, name),
        *_all_from_outside(plan, traced, contract, fn, name),
    ]


_LOST = (
    "if it writes under a plain jax.jit or jax.checkpoint (of the model, in the step; or on one of its methods), "
    "the write is lost:\nnnx.jit instead of jax.jit, nnx.remat instead of jax.checkpoint\n"
    "likewise if the model is passed to jax.vmap, jax.lax.scan, jax.lax.cond ...: nnx.vmap, nnx.scan, nnx.cond ..."
)


def _dropped_leaves(plan: PlanTables, traced: Traced) -> list[Leaf]:
    note = "written under a plain jax.jit or jax.checkpoint"
    rows = [plan.leaf_of_array[kind][position] for kind, position in traced.lost_writes]
    return list(dict.fromkeys(dataclasses.replace(row, note=note) for row in rows))


def _unwritten(plan: PlanTables, traced: Traced, contract: Contract, name: str) -> list[StatewiseWarning]:
    """Returns a warning for each kind in `writes` that is never written."""
    written = {kind for kind, _ in traced.written} | {kind for group in contract.groups for kind in group.kinds}
    dropped = _dropped_leaves(plan, traced)
    unwritten = []
    for kind in contract.named:
        if kind in written or not plan.specs[kind]:
            continue
        unwritten.append(
            StatewiseWarning(
                f"{name} declares that it writes {kind}, but never writes it.",
                leaves=[leaf for leaf in dropped if leaf.kind == kind],
                kind=kind,
                hint=f"{_LOST}\nif it should not write {kind}: take {kind!r} out of writes",
            )
        )
    return unwritten


def _dropped(plan: PlanTables, traced: Traced, contract: Contract, name: str) -> list[StatewiseWarning]:
    """Returns a warning for lost writes to kinds that `_unwritten` does not report."""
    written = {kind for kind, _ in traced.written}
    named = {kind for kind in contract.named if kind not in written}
    leaves = [leaf for leaf in _dropped_leaves(plan, traced) if leaf.kind not in named]
    if not leaves:
        return []
    kinds = list(dict.fromkeys(leaf.kind for leaf in leaves))
    return [
        StatewiseWarning(
            f"{name} writes {', '.join(map(str, kinds))} under a plain jax.jit or jax.checkpoint, and the write is "
            "lost.",
            leaves=leaves,
            kind=kinds[0],
            hint="nnx.jit instead of jax.jit, nnx.remat instead of jax.checkpoint",
        )
    ]


def _kinds_untrained(plan: PlanTables, traced: Traced, contract: Contract, name: str) -> list[StatewiseWarning]:
    """Returns a warning for each differentiated kind of which no leaf reaches the loss, where other kinds do."""
    kinds = _spots(plan, contract)
    if len(kinds) < 2:
        return []
    reaching = {kind: _reaching(plan, traced, spots) for kind, spots in kinds.items()}
    if not any(reaching.values()):
        return []  # `check_trains` rejects this
    untrained = []
    for kind in (kind for kind, reaches in reaching.items() if not reaches):
        group = next(group for group in contract.groups if kind in group.kinds)
        others = tuple(kind for other in contract.groups if other is not group for kind in other.kinds)
        hint = f"@sw.train_step(wrt={others!r})" if len(group.kinds) == 1 else "a separate optimizer for each kind"
        untrained.append(
            StatewiseWarning(
                f"{name} differentiates {kind}, but no leaf of it reaches the loss: its optimizer sees only zeros.",
                leaves=list(dict.fromkeys(plan.leaf_of_array[kind][position] for _, position in kinds[kind])),
                kind=kind,
                hint=f"if this step should not train it: {hint}",
            )
        )
    return untrained


def _all_from_outside(
    plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str
) -> list[StatewiseWarning]:
    """Returns a warning if a step that does not train reads nothing of its state, but an object from outside."""
    if contract.trains or traced.written or any(traced.effects.read[: traced.inputs]):
        return []
    outside = []
    for used, _ in read_by(traced.effects.jaxpr, traced.effects.consts, brought(fn)):
        own = own_name(used, objects_of(plan), fn)
        if own:
            outside.append(
                StatewiseWarning(
                    f"{name} reads nothing of its state; it reads {used}, whose arrays are constants of the compiled "
                    "step.",
                    hint=f"use `{own}`, the step's argument, instead of `{used.name}`",
                )
            )
    return outside
