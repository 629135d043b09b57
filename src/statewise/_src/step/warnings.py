"""What is said of a traced step beside its contract: that it trains nothing, that what it writes is lost.

What surely does nothing is refused.  What may be meant so is a `StatewiseWarning`, once for each trace.
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

__all__ = ["cautions_of", "check_trains", "objects_of"]


def objects_of(plan: PlanTables) -> tuple[Any, ...]:
    """The planned objects, with nothing in their leaves."""
    return rebuild(plan.graphdef, [None] * len(plan.rows), plan.several)


def _spots(plan: PlanTables, contract: Contract) -> dict[str, list[tuple[str, int]]]:
    """Kind and position of each array that is differentiated and holds anything, by kind."""
    found: dict[str, list[tuple[str, int]]] = {}
    for group in contract.groups:
        for array in plan.arrays_of(group).sources:
            if array.spec.size:
                found.setdefault(array.kind, []).append((array.kind, array.position))
    return found


def _reaching(plan: PlanTables, traced: Traced, spots: Sequence[tuple[str, int]]) -> bool:
    """Whether a gradient may pass from the loss to one of these arrays."""
    chosen = set(plan.numbers(spots))
    read = [number for number, is_read in enumerate(traced.effects.read) if is_read]
    return differentiably_reached(traced.effects.jaxpr, [number in chosen for number in read])[0]


def check_trains(plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str) -> None:
    """Raises where no leaf that a train step differentiates reaches its loss.

    Args:
      plan: the plan.
      traced: the traced call.
      contract: what the step may do.
      fn: the function.
      name: the step's name.

    Raises:
      StructureError: it would train nothing.
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
    for one, _ in read_by(traced.effects.jaxpr, traced.effects.consts, brought(fn)):
        fact += f" The function reads {one}."
        own = own_name(one, objects_of(plan), fn)
        if own:
            lines.append(f"use `{own}`, which the step is given, in the place of `{one.name}`")
    if any_read:
        lines.append(
            "jax.lax.stop_gradient, argmax, rounding, comparisons and integers let no gradient pass: "
            f"sw.audit({called_as(name)}, state, ...)"
        )
    if not lines:
        lines.append("compute the loss from the objects that the function is given: return loss(model(x), y)")
        lines.append("where nothing is to be trained: @sw.step")
    raise StructureError(fact, leaves=list(dict.fromkeys(leaves)), hint="\n".join(lines))


def cautions_of(plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str) -> list[StatewiseWarning]:
    """What a step is warned of, each once.

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
    "where it writes under a plain jax.jit or jax.checkpoint (of the model, in the step; or on a method of the model), "
    "the write is lost:\nnnx.jit in the place of jax.jit, nnx.remat in the place of jax.checkpoint\n"
    "likewise where the model is given to jax.vmap, jax.lax.scan, jax.lax.cond ...: nnx.vmap, nnx.scan, nnx.cond ..."
)


def _dropped_leaves(plan: PlanTables, traced: Traced) -> list[Leaf]:
    note = "written under a plain jax.jit or jax.checkpoint"
    rows = [plan.leaf_of_array[kind][position] for kind, position in traced.lost_writes]
    return list(dict.fromkeys(dataclasses.replace(row, note=note) for row in rows))


def _unwritten(plan: PlanTables, traced: Traced, contract: Contract, name: str) -> list[StatewiseWarning]:
    """For each kind that the step names in `writes`, and of which nothing is written."""
    written = {kind for kind, _ in traced.written} | {kind for group in contract.groups for kind in group.kinds}
    dropped = _dropped_leaves(plan, traced)
    found = []
    for kind in contract.named:
        if kind in written or not plan.specs[kind]:
            continue
        found.append(
            StatewiseWarning(
                f"{name} declares that it writes {kind}, and writes nothing of it.",
                leaves=[leaf for leaf in dropped if leaf.kind == kind],
                kind=kind,
                hint=f"{_LOST}\nwhere it is not meant to write {kind}: take {kind!r} out of writes",
            )
        )
    return found


def _dropped(plan: PlanTables, traced: Traced, contract: Contract, name: str) -> list[StatewiseWarning]:
    """For what is written where it is lost, of kinds that the warning above does not speak of."""
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
            hint="nnx.jit in the place of jax.jit, nnx.remat in the place of jax.checkpoint",
        )
    ]


def _kinds_untrained(plan: PlanTables, traced: Traced, contract: Contract, name: str) -> list[StatewiseWarning]:
    """For each kind that the step differentiates, and of which no leaf reaches the loss, where others do."""
    kinds = _spots(plan, contract)
    if len(kinds) < 2:
        return []
    reaching = {kind: _reaching(plan, traced, spots) for kind, spots in kinds.items()}
    if not any(reaching.values()):
        return []  # which is refused
    found = []
    for kind in (kind for kind, reaches in reaching.items() if not reaches):
        group = next(group for group in contract.groups if kind in group.kinds)
        others = tuple(one for other in contract.groups if other is not group for one in other.kinds)
        hint = f"@sw.train_step(wrt={others!r})" if len(group.kinds) == 1 else "an optimizer of its own for each kind"
        found.append(
            StatewiseWarning(
                f"{name} differentiates {kind}, of which no leaf reaches the loss: its optimizer sees nothing but "
                "zeros.",
                leaves=list(dict.fromkeys(plan.leaf_of_array[kind][position] for _, position in kinds[kind])),
                kind=kind,
                hint=f"where this step is not to train it: {hint}",
            )
        )
    return found


def _all_from_outside(
    plan: PlanTables, traced: Traced, contract: Contract, fn: Any, name: str
) -> list[StatewiseWarning]:
    """Where a step that does not train uses nothing of its state, but an object that it brings along."""
    if contract.trains or traced.written or any(traced.effects.read[: traced.inputs]):
        return []
    found = []
    for one, _ in read_by(traced.effects.jaxpr, traced.effects.consts, brought(fn)):
        own = own_name(one, objects_of(plan), fn)
        if own:
            found.append(
                StatewiseWarning(
                    f"{name} reads nothing of its state; it reads {one}, whose arrays are constants of the compiled "
                    "step.",
                    hint=f"use `{own}`, which the step is given, in the place of `{one.name}`",
                )
            )
    return found
